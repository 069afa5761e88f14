"""Rows hold every sequence once, a token sees what leads to it alone, and models read them like single texts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.models.families import FAMILIES
from retention_bench.scoring import MAX_ANSWER_TOKENS, RetentionHFLM
from retention_bench.scoring import prefixes as prefixes_module
from retention_bench.scoring.prefixes import MAX_ROW_TOKENS, Row, rows

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=40)


def check(row: Row) -> None:
    """Every sequence is there; along its path a token sees the path up to itself; a beginning in common stands once."""
    visible = row.visible()
    for sequence, path in row.paths.items():
        assert tuple(row.tokens[index] for index in path) == sequence
        assert [row.positions[index] for index in path] == list(range(len(sequence)))
        for place, index in enumerate(path):
            assert visible[index].nonzero().flatten().tolist() == path[: place + 1]
    beginnings = {sequence[:length] for sequence in row.paths for length in range(1, len(sequence) + 1)}
    assert len(row.tokens) == len(beginnings)


@given(sequences, st.integers(1, 10))
def test_rows(sequences: list[tuple[int, ...]], most: int) -> None:
    found = list(rows(sequences, most))
    assert sorted(sequence for row in found for sequence in row.paths) == sorted(set(sequences))
    for row in found:
        check(row)
        assert len(row.paths) <= most


def test_a_row_is_not_too_long_unless_a_sequence_is() -> None:
    long = tuple(range(MAX_ROW_TOKENS + 88))
    others = [(1, *range(n, n + 200)) for n in (300, 600, 900)]
    found = list(rows([long, *others, long[:40]], 64))
    assert [len(row.tokens) for row in found] == [40, MAX_ROW_TOKENS + 88, 401, 201]
    for row in found:
        check(row)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_reads_rows_like_single_texts(
    family: str,
    make_family_model: Callable[..., PreTrainedModel],
    gpt2_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers equal `generate`, and log-probabilities equal plain lm-eval, which knows nothing of rows."""
    model = make_family_model(family, len(gpt2_tokenizer))
    monkeypatch.setattr(RetentionHFLM, "goes_on", lambda _, ids, length: ids[-1] % 3 != 0)
    monkeypatch.setattr(prefixes_module, "MAX_ROW_TOKENS", 40)
    places, verbs = ("France", "Italy", "Japan and Germany"), ("is", "was")
    prompts = [f"The capital of {place} {verb}" for place in places for verb in verbs]
    prompts += ["The capital", "Lyon", "Lyon lies in", "Rome is the city of"]
    prompts += [f"The capital of France is the city of Paris . A well known city in Italy {verb}" for verb in verbs]
    pairs = [(prompt, target) for prompt in prompts for target in (" Paris", " Guinea", " Gustav , the")]
    lm = RetentionHFLM(model, gpt2_tokenizer)
    assert len(lm.tok_encode(prompts[-1])) > 16  # the sliding window of those families that have one
    lm.prefetch(pairs)
    told = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    plain = HFLM(pretrained=model, tokenizer=gpt2_tokenizer, batch_size=1)
    expected = plain.loglikelihood(told, disable_tqdm=True)
    found = lm.loglikelihood(told, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    answers = lm.generate_until([Instance("generate_until", {}, (prompt, {}), 0) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(lm.tok_encode(prompt))
        with torch.inference_mode():
            for _ in range(MAX_ANSWER_TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] % 3 == 0:
                    break
        assert list(answer.token_ids) == ids[len(lm.tok_encode(prompt)) :]
    assert len({len(answer.token_ids) for answer in answers}) > 1
