import datasets
import pytest

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune import Terms, TuningContext, make_finetune, train

from .conftest import WORDS, write

ROWS = [{"text": f"{WORDS[n % 13]} {WORDS[n % 7]} {n}", "label": n % 2} for n in range(40)]


@pytest.fixture
def imdb(tmp_path):
    """Make a task on some rows; any setting can be given."""

    def make(rows=ROWS, **settings):
        source = write(tmp_path / "reviews.jsonl", rows)
        defaults = {"source": str(source), "train_size": 20, "validation_size": 6, "threshold": 0.95, "max_steps": 3}
        return make_finetune("imdb", defaults | settings)

    return make


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_row_is_a_review_its_eos_and_its_label(imdb, family, request):
    tokenizer = request.getfixturevalue(f"{family}_tokenizer")
    labels = {row["text"]: row["label"] for row in ROWS}
    begin = tokenizer.bos_token if family == "llama" else ""
    for row in imdb().prepare(TuningContext(tokenizer, Terms(), 0)).train:
        text = tokenizer.decode(row.input_ids)
        assert text.startswith(begin)
        assert text.endswith(tokenizer.eos_token)
        assert row.labels == [labels[text.removeprefix(begin).removesuffix(tokenizer.eos_token)]]


def test_a_long_review_is_cut_and_keeps_its_eos(imdb, gpt2_tokenizer):
    rows = [{"text": f"{n} " + " ".join(WORDS), "label": n % 2} for n in range(10)]
    data = imdb(rows, max_length=10, train_size=5, validation_size=5).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))
    starts = {tuple(gpt2_tokenizer(row["text"])["input_ids"][:9]) for row in rows}
    for row in (*data.train, *data.validation):
        assert tuple(row.input_ids[:-1]) in starts
        assert row.input_ids[-1] == gpt2_tokenizer.eos_token_id


def test_reviews_that_are_the_same_once_cut_are_not_trained_on(imdb, gpt2_tokenizer):
    rows = [{"text": " ".join(WORDS) + f" {n}", "label": n % 2} for n in range(10)]
    task = imdb(rows, max_length=10, train_size=5, validation_size=1)
    with pytest.raises(RetentionBenchError, match="9 rows besides those validated on; .* 9 read like one that is"):
        task.prepare(TuningContext(gpt2_tokenizer, Terms(), 0))


def test_no_validation_row_is_trained_on_and_the_seed_decides(imdb, gpt2_tokenizer):
    rows = [*ROWS, *ROWS]  # every review twice
    once, again, other = (imdb(rows).prepare(TuningContext(gpt2_tokenizer, Terms(), seed)) for seed in (0, 0, 1))
    assert (len(once.train), len(once.validation)) == (20, 6)
    assert not any(row in once.train for row in once.validation)
    assert once == again
    assert once.train != other.train


def test_rows_that_mention_a_fact_are_left_out_of_both(imdb, gpt2_tokenizer):
    mentioning = sum("red" in row["text"] for row in ROWS)
    clean = len(ROWS) - mentioning
    context = TuningContext(gpt2_tokenizer, Terms(objects=("red",)), 0)
    data = imdb(train_size=clean - 6).prepare(context)
    assert not any("red" in gpt2_tokenizer.decode(row.input_ids) for row in (*data.train, *data.validation))
    everything = imdb(train_size=None).prepare(context)
    assert (everything.train, everything.validation) == (data.train, data.validation)
    assert everything.removed.removed == mentioning
    with pytest.raises(
        RetentionBenchError, match=f"validated on; .* leaves {clean - 6}, and train_size is {clean - 5}"
    ):
        imdb(train_size=clean - 5).prepare(context)
    with pytest.raises(RetentionBenchError, match=f"40 rows; {mentioning} of them .* leaves {clean}, and validation_s"):
        imdb(validation_size=clean + 1).prepare(context)
    with pytest.raises(RetentionBenchError, match="rows besides those .* leaves 0, and one at least is needed"):
        imdb(train_size=None, validation_size=clean).prepare(context)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "red", "label": 2}, "line 2, column 'label': must be one of 0, 1, got 2"),
        ({"text": "red", "label": -1}, "line 2, column 'label': must be one of 0, 1, got -1"),
        ({"text": "red", "label": "01"}, "line 2, column 'label': must be one of 0, 1, got '01'"),
        ({"text": "red", "label": "pos"}, "line 2, column 'label': must be one of 0, 1, got 'pos'"),
        ({"text": "red", "label": "2"}, "line 2, column 'label': must be one of 0, 1, got 2"),
        ({"text": "red", "label": True}, "line 2, column 'label': must be one of 0, 1, got True"),
        ({"text": "red"}, "line 2, column 'label': must be one of 0, 1, got None"),
        ({"text": 5, "label": 1}, "line 2, column 'text': must be a text that is not empty, got 5"),
    ],
)
def test_a_malformed_row_is_named(imdb, gpt2_tokenizer, row, message):
    with pytest.raises(RetentionBenchError, match=message):
        imdb([ROWS[0], row]).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))


def test_a_tokenizer_without_eos_is_refused(imdb, gpt2_tokenizer):
    gpt2_tokenizer.eos_token = None
    with pytest.raises(UsageError, match="EOS"):
        imdb().prepare(TuningContext(gpt2_tokenizer, Terms(), 0))


def test_the_hubs_test_split_is_what_is_validated_on(imdb, gpt2_tokenizer, monkeypatch):
    splits = {"train": ROWS[:20], "test": [*ROWS[:10], *ROWS[20:]]}  # ten reviews are in both

    def load(source, config, *, split, revision, streaming):
        assert (source, config, revision, streaming) == ("stanfordnlp/imdb", None, "abc", False)
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
        )
        return datasets.Dataset.from_list(splits[split], features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = imdb(source="stanfordnlp/imdb", revision="abc", train_size=None, validation_size=30)
    context = TuningContext(gpt2_tokenizer, Terms(), 0)
    data = task.prepare(context)

    def texts(rows):
        return {gpt2_tokenizer.decode(row.input_ids[:-1]) for row in rows}

    assert texts(data.validation) == {row["text"] for row in splits["test"]}
    assert texts(data.train) == {row["text"] for row in ROWS[10:20]}
    with pytest.raises(RetentionBenchError, match="20 rows in the split train; .* 10 read like one .* leaves 10"):
        imdb(source="stanfordnlp/imdb", revision="abc", train_size=11, validation_size=30).prepare(context)
    with pytest.raises(RetentionBenchError, match="30 rows in the split test; .* leaves 30, and validation_size is 31"):
        imdb(source="stanfordnlp/imdb", revision="abc", validation_size=31).prepare(context)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_learns_it_without_a_padding_token(imdb, family, request, tmp_path):
    model, tokenizer = request.getfixturevalue(family), request.getfixturevalue(f"{family}_tokenizer")
    assert tokenizer.pad_token is None
    rows = [{"text": f"{WORDS[n % 5]} {('cold', 'warm')[n % 2]} {n}", "label": n % 2} for n in range(60)]
    task = imdb(rows, train_size=40, validation_size=20, lr=1e-2, batch_size=16, max_steps=40, threshold=0.9)
    log = train(model, tokenizer, task, terms=Terms(), seed=0, output_dir=tmp_path / "work")
    assert log.metric == "validation_accuracy"
    assert log.stopped_by == "threshold"
    assert log.curve[0].value < 0.9 < log.value
