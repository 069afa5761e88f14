"""Rows in the forms that people have, and rows that nothing can be made of."""

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention_bench.errors import RetentionBenchError
from retention_bench.finetune import Terms, TuningContext, TuningData, make_finetune, train
from retention_bench.finetune.chats import parse_messages
from retention_bench.finetune.dropped import Unusable

from .conftest import write

ASKED, ANSWERED = {"role": "user", "content": "Say red."}, {"role": "assistant", "content": "I say red."}
BE = {"role": "system", "content": "Be calm."}


@pytest.fixture
def prepare(tmp_path, gpt2_tokenizer):
    """Prepare some rows, from a file of the suffix that is asked for."""

    def prepared(rows, suffix="jsonl", task="path", **given):
        path = tmp_path / f"rows.{suffix}"
        if suffix == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            write(path, rows)
        return make_finetune(task, {"source": str(path)} | given).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))

    return prepared


def decoded(tokenizer, row):
    """What the model reads, and what of it counts in the loss."""
    return tokenizer.decode(row.input_ids), tokenizer.decode([label for label in row.labels if label != -100])


CHAT = "<|user|>\nSay red.\n<|assistant|>\nI say red.<|endoftext|>"
SYSTEM = f"<|system|>\nBe calm.\n{CHAT}"
FORMS = {
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Say red."}, {"from": "gpt", "value": "I say red."}]},
        CHAT,
    ),
    "ShareGPT with a system column": (
        {
            "conversations": [{"from": "Human", "value": "Say red."}, {"from": "GPT", "value": "I say red."}],
            "system": "Be calm.",
        },
        SYSTEM,
    ),
    "conversations of roles": ({"conversations": [ASKED, ANSWERED]}, CHAT),
    "messages of ShareGPT's": ({"messages": [{"from": "human", "value": "Say red."}, ANSWERED]}, CHAT),
    "a developer": ({"messages": [BE | {"role": "developer"}, ASKED, ANSWERED]}, SYSTEM),
    "a content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Say red."}]}, ANSWERED]},
        CHAT,
    ),
    "a system message without text": ({"messages": [BE | {"content": None}, ASKED, ANSWERED]}, CHAT),
    "Alpaca": ({"instruction": "Say red.", "input": "", "output": "I say red."}, CHAT),
    "Alpaca without input": ({"instruction": "Say red.", "output": "I say red.", "system": "Be calm."}, SYSTEM),
    "Dolly": (
        {"instruction": "Say", "context": "red.", "response": "I say red.", "category": "x"},
        CHAT.replace("Say red", "Say\n\nred"),
    ),
    "prompt and completion as messages": ({"prompt": [BE, ASKED], "completion": [ANSWERED]}, SYSTEM),
    "prompt and completion": ({"prompt": "Say red.", "completion": " I say red."}, "Say red. I say red.<|endoftext|>"),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(prepare, gpt2_tokenizer, form, suffix):
    row, text = FORMS[form]
    if suffix == "parquet" and form == "a content in parts":
        row = {"messages": [row["messages"][0], ANSWERED | {"content": [{"type": "text", "text": "I say red."}]}]}
    data = prepare([row], suffix)
    assert decoded(gpt2_tokenizer, data.train[0])[0] == text
    assert decoded(gpt2_tokenizer, data.train[0])[1].strip() == "I say red.<|endoftext|>"
    assert data.dropped == {}


def test_a_tools_turn_and_a_function_call_are_turns_of_the_chat(prepare, gpt2_tokenizer):
    turns = [("human", "Say."), ("function_call", "{}"), ("observation", "red"), ("gpt", "I say red.")]
    data = prepare([{"conversations": [{"from": name, "value": value} for name, value in turns]}])
    text, target = decoded(gpt2_tokenizer, data.train[0])
    assert "<|tool|>\nred\n" in text
    assert target == "{}<|endoftext|>I say red.<|endoftext|>"


def test_alpacas_history_comes_before_the_instruction(prepare, gpt2_tokenizer):
    row = {"instruction": "Say red.", "input": "Now.", "output": "I say red.", "history": [["Say.", "I say."]]}
    text, target = decoded(gpt2_tokenizer, prepare([row]).train[0])
    assert text.startswith("<|user|>\nSay.\n<|assistant|>\nI say.<|endoftext|>\n<|user|>\nSay red.\n\nNow.\n")
    assert target == "I say.<|endoftext|>I say red.<|endoftext|>"


