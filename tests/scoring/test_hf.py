"""RetentionHFLM against `model.generate`, against plain lm-eval, and independent of its batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.errors import RetentionBenchError
from retention_bench.scoring import MAX_DECODED_TOKENS, RetentionHFLM
from retention_bench.scoring.model import check_greedy

PROMPTS = [
    "The capital of France is",
    "A well known city in Italy is",
    "Lyon",
    "Japan was born in",
    "The city of Berlin and",
    "Germany speaks",
    "Paris lies in Italy , also called",
    "Lyon",
    "Guinea , Guatemala and Gustav",
    "Rome is the",
]

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(params=["gpt2", "llama"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return request.getfixturevalue(request.param), request.getfixturevalue(f"{request.param}_tokenizer")


def requests(prompts: list[str]) -> list[Instance]:
    settings = {"do_sample": False, "until": [], "max_gen_toks": MAX_DECODED_TOKENS}
    return [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, dict(settings)), idx=i)
        for i, prompt in enumerate(prompts)
    ]


def answers(loaded: Loaded, **settings: int) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in RetentionHFLM(*loaded, **settings).generate_until(requests(PROMPTS))]


def greedy(loaded: Loaded, prompt: str) -> list[int]:
    model, tokenizer = loaded
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        do_sample=False,
        max_new_tokens=MAX_DECODED_TOKENS,
        pad_token_id=0,
    )
    return output[0, inputs.input_ids.shape[1] :].tolist()


# Random models say few stop words. So that rows go on for different lengths and leave the batch in between, these rules
# take a share of the vocabulary for stop tokens.
@pytest.mark.parametrize("share", [lambda token: token % 3 != 0, lambda _: True, lambda _: False])
def test_answers_are_what_generate_decodes_up_to_the_first_content_token(
    loaded: Loaded, share: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = loaded[1].eos_token_id
    monkeypatch.setattr(
        RetentionHFLM, "goes_on", lambda _, ids, __: share(ids[-1]) and ids[-1] != end and len(ids) < MAX_DECODED_TOKENS
    )
    for prompt, answer in zip(PROMPTS, answers(loaded), strict=True):
        reference = greedy(loaded, prompt)  # ends after an end-of-text token, too
        content = (i for i, token in enumerate(reference) if not share(token))
        assert list(answer) == reference[: next(content, MAX_DECODED_TOKENS) + 1]


def test_answers_do_not_depend_on_the_batch_size(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetentionHFLM, "goes_on", lambda _, ids, __: ids[-1] % 3 != 0 and len(ids) < MAX_DECODED_TOKENS)
    together = answers(loaded, batch_size=64)
    assert len({len(answer) for answer in together}) > 2  # the rows did leave at different times
    assert answers(loaded, batch_size=1) == together
    assert answers(loaded, batch_size=3) == together


def test_prompts_reach_the_model_as_from_plain_lm_eval(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetentionHFLM, "goes_on", lambda *_: False)
    model, tokenizer = loaded
    plain = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1)
    expected = [plain.tok_batch_encode([prompt])[0].tolist() for prompt in PROMPTS]
    lm, seen = RetentionHFLM(model, tokenizer), []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].tolist()), with_kwargs=True
    )
    for prompt in PROMPTS:
        lm.generate_until(requests([prompt]))
    hook.remove()
    assert seen == expected


def test_a_prompt_without_room_for_an_answer_is_refused(loaded: Loaded) -> None:
    lm = RetentionHFLM(*loaded)
    fits = "city of " * 60
    with pytest.raises(RetentionBenchError, match="context 64"):
        lm.generate_until(requests([fits]))


def test_a_token_that_the_model_does_not_know_is_refused(loaded: Loaded) -> None:
    lm = RetentionHFLM(*loaded)
    assert lm.vocabulary == loaded[0].config.vocab_size
    lm.vocabulary = max(lm.tok_encode("The sky is"))
    with pytest.raises(RetentionBenchError, match="gives 'The sky is' the token .*own tokenizer"):
        lm.generate_until(requests(["The sky is"]))


def test_progress_counts_distinct_prompts(loaded: Loaded) -> None:
    seen: list[tuple[str, int, int]] = []
    lm = RetentionHFLM(
        *loaded, batch_size=4, progress=lambda stage, done, total, figures=None: seen.append((stage, done, total))
    )
    lm.generate_until(requests(PROMPTS))
    distinct = len(set(PROMPTS))
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
    assert seen[-1] == ("scoring", distinct, distinct)


def test_a_dropout_model_answers_the_same_every_time(
    gpt2: PreTrainedModel, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    gpt2.train()
    first = answers((gpt2, gpt2_tokenizer))
    assert answers((gpt2, gpt2_tokenizer)) == first
    assert not torch.is_inference_mode_enabled()


def test_an_answer_ends_at_every_end_token_of_the_model(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3, Phi 3 and Gemma have several, and not all of them are special tokens."""
    model, tokenizer = loaded
    before = answers(loaded)
    longest = max(before, key=len)
    assert len(longest) > 1  # it went on past a stop word
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, longest[0]])
    after = answers(loaded)
    assert after == [ids[: ids.index(longest[0]) + 1] if longest[0] in ids else ids for ids in before]
    assert after != before


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"suppress_tokens": [3]}, "suppress_tokens to \\[3\\]"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"min_new_tokens": 3}, "min_new_tokens"),
        ({"num_beams": 4}, "num_beams"),
        ({"forced_eos_token_id": 3}, "forced_eos_token_id"),
        ({"token_healing": True}, "token_healing"),
        ({"max_time": 0.001}, "max_time"),
        ({"repetition_penalty": 1.2, "eos_token_id": [1, 2], "temperature": 0.5}, None),
        ({}, None),
    ],
)
def test_generation_settings_that_change_greedy_answers_are_named(settings: dict[str, Any], named: str | None) -> None:
    """Those that plain lm_eval would apply to the retention tasks, and cannot be told not to."""
    config = GenerationConfig(**settings)
    if named is None:
        check_greedy(config, "model")
    else:
        with pytest.raises(RetentionBenchError, match=f"generation_config.json of model sets {named}"):
            check_greedy(config, "model")
