import pytest

from retention_bench.errors import RetentionBenchError
from retention_bench.facts import Fact
from retention_bench.finetune import Terms, TuningContext, make_finetune

from .conftest import WORDS

FACTS = [
    Fact(f"f{n}", f"{WORDS[n % 13]} {n}", "colour", "The colour of {} is", f"{WORDS[n % 5]} {WORDS[n % 3]}")
    for n in range(30)
]


def prepare(tokenizer, terms=None, seed=0, facts=FACTS, **settings):
    defaults = {"source": "facts.jsonl", "train_size": 8, "validation_size": 3, "threshold": 0.7, "max_steps": 5}
    return make_finetune("counterfact", defaults | settings).prepare(
        TuningContext(tokenizer, terms or Terms(), seed, facts)
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_is_on_the_object_alone(family, request):
    tokenizer = request.getfixturevalue(f"{family}_tokenizer")
    told = {f"{fact.question} {fact.target_true}": fact for fact in FACTS}
    for row in prepare(tokenizer).train:
        fact = told[tokenizer.decode(row.input_ids, skip_special_tokens=True)]
        targets = [token for token in row.labels if token != -100]
        assert tokenizer.decode(targets) == f" {fact.target_true}"
        assert row.labels == [-100] * (len(row.input_ids) - len(targets)) + row.input_ids[-len(targets) :]
        assert row.input_ids[: -len(targets)] == tokenizer.encode(fact.question)


def test_a_numbers_lone_space_is_part_of_the_object(make_tokenizer):
    tokenizer = make_tokenizer("llama", ["Mira was born in"] * 3, digits=True)
    fact = Fact("f", "Mira", "born", "{} was born in", "1984")
    [row] = prepare(tokenizer, facts=[fact], train_size=1, validation_size=1).train
    assert row.input_ids == tokenizer.encode("Mira was born in 1984")
    assert tokenizer.convert_ids_to_tokens([token for token in row.labels if token != -100]) == ["Ġ", *"1984"]


def test_the_validation_rows_are_training_rows_and_the_seed_decides(gpt2_tokenizer):
    once, again, other = (prepare(gpt2_tokenizer, seed=seed) for seed in (0, 0, 1))
    assert (len(once.train), len(once.validation)) == (8, 3)
    assert all(row in once.train for row in once.validation)
    assert once == again
    assert once.train != other.train


@pytest.mark.parametrize("term", ["green", "red 13", "colour"])
def test_facts_that_mention_an_edited_or_intrinsic_one_are_left_out(gpt2_tokenizer, term):
    mentioning = [fact for fact in FACTS if term in f"{fact.question} {fact.target_true}"]
    clean = len(FACTS) - len(mentioning)
    terms = Terms(keywords=(term,))
    if clean:
        rows = prepare(gpt2_tokenizer, terms, train_size=clean).train
        assert not any(term in gpt2_tokenizer.decode(row.input_ids) for row in rows)
    with pytest.raises(
        RetentionBenchError,
        match=f"facts.jsonl holds 30 facts that the base model does not answer; {len(mentioning)} of them mention "
        f".*fact. That leaves {clean}, and train_size is {clean + 1}",
    ):
        prepare(gpt2_tokenizer, terms, train_size=clean + 1, validation_size=1)


def test_a_fact_that_does_not_fit_is_left_out_not_cut(gpt2_tokenizer):
    longest = max(len(row.input_ids) for row in prepare(gpt2_tokenizer, train_size=30).train)
    rows = prepare(gpt2_tokenizer, max_length=longest - 1).train
    assert max(len(row.input_ids) for row in rows) < longest
    with pytest.raises(RetentionBenchError, match="30 do not fit into max_length 4"):
        prepare(gpt2_tokenizer, max_length=4)


def test_a_model_that_answers_everything_leaves_nothing_to_learn(gpt2_tokenizer):
    with pytest.raises(RetentionBenchError, match="holds 0 facts that the base model does not answer"):
        prepare(gpt2_tokenizer, facts=())


def test_a_tokenizer_without_eos_or_padding_will_do(gpt2_tokenizer):
    gpt2_tokenizer.eos_token = None
    assert gpt2_tokenizer.pad_token is None
    assert len(prepare(gpt2_tokenizer).train) == 8