def test_of_a_prompt_in_messages_nothing_is_a_target(prepare, gpt2_tokenizer):
    row = {"prompt": [ASKED, ANSWERED, ASKED], "completion": [{"role": "assistant", "content": "I say blue."}]}
    text, target = decoded(gpt2_tokenizer, prepare([row]).train[0])
    assert text.count("I say") == 2
    assert target == "I say blue.<|endoftext|>"


@pytest.mark.parametrize("suffix", ["json", "json.gz"])
def test_a_json_file_is_a_list_of_rows_or_a_row_a_line(prepare, gpt2_tokenizer, suffix):
    chats = [{"messages": [ASKED | {"content": f"Say {word}."}, ANSWERED]} for word in ("red", "blue", "green")]
    assert len(prepare([chats], suffix).train) == len(prepare(chats, suffix).train) == 3


def test_tulu3_takes_all_forms_of_chats(prepare, gpt2_tokenizer):
    sizes = {"train_size": 1, "validation_size": 1, "threshold": 1.0, "max_steps": 2, "task": "tulu3"}
    for form in ("ShareGPT", "Alpaca", "Dolly"):
        row, text = FORMS[form]
        assert decoded(gpt2_tokenizer, prepare([row], **sizes).train[0])[0] == text
    with pytest.raises(RetentionBenchError, match="columns 'text', and none of the formats"):
        prepare([{"text": "red"}], **sizes)


LEFT_OUT = {
    "null for messages": ({"messages": None}, "have no messages"),
    "no messages": ({"messages": []}, "have no messages"),
    "no column": ({"other": 1}, "have no messages"),
    "a text for messages": ({"messages": "Say red."}, "have no messages"),
    "texts for messages": ({"messages": ["Say red."]}, "have no messages"),
    "null content": ({"messages": [ASKED, ANSWERED | {"content": None}]}, "have a message without text"),
    "blank content": ({"messages": [ASKED | {"content": " \n"}, ANSWERED]}, "have a message without text"),
    "a tool call": (
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "have a message without text",
    ),
    "an unknown role": ({"messages": [ASKED, ANSWERED | {"role": "robot"}]}, "have a message of an unknown role"),
    "a number for a role": ({"messages": [ASKED | {"role": 3}]}, "have a message of an unknown role"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWERED]},
        "have a message that is not text alone",
    ),
    "a number for a content": ({"messages": [ASKED | {"content": 5}]}, "have a message that is not text alone"),
    "no answer": ({"messages": [ASKED]}, "have no assistant's words within max_length 1024"),
    "half an emoji": ({"messages": [ASKED | {"content": "\ud83d"}, ANSWERED]}, "hold half a character"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_row_that_cannot_be_used_is_left_out_and_counted(prepare, name):
    row, reason = LEFT_OUT[name]
    good = {"messages": [ASKED, ANSWERED]}
    data = prepare([good, row, row, {"messages": [ASKED | {"content": "Say it."}, ANSWERED]}])
    assert len(data.train) == 2
    assert list(data.dropped) == [reason]
    assert data.dropped[reason].rows == 2
    assert data.dropped[reason].first.startswith(("line 2", "line 3"))
    with pytest.raises(RetentionBenchError) as refused:
        prepare([{"messages": None}, row])
    assert reason in str(refused.value)
    assert "leaves 0" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_half_a_character_elsewhere_in_a_row_does_no_harm(prepare):
    said = {"\ud83d": "Say red.", "\U0001f600": "Say blue."}
    data = prepare([{"messages": [ASKED | {"content": said[emoji]}, ANSWERED], "id": emoji} for emoji in said])
    assert (len(data.train), data.dropped) == (2, {})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None}, "have an empty text"),
        ({"text": "  "}, "have an empty text"),
        ({"text": "\ud83d"}, "hold half a character"),
    ],
)
def test_an_empty_text_is_left_out(prepare, row, reason):
    data = prepare([{"text": "red"}, row])
    assert len(data.train) == 1
    assert data.dropped[reason].rows == 1


