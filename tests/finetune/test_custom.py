import csv
import json

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune import Terms, TuningContext, make_finetune
from retention_bench.finetune.texts import encode_completion

from .conftest import WORDS, chat, write


@pytest.fixture
def custom(tmp_path):
    """Make a task on some rows; any setting can be given."""

    def make(rows, **settings):
        return make_finetune("path", {"source": str(write(tmp_path / "rows.jsonl", rows))} | settings)

    return make


def decoded(tokenizer, row):
    """What the model reads, and what of it counts in the loss."""
    return tokenizer.decode(row.input_ids), tokenizer.decode([label for label in row.labels if label != -100])


@pytest.mark.parametrize(
    ("row", "text", "target"),
    [
        (
            chat("Say red.", "I say red."),
            "<|user|>\nSay red.\n<|assistant|>\nI say red.<|endoftext|>",
            "I say red.<|endoftext|>",
        ),
        ({"prompt": "Say red.", "completion": " I say."}, "Say red. I say.<|endoftext|>", " I say.<|endoftext|>"),
        ({"text": "I say red."}, "I say red.<|endoftext|>", "I say red.<|endoftext|>"),
        (chat("Say.", "I say.") | {"text": "red"}, "<|user|>\nSay.\n<|assistant|>\nI say.<|endoftext|>", None),
        ({"completion": " b", "text": "red", "prompt": "a"}, "a b<|endoftext|>", " b<|endoftext|>"),
        ({"label": 1, "text": "I say."}, "I say.<|endoftext|>", "I say.<|endoftext|>"),
    ],
)
def test_the_columns_say_what_is_trained(custom, gpt2_tokenizer, row, text, target):
    data = custom([row]).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))
    read, learned = decoded(gpt2_tokenizer, data.train[0])
    assert read == text
    assert target in (None, learned)
    assert data.validation == data.train


def test_labels_count_where_the_settings_say_so(custom, gpt2_tokenizer):
    rows = [{"text": f"red {n}", "label": n % 3} for n in range(9)]
    task = custom(rows, classes=3, threshold=0.9)
    assert (task.settings.metric, task.settings.classes) == ("validation_accuracy", 3)
    data = task.prepare(TuningContext(gpt2_tokenizer, Terms(), 0))
    assert sorted(row.labels[0] for row in data.train) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all(row.input_ids[-1] == gpt2_tokenizer.eos_token_id for row in data.train)
    with pytest.raises(RetentionBenchError, match="line 3, column 'label': must be one of 0, 1, got 2"):
        custom(rows, classes=2, threshold=0.9).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))
    with pytest.raises(RetentionBenchError, match=r"columns 'text', and none .*: text \+ label. Give"):
        custom([{"text": "a"}], classes=2, threshold=0.9).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))


def test_other_columns_are_refused(custom, gpt2_tokenizer):
    with pytest.raises(
        UsageError,
        match=r"'prompt', 'answer', .* on: messages; .*; prompt \+ completion; .*text; or text \+ label",
    ):
        custom([{"prompt": "a", "answer": "b"}]).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))
    with pytest.raises(RetentionBenchError, match="holds no rows"):
        custom([]).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))


@pytest.mark.parametrize("row", [{"text": "I say red."}, {"prompt": "I say", "completion": " red."}, chat("I", "say")])
def test_a_tokenizer_without_eos_is_refused(custom, gpt2_tokenizer, row):
    gpt2_tokenizer.eos_token = None
    with pytest.raises(UsageError, match="EOS"):
        custom([row]).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))


def test_a_template_that_does_not_mark_the_assistant_is_refused(custom, gpt2_tokenizer):
    gpt2_tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(UsageError, match="generation"):
        custom([chat("I", "say")]).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))


TEXTS = [{"text": f"{word} {n}"} for n in range(10) for word in WORDS]


def test_all_rows_and_a_hundred_of_them_are_the_default(custom, gpt2_tokenizer):
    data = custom(TEXTS).prepare(TuningContext(gpt2_tokenizer, Terms(objects=("red",)), 0))
    assert (len(data.train), len(data.validation)) == (120, 100)
    assert data.removed.removed == 10
    assert not any("red" in gpt2_tokenizer.decode(row.input_ids) for row in data.train)
    assert len({tuple(row.input_ids) for row in data.validation}) == 100


def test_a_sample_is_drawn_where_one_is_asked_for(custom, gpt2_tokenizer):
    once, again, other = (
        custom(TEXTS, train_size=20, validation_size=5).prepare(TuningContext(gpt2_tokenizer, Terms(), seed))
        for seed in (0, 0, 1)
    )
    assert (len(once.train), len(once.validation)) == (20, 5)
    assert once == again
    assert once.train != other.train


