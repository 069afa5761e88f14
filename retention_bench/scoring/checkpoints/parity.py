"""Ask a model of the engine's what a freshly loaded one is asked, before anything that it says is believed."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retention_bench.errors import RetentionBenchError
from retention_bench.facts import FactSet

if TYPE_CHECKING:
    from retention_bench.models import Checkpoint
    from retention_bench.scoring.engine import Engine

PARITY_PROMPTS = 16
PARITY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
"""How far log-probabilities of targets may be from those of a fresh model, in nats: in float32 each of them, in half
precision the median. There two ways to the same number differ by some rounding at every layer, and in bfloat16 a logit
of 64 or more is itself a multiple of 0.5, so single ones say little."""


class MismatchError(RetentionBenchError):
    """The engine does not say what a fresh model says."""


def check_parity(
    engine: Engine, name: str, checkpoint: Checkpoint, facts: FactSet, *, backend: str, device: str
) -> dict[str, Any]:
    """Ask a fresh model the same as the engine, with lm-eval's own code.

    Args:
        engine: Answers with the checkpoint.
        name: What the checkpoint is called.
        checkpoint: The checkpoint.
        facts: What it can be asked.
        backend: What the engine is, `"hf"` or `"vllm"`.
        device: Where the engine's model is.

    Returns:
        How far apart the two are, as JSON values.

    Raises:
        MismatchError: Log-probabilities of targets differ by more than rounding explains; or, in float32, an answer
            does at all.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from retention_bench.scoring import score_lm
    from retention_bench.scoring.quiet_lm_eval import quiet_lm_eval

    ours = score_lm(engine.lm, _few(facts, PARITY_PROMPTS), kinds=("edited", "intrinsic", "intrinsic_matched"))
    # On a GPU vLLM leaves no room for another model.
    model, tokenizer = fresh_model(checkpoint, "cpu" if backend == "vllm" else device)
    with quiet_lm_eval():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=PARITY_PROMPTS, softmax_dtype="float32")
        told = [Instance("loglikelihood", {}, (sample.prompt, f" {sample.target}"), 0) for sample in ours]
        theirs = [logprob for logprob, _ in lm.loglikelihood(told, disable_tqdm=True)]
        answers = [(("", ""), lm.tok_encode(sample.prompt), list(sample.token_ids)) for sample in ours]
        equal = [greedy for _, greedy in lm._loglikelihood_tokens(answers, disable_tqdm=True)]
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    tolerance = PARITY_TOLERANCE[dtype]
    distance = [_distance(a.logprob, b) for a, b in zip(ours, theirs, strict=True)]
    exact = dtype == "float32"
    wrong = [a.prompt for a, d in zip(ours, distance, strict=True) if d > tolerance]
    if wrong and (exact or statistics.median(distance) > tolerance):
        raise MismatchError(
            f"{name}: of {len(ours)} prompts {len(wrong)} get other log-probabilities from the "
            f"{backend} engine than from a freshly loaded model, by up to {max(distance):.3g} nats, "
            f"where {dtype} explains {tolerance:g}: {'; '.join(map(repr, wrong[:5]))}. "
            "Nothing it says of such a checkpoint can be trusted. Try --backend hf, or --dtype float32."
        )
    wrong = [a.prompt for a, same in zip(ours, equal, strict=True) if not same]
    if wrong and exact:
        raise MismatchError(
            f"{name}: of {len(ours)} prompts {len(wrong)} get other answers from the {backend} "
            f"engine than from a freshly loaded model: {'; '.join(map(repr, wrong[:5]))}. "
            "Nothing it says of such a checkpoint can be trusted. Try another --backend."
        )
    return {
        "checkpoint": name,
        "prompts": len(ours),
        "equal_answers": sum(equal),
        "logprob_distance": max(distance),
        "logprob_distance_median": statistics.median(distance),
        "tolerance": tolerance,
    }


def fresh_model(checkpoint: Checkpoint, device: str) -> tuple[Any, Any]:
    """The checkpoint as transformers and peft load it, and nothing of ours: also the sum of a delta is taken here."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from retention_bench.models.adapter import WEIGHTS, vocabulary
    from retention_bench.models.explain import without_bars

    folder = checkpoint.folder
    with without_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=checkpoint.dtype,
            use_safetensors=None if checkpoint.allow_pickle else True,
            trust_remote_code=False,
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.tokenizer or folder, trust_remote_code=False)
    if checkpoint.delta:
        with safe_open(checkpoint.delta, framework="pt") as file, torch.no_grad():
            names = sorted(file.keys())
            for name in names:
                parameter, _, part = name.rpartition(":")
                if part == "right":
                    continue
                added = file.get_tensor(name).float()
                if part == "left":
                    added = added @ file.get_tensor(f"{parameter}:right").float()
                weight = model.get_parameter(parameter)
                weight.copy_(weight.float() + added)
    if checkpoint.adapter:
        from peft import PeftModel

        if rows := vocabulary(Path(checkpoint.adapter) / WEIGHTS, model):
            model.resize_token_embeddings(rows)  # as lm-eval does
        model = PeftModel.from_pretrained(model, checkpoint.adapter)  # as it is, not merged
    model.tie_weights = lambda *_, **__: None  # lm-eval would tie a head that was trained apart
    return model.to(device).eval(), tokenizer


def _few(facts: FactSet, count: int) -> FactSet:
    """Some facts, spread over all of them, and not their paraphrases and neighbours."""
    chosen = facts.facts[:: max(1, len(facts) // count)][:count]
    return FactSet.of(dataclasses.replace(fact, paraphrases=(), neighborhood=()) for fact in chosen)


def _distance(ours: float | None, theirs: float) -> float:
    """In nats; a log-probability that is no number has become None on our side."""
    if ours is None:
        return float("inf") if math.isfinite(theirs) else 0.0
    return abs(ours - theirs) if math.isfinite(theirs) else float("inf")