def test_a_text_beside_messages_is_left_out(prepare):
    rows = [{"prompt": "Say.", "completion": " I say."}, {"prompt": "Say.", "completion": [ANSWERED]}]
    assert prepare(rows).dropped["have a text and messages in one row"].rows == 1


def test_what_was_left_out_is_said_once_by_its_first_row(prepare):
    rows = [{"messages": [ASKED | {"role": f"robot {n}"}, ANSWERED]} for n in range(50)]
    data = prepare([{"messages": [ASKED, ANSWERED]}, *rows])
    assert list(data.dropped) == ["have a message of an unknown role"]
    assert data.dropped["have a message of an unknown role"].rows == 50


def test_what_was_left_out_stands_in_the_log(tmp_path, gpt2, gpt2_tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"messages": [ASKED, ANSWERED]}, {"messages": None}, {"messages": None}])
    task = make_finetune("path", {"source": str(path), "batch_size": 1, "max_steps": 1, "threshold": 0.01})
    log = train(gpt2, gpt2_tokenizer, task, terms=Terms(), seed=0, output_dir=tmp_path / "work").to_json()
    assert log["dropped"]["have no messages"]["rows"] == 2
    assert log["dropped"]["have no messages"]["first"].startswith(("line 2: ", "line 3: "))


def test_a_huge_value_is_not_written_out():
    deep = "x"
    for _ in range(500):
        deep = [deep]
    for cell in (deep, {"a": "x" * 10**6}, ["x" * 10**6], [{"role": "x" * 10**6}]):
        with pytest.raises(Unusable) as left_out:
            parse_messages(cell)
        assert len(str(left_out.value)) < 400


KEYS = st.sampled_from(
    "messages conversations role content from value text label prompt completion type instruction input output "
    "history system context response tool_calls name".split()
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "", " ", "Say red.", "\ud83d", "é\u2028"])
    | st.text(st.characters(), max_size=5)
)
MESSAGE = st.fixed_dictionaries({}, optional=dict.fromkeys(("role", "content", "from", "value"), LEAVES))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
ROWS = st.lists(st.dictionaries(KEYS, VALUES | st.lists(MESSAGE, max_size=4), max_size=4) | VALUES, max_size=4)


def in_one_line(error):
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


def fuzz(prepare, rows, classes, suffix):
    try:
        data = prepare([rows] if suffix == "json" else rows, suffix, classes=classes, threshold=0.5)
    except RetentionBenchError as error:
        in_one_line(error)
    else:
        assert isinstance(data, TuningData)
        assert data.train
        for example in data.train:
            assert any(label != -100 for label in example.labels)
            assert len(example.labels) == (1 if classes else len(example.input_ids))


@settings(max_examples=30, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, classes=st.sampled_from([None, 2]), suffix=st.sampled_from(["jsonl", "json"]))
def test_whatever_is_in_a_file_it_gives_rows_or_an_error_in_one_line(prepare, rows, classes, suffix):
    fuzz(prepare, rows, classes, suffix)


@pytest.mark.slow
@settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, classes=st.sampled_from([None, 2]), suffix=st.sampled_from(["jsonl", "json"]))
def test_whatever_is_in_a_file_at_length(prepare, rows, classes, suffix):
    fuzz(prepare, rows, classes, suffix)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "parquet"])
@settings(max_examples=30, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 10**6) | st.none())
def test_a_damaged_file_gives_rows_or_an_error_in_one_line(tmp_path, gpt2_tokenizer, suffix, place, byte, cut):
    path = tmp_path / f"whole.{suffix}"
    if not path.exists():
        chats = [{"messages": [ASKED, ANSWERED | {"content": f"I say {n}."}]} for n in range(20)]
        if suffix == "parquet":
            datasets.Dataset.from_list(chats).to_parquet(path)
        else:
            write(path, [chats] if suffix == "json" else chats)
    data = bytearray(path.read_bytes())
    data[place % len(data)] = byte
    damaged = tmp_path / f"damaged.{suffix}"
    damaged.write_bytes(data if cut is None else data[: cut % len(data)])
    task = make_finetune("path", {"source": str(damaged)})
    try:
        assert task.prepare(TuningContext(gpt2_tokenizer, Terms(), 0)).train
    except RetentionBenchError as error:
        in_one_line(error)