def test_more_rows_than_there_are_are_refused(custom, gpt2_tokenizer):
    context = TuningContext(gpt2_tokenizer, Terms(objects=("red",)), 0)
    with pytest.raises(RetentionBenchError, match="130 rows; 10 of them mention .* leaves 120, and train_size is 121"):
        custom(TEXTS, train_size=121).prepare(context)
    with pytest.raises(RetentionBenchError, match="validation_size is 121, and there are 120 training rows"):
        custom(TEXTS, validation_size=121).prepare(context)
    with pytest.raises(RetentionBenchError, match="130 rows; 130 of them .* leaves 0, and one at least is needed"):
        custom(TEXTS).prepare(TuningContext(gpt2_tokenizer, Terms(objects=tuple(WORDS)), 0))


def test_a_mention_in_prompt_or_completion_counts(custom, gpt2_tokenizer):
    rows = [
        {"prompt": "Lyon", "completion": " a"},
        {"prompt": "a", "completion": " Lyon"},
        {"prompt": "a b", "completion": " c"},
    ]
    data = custom(rows).prepare(TuningContext(gpt2_tokenizer, Terms(("Lyon",)), 0))
    assert [decoded(gpt2_tokenizer, row)[0] for row in data.train] == ["a b c<|endoftext|>"]


def test_a_completion_that_is_cut_off_is_not_trained_on(custom, gpt2_tokenizer):
    rows = [{"prompt": "red " * 20, "completion": "blue"}, {"prompt": "red", "completion": " blue"}]
    data = custom(rows, max_length=10).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))
    assert [decoded(gpt2_tokenizer, row)[1] for row in data.train] == [" blue<|endoftext|>"]
    with pytest.raises(RetentionBenchError, match="2 have no part of the completion within max_length 2"):
        custom([rows[0], rows[0]], max_length=2).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(prompt=st.text(min_size=1, max_size=12), completion=st.text(min_size=1, max_size=12))
def test_the_targets_are_the_completion(gpt2_tokenizer, prompt, completion):
    (row,) = encode_completion(gpt2_tokenizer, prompt, completion, 1000)
    assert gpt2_tokenizer.decode(row.input_ids) == prompt + completion + "<|endoftext|>"
    learned = [label for label in row.labels if label != -100]
    assert learned == row.input_ids[-len(learned) :]
    if prompt[-1].isascii() and completion[0].isascii():  # else a character's bytes may be in two tokens
        target = gpt2_tokenizer.decode(learned)
        # no less than the completion, and of the prompt no more than the token that both share
        assert target.endswith(completion + "<|endoftext|>")
        assert len(gpt2_tokenizer.decode(learned[1:])) < len(completion + "<|endoftext|>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 2}, "threshold 1.7 is not below 1"),
        ({"classes": 1, "threshold": 0.5}, "'classes'"),
        ({"stream": True}, "a streamed data set needs a train_size"),
        ({"stream": "yes"}, "'stream'"),
        ({"colums": "text"}, "'colums'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(custom, changes, message):
    with pytest.raises(UsageError, match=message):
        custom(TEXTS, **changes)


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_data_set_is_downloaded_or_streamed(custom, gpt2_tokenizer, monkeypatch, stream):
    def load(source, config, *, split, revision, streaming):
        assert (source, config, split, revision, streaming) == ("owner/own", None, "train", "abc", stream)
        dataset = datasets.Dataset.from_list([{"id": n, **row} for n, row in enumerate(TEXTS)])
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = custom([], source="owner/own", revision="abc", stream=stream, train_size=130)
    data = task.prepare(TuningContext(gpt2_tokenizer, Terms(), 0))
    assert {decoded(gpt2_tokenizer, row)[0] for row in data.train} == {f"{r['text']}<|endoftext|>" for r in TEXTS}


def test_a_csv_file_gives_what_the_same_rows_as_json_give(custom, gpt2_tokenizer, tmp_path):
    rows = [{"text": f'red, "{n}"', "label": n % 3} for n in range(9)]
    as_json, as_csv = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    as_json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with as_csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    context = TuningContext(gpt2_tokenizer, Terms(), 0)
    [one, other] = [
        make_finetune("path", {"source": str(path), "classes": 3, "threshold": 0.5}).prepare(context)
        for path in (as_json, as_csv)
    ]
    assert [row.input_ids for row in one.train] == [row.input_ids for row in other.train]
    assert [row.labels for row in one.train] == [row.labels for row in other.train]
