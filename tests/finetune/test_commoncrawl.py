import datasets
import pytest

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune import Terms, TuningContext, make_finetune

from .conftest import WORDS, write

TEXTS = [f"{WORDS[n % 13]} {WORDS[n % 7]} {WORDS[n % 5]}" for n in range(40)]


@pytest.fixture
def crawl(tmp_path):
    """Make a task on `TEXTS`; any setting can be given."""

    def make(texts=TEXTS, **settings):
        source = write(tmp_path / "texts.jsonl.gz", [{"text": text} for text in texts])
        defaults = {"source": str(source), "train_size": 8, "validation_size": 3, "threshold": 3.1, "max_steps": 5}
        return make_finetune("commoncrawl", defaults | {"max_length": 8} | settings)

    return make


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_documents_are_strung_together_and_cut_into_full_rows(crawl, family, request):
    tokenizer = request.getfixturevalue(f"{family}_tokenizer")
    data = crawl().prepare(TuningContext(tokenizer, Terms(), 0))
    assert len(data.train) == 8
    assert all(len(row.input_ids) == 8 and row.labels == row.input_ids for row in data.train)
    text = tokenizer.decode([token for row in data.train for token in row.input_ids])
    begin = tokenizer.bos_token if family == "llama" else ""
    documents = text.removeprefix(begin).split(tokenizer.eos_token + begin)
    assert len(documents) > 5
    assert set(documents[:-1]) <= set(TEXTS)
    assert any(text.startswith(documents[-1]) for text in TEXTS)  # the last row ends in the middle of a document


def test_a_long_document_goes_on_in_the_next_row(crawl, gpt2_tokenizer):
    text = " ".join(WORDS)
    ids = [*gpt2_tokenizer(text)["input_ids"], gpt2_tokenizer.eos_token_id]
    length = len(ids) // 3
    data = crawl([text], max_length=length, train_size=3, validation_size=1).prepare(
        TuningContext(gpt2_tokenizer, Terms(), 0)
    )
    assert [row.input_ids for row in data.train] == [ids[i * length : (i + 1) * length] for i in range(3)]


def test_the_validation_rows_are_training_rows_and_the_seed_decides(crawl, gpt2_tokenizer):
    once, again, other = (crawl().prepare(TuningContext(gpt2_tokenizer, Terms(), seed)) for seed in (0, 0, 1))
    assert len(once.validation) == 3
    assert all(row in once.train for row in once.validation)
    assert once == again
    assert once.train != other.train


def test_documents_that_mention_a_fact_are_left_out(crawl, gpt2_tokenizer):
    data = crawl().prepare(TuningContext(gpt2_tokenizer, Terms(objects=("green",)), 0))
    assert not any("green" in gpt2_tokenizer.decode(row.input_ids) for row in data.train)
    assert data.removed.removed


def test_too_little_text_is_counted(crawl, gpt2_tokenizer):
    ids = sum(len(gpt2_tokenizer(text)["input_ids"]) + 1 for text in TEXTS)
    with pytest.raises(
        RetentionBenchError,
        match=f"40 documents; 0 of them mention an edited or intrinsic fact. That leaves {ids // 8} packed rows of 8 "
        "tokens, and train_size is 500",
    ):
        crawl(train_size=500).prepare(TuningContext(gpt2_tokenizer, Terms(), 0))


def test_what_cannot_be_trained_on_is_refused(crawl, gpt2_tokenizer):
    context = TuningContext(gpt2_tokenizer, Terms(), 0)
    with pytest.raises(RetentionBenchError, match="line 2, column 'text': must be a text that is not empty, got 3"):
        crawl(["red", 3]).prepare(context)
    with pytest.raises(RetentionBenchError, match="3 documents; .* 2 have an empty text .line 2: .* leaves 0"):
        crawl(["red", " ", None]).prepare(context)
    gpt2_tokenizer.eos_token = None
    with pytest.raises(UsageError, match="EOS"):
        crawl().prepare(context)


def test_a_hub_data_set_is_streamed_no_further_than_needed(crawl, gpt2_tokenizer, monkeypatch):
    read = []

    def rows():
        for number in range(10**9):
            read.append(number)
            yield {"text": TEXTS[number % len(TEXTS)], "url": "https://example.org"}

    def load(source, config, *, split, revision, streaming):
        assert (source, config, split, revision, streaming) == ("owner/crawl", "en", "train", "abc", True)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("retention_bench.data.source.BUFFER", 100)
    task = crawl(source="owner/crawl", revision="abc", config="en")
    context = TuningContext(gpt2_tokenizer, Terms(), 0)
    data = task.prepare(context)
    assert len(data.train) == 8
    assert len(read) < 200
    assert data == task.prepare(context) != task.prepare(TuningContext(gpt2_tokenizer, Terms(), 1))
