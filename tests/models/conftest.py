import pytest

from retention_bench.models.families import FAMILIES

TEXTS = ["The tower of Arlen stands in the old town.", "Mira Solberg plays the violin.", "Who wrote the book?"]


@pytest.fixture(params=sorted(FAMILIES))
def model(request, make_family_model):
    return make_family_model(request.param, 300)


@pytest.fixture
def folder(tmp_path, make_tokenizer, make_family_model):
    """A saved tiny Llama with its tokenizer."""
    tokenizer = make_tokenizer("llama", TEXTS, vocab_size=300)
    make_family_model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
