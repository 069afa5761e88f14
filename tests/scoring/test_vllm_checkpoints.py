"""Checkpoints of all kinds in vLLM say what transformers and peft make of the same files, or are refused by name."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.errors import RetentionBenchError
from retention_bench.facts import FactSet
from retention_bench.models import Checkpoint, load_tokenizer
from retention_bench.scoring import score, score_lm
from retention_bench.scoring.vllm import VLLMEngine

from ..checkpoints import (
    EMBEDDINGS,
    GENERATION,
    KINDS,
    LAYOUTS,
    family_of,
    head_of_its_own,
    lora,
    make_adapter,
    make_adapter_with_vocabulary,
    theirs,
)
from .conftest import WIDE, engine_test, one_token

PROMPTS = ("The capital of France is", "Rome lies in", "Japan was born in the city of Paris and")
ANSWERS = (" Paris", " Rome", " Italy", " is", " born")
APART = "was trained apart from the embeddings.*--backend hf"
REFUSED = {
    ("gpt2", "head"): APART,  # by its own configuration, which vLLM makes the model from, the head is tied
    ("gpt2", "init-olora"): "could not be loaded",  # which peft itself cannot merge
}
ROUNDING = 1e-4
"""Nats. vLLM's kernels on the CPU add up in another order than torch's: in float32 the largest difference of all below
was 2e-5."""


@pytest.fixture(scope="module", params=sorted(WIDE))
def base(
    request: pytest.FixtureRequest,
    make_family_model: Callable[..., PreTrainedModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A saved model: a GPT-2 whose head is tied, or a Llama whose head is its own."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = request.getfixturevalue(f"{request.param}_tokenizer")
    make_family_model(request.param, len(tokenizer), **WIDE[request.param]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def running(folder: Path, **settings: Any) -> Iterator[VLLMEngine]:
    """An engine as `score` starts it: without weights."""
    with contextlib.closing(VLLMEngine(folder, device="cpu", load_format="dummy", **settings)) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[VLLMEngine]:
    with running(base) as engine:
        yield engine


def wanted(model: Any, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Log-probabilities of the answers' only tokens in nats [prompts x answers], of a model of transformers or peft."""
    with torch.no_grad():
        last = [model(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1] for prompt in PROMPTS]
    rows = torch.stack(last).float().log_softmax(-1)
    return rows[:, [one_token(answer, tokenizer) for answer in ANSWERS]].flatten()


def distance(engine: VLLMEngine, checkpoint: Checkpoint, expected: Any) -> float:
    """How far the answers' log-probabilities are from those of a model, in nats, at the most."""
    engine.swap(checkpoint)
    told = [Instance("loglikelihood", {}, (prompt, answer), 0) for prompt in PROMPTS for answer in ANSWERS]
    found = torch.tensor([logprob for logprob, _ in engine.lm.loglikelihood(told, disable_tqdm=True)])
    return (found - wanted(expected, engine.lm.tokenizer)).abs().max().item()


