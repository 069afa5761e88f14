from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_bench.editors import EditRequest, finetune_loop
from retention_bench.editors.locate import value
from retention_bench.editors.locate.subject import context_rows, subject_rows, target_ids
from retention_bench.editors.malmen.steps import Question, batches
from retention_bench.errors import RetentionBenchError, UsageError

words = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=8)
phrases = st.lists(words, min_size=1, max_size=3).map(" ".join).filter(lambda text: "{}" not in text)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@settings(deadline=None, max_examples=60)
@given(before=st.just("") | phrases, subject=phrases, after=phrases, repeat=st.booleans())
def test_tokens_up_to_the_index_end_with_the_subject(request, family, before, subject, after, repeat):
    _, tokenizer = request.getfixturevalue(family)
    before = f"{before} {subject} " if repeat else f"{before} ".lstrip()
    text = f"{before}{subject} {after}"
    [row] = subject_rows(tokenizer, [before + "{} " + after], [EditRequest("f", "{}", subject, "x")])
    assert list(row.ids) == tokenizer.encode(text)
    decoded = tokenizer.decode(row.ids[: row.subject + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert decoded == before + subject


def test_a_bos_token_moves_the_index(gpt2, llama):
    request = EditRequest("f", "{} plays", "Mira", "x")
    for (_, tokenizer), bos in ((gpt2, 0), (llama, 1)):
        [row] = subject_rows(tokenizer, ["{} plays"], [request])
        assert row.subject == bos + len(tokenizer.encode("Mira", add_special_tokens=False)) - 1


def test_the_tokenizers_padding_side_has_no_part(llama):
    _, tokenizer = llama
    requests = [
        EditRequest("f", "{} plays the", "Mira", "x"),
        EditRequest("g", "In the old town {} plays", "Jon Ek", "x"),
    ]
    right = context_rows(tokenizer, ["And so. {}"], requests)
    tokenizer.padding_side = "left"
    try:
        assert context_rows(tokenizer, ["And so. {}"], requests) == right
    finally:
        tokenizer.padding_side = "right"


def test_rows_come_by_request_with_the_bare_prompt_first(llama):
    _, tokenizer = llama
    requests = [EditRequest("f", "{} plays the", "Mira", "x"), EditRequest("g", "Here {{x}} is {}", "Jon", "x")]
    rows = context_rows(tokenizer, ["A {brace}. {}", "B. {}"], requests)
    texts = [[tokenizer.decode(row.ids, skip_special_tokens=True) for row in group] for group in rows]
    assert texts == [
        ["Mira plays the", "A {brace}. Mira plays the", "B. Mira plays the"],
        ["Here {{x}} is Jon", "A {brace}. Here {{x}} is Jon", "B. Here {{x}} is Jon"],
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("target", ["violin", " violin", "Old Corish"])
def test_a_target_has_one_space_before_it_and_no_special_token(request, family, target):
    _, tokenizer = request.getfixturevalue(family)
    ids = target_ids(tokenizer, EditRequest("f", "{} is", "Mira", target))
    assert tokenizer.decode(ids) == f" {target.strip()}"


def test_a_numbers_lone_space_is_trained_with_it_by_every_editor(make_tokenizer):
    tokenizer = make_tokenizer("llama", ["Mira was born in"] * 3, digits=True)
    request = EditRequest("f", "{} was born in", "Mira", "1984")
    prompt = tokenizer.encode("Mira was born in")
    whole = tokenizer.encode("Mira was born in 1984")
    target = target_ids(tokenizer, request)
    assert tokenizer.convert_ids_to_tokens(target) == ["Ġ", *"1984"]
    assert prompt + target == whole
    [row] = finetune_loop._rows(tokenizer, request, "target")
    assert (row.ids, row.targets) == (whole[:-1], target)
    assert row.positions == [len(prompt) - 1 + place for place in range(len(target))]
    assert value._Fact.of(tokenizer, request, ()).target == target
    [batch] = batches(tokenizer, [Question("f", "Mira was born in", "1984")], 1, torch.device("cpu"))
    assert batch.ids[0].tolist() == whole[:-1]
    assert batch.labels[batch.answers].tolist() == target


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UsageError, match="not a fast tokenizer"):
        subject_rows(SimpleNamespace(is_fast=False), ["{}"], [EditRequest("f", "{}", "Mira", "x")])


def test_a_subject_without_tokens_is_refused(gpt2):
    _, tokenizer = gpt2

    class Dropping:
        is_fast = True

        def __call__(self, texts, return_offsets_mapping):
            encoded = tokenizer(texts, return_offsets_mapping=True)
            return {"input_ids": [[0]] * len(texts), "offset_mapping": [[(0, 0)]] * len(encoded["input_ids"])}

    with pytest.raises(RetentionBenchError, match="Fact 'f7': the tokenizer has no token for the subject 'Mira'"):
        subject_rows(Dropping(), ["{} is"], [EditRequest("f7", "{} is", "Mira", "x")])