@engine_test
@pytest.mark.parametrize("change", LAYOUTS, ids=lambda change: change.__name__)
def test_a_folder_is_read_as_transformers_reads_it(
    base: Path, engine: VLLMEngine, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """What is stored in half precision is computed in float32 on both sides."""
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    before = ties(folder)
    change(folder)
    with running(folder) if ties(folder) != before else contextlib.nullcontext(engine) as its_own:
        if change is head_of_its_own and ties(folder):
            with pytest.raises(RetentionBenchError, match=APART):
                its_own.swap(Checkpoint(str(folder)))
        else:
            assert distance(its_own, Checkpoint(str(folder)), theirs(folder)) < ROUNDING


def ties(folder: Path) -> bool:
    """Whether a folder's configuration ties head and embeddings."""
    return bool(AutoConfig.from_pretrained(folder).tie_word_embeddings)


@engine_test
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_put_on_as_peft_does(base: Path, engine: VLLMEngine, tmp_path: Path, kind: str) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", lora(base, **KINDS[kind]))
    checkpoint = Checkpoint(str(base), adapter=str(adapter))
    if (family_of(base), kind) in REFUSED:
        with pytest.raises(RetentionBenchError, match=REFUSED[family_of(base), kind]):
            engine.swap(checkpoint)
        return
    expected = PeftModel.from_pretrained(theirs(base), adapter).eval()
    assert distance(engine, checkpoint, expected) < ROUNDING
    assert distance(engine, Checkpoint(str(base)), expected) > 1000 * ROUNDING


@engine_test
@pytest.mark.parametrize("which", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["embeddings", "head", "both"])
def test_an_adapter_on_embeddings_and_head(base: Path, engine: VLLMEngine, tmp_path: Path, which: slice) -> None:
    config = lora(base, target_modules=EMBEDDINGS[family_of(base)][which], fan_in_fan_out=False)
    adapter = make_adapter(base, tmp_path / "adapter", config)
    checkpoint = Checkpoint(str(base), adapter=str(adapter))
    if ties(base):
        with pytest.raises(RetentionBenchError, match=APART):
            engine.swap(checkpoint)
    else:
        assert distance(engine, checkpoint, PeftModel.from_pretrained(theirs(base), adapter).eval()) < ROUNDING


@engine_test
@pytest.mark.parametrize("added", [5, -20])
def test_an_adapter_that_was_trained_with_another_vocabulary_is_refused(
    base: Path, engine: VLLMEngine, tmp_path: Path, added: int
) -> None:
    """An engine's model has the size that its configuration says."""
    for saved in (False, True):
        folder = tmp_path / f"adapter-{saved}"
        make_adapter_with_vocabulary(base, folder, added, saved=saved)
        with pytest.raises(RetentionBenchError, match="has the shape|" + APART):
            engine.swap(Checkpoint(str(base), adapter=str(folder)))


@engine_test
@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 0.2), (torch.float16, 0.03)])
def test_in_half_precision_too(base: Path, dtype: torch.dtype, rounding: float) -> None:
    """The differences were 0.062 and 0.009 nats."""
    with running(base, dtype=dtype) as engine:
        assert distance(engine, Checkpoint(str(base), dtype=dtype), theirs(base, dtype)) < rounding


@engine_test
@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION)
def test_generation_settings_change_no_answers(
    base: Path, tmp_path: Path, facts: FactSet, settings: dict[str, object]
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with running(folder) as engine:
        engine.swap(Checkpoint(str(folder)))
        found = [sample.token_ids for sample in score_lm(engine.lm, facts)]
        assert found == [sample.token_ids for sample in score(theirs(folder), engine.lm.tokenizer, facts)]
        if "repetition_penalty" in settings:  # which texts for tasks of lm-eval's own depend on
            own = Instance("generate_until", {}, ("Rome", {"max_gen_toks": 2}), 0, metadata=("own", 0, 1))
            with pytest.raises(RetentionBenchError, match="repetition_penalty to 1.1, which vLLM applies otherwise"):
                engine.lm.generate_until([own])


@engine_test
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_answers_end_at_every_end_token(base: Path, tmp_path: Path, facts: FactSet) -> None:
    tokenizer = load_tokenizer(str(base))
    going_on = [sample.token_ids for sample in score(theirs(base), tokenizer, facts)]
    first = next(ids[0] for ids in going_on if len(ids) > 1)
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_token_id, first]}))
    with running(folder) as engine:
        engine.swap(Checkpoint(str(folder)))
        found = [sample.token_ids for sample in score_lm(engine.lm, facts)]
    assert (first,) in found
    assert found == [ids[:1] if ids[0] == first else ids for ids in going_on]


@engine_test
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_settings_that_change_greedy_answers_are_refused(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": [5], "repetition_penalty": 1.1}))
    with running(folder) as engine, pytest.raises(RetentionBenchError, match="sets suppress_tokens to .5., which"):
        engine.swap(Checkpoint(str(folder)))
