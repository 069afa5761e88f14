"""A peft adapter on disk, put on a model and merged by peft itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from retention_bench.data import read_json
from retention_bench.errors import RetentionBenchError
from retention_bench.models.explain import explained
from retention_bench.models.loading import check_finite, check_regular

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

REPEATABLE = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora")
"""Ways to initialise LoRA that leave the base as it is, or change it the same way whenever the adapter is loaded.

The others change it at random, or by data that the adapter's folder doesn't have: pissa_niter_N, corda, loftq, lora_ga.
"""

_MATCHED_WITHIN_S = 5.0
_PLAIN = re.compile(r"[\w.\-]*")
# In a process of its own, since nothing else can end Python's matching.
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for form in (re.compile(pattern), re.compile(rf"(.*\\.)?({pattern})$")):
        for name in names:
            form.fullmatch(name), form.match(name)
"""


class AdapterConfig(pydantic.BaseModel):
    """What is looked at of an adapter's configuration; the rest is peft's affair.

    Attributes:
        peft_type: `LORA` and the like.
        base_model_name_or_path: The base model's folder or Hub id.
        revision: The base model's Hub revision.
        r: The rank.
        rank_pattern: Ranks of single modules.
        alpha_pattern: Scales of single modules.
        init_lora_weights: How it was initialised.
        alora_invocation_tokens: Of an adapter that is active behind these tokens alone.
        target_modules: Names, or a pattern.
        exclude_modules: The same.
        layers_pattern: The same.
    """

    model_config = pydantic.ConfigDict(extra="allow")
    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int | None = pydantic.Field(None, ge=1)
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True
    alora_invocation_tokens: list[int] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_pattern: str | list[str] | None = None


def adapter_config(folder: Path) -> AdapterConfig:
    """An adapter's configuration.

    Raises:
        RetentionBenchError: It is missing, no JSON object, or has something of the wrong kind.
    """
    return read_json(folder / CONFIG, AdapterConfig, "adapter's configuration")


def adapted(model: PreTrainedModel, folder: Path | str, *, allow_pickle: bool = False) -> PreTrainedModel:
    """A model with an adapter merged into it, as peft's `merge_and_unload` gives it; the model given is changed.

    Args:
        model: The base model.
        folder: What peft's `save_pretrained` wrote.
        allow_pickle: Whether an `adapter_model.bin` may be read where there are no safetensors.

    Raises:
        RetentionBenchError: A file is missing or broken, the adapter is for another base model, or it is one that
            cannot be merged, or not on the files at hand.
    """
    folder = Path(folder)
    config = adapter_config(folder)
    weights = _weights(folder, allow_pickle)
    _check(folder, config, weights)
    _check_patterns(folder, config, model)
    with explained(str(folder), "adapter"), torch.random.fork_rng():
        from peft import PeftModel

        torch.manual_seed(0)  # what an adapter's weights replace is drawn first
        whole: Any = PeftModel.from_pretrained(model, str(folder))
        if whole.active_peft_config.is_prompt_learning:
            raise RetentionBenchError(
                f"{folder} is an adapter of the prompt ({config.peft_type}), not of weights, and cannot be merged. "
                "Only adapters that can be are scored."
            )
        loaded = whole.load_adapter(str(folder), "default")
    if loaded.unexpected_keys or loaded.missing_keys:
        name = sorted([*loaded.unexpected_keys, *loaded.missing_keys])[0]
        raise RetentionBenchError(
            f"{folder}: its file and its configuration do not agree on {name}, which peft would pass over without a "
            "word. Save the adapter again where it was trained, or correct its configuration."
        )
    with explained(str(folder), "adapter"):
        merged: PreTrainedModel = whole.merge_and_unload()
    check_finite(merged, str(folder))
    return merged


def _weights(folder: Path, allow_pickle: bool) -> Path:
    path = folder / WEIGHTS
    if not path.exists() and (folder / PICKLED).exists():
        path = folder / PICKLED
        if not allow_pickle:
            raise RetentionBenchError(
                f"{folder} has only pickled weights ({PICKLED}), and loading those can run code. If you trust them, "
                "give `score` --allow-pickle, or save the adapter again with peft: that writes safetensors."
            )
    if not path.exists():
        raise RetentionBenchError(f"{folder} has no {WEIGHTS}. Save the adapter with save_pretrained.")
    check_regular(path)
    return path


def _check(folder: Path, config: AdapterConfig, weights: Path) -> None:
    """Refuse by name what peft would put on another base than it was trained on, or not merge at all."""
    initial = config.init_lora_weights
    if config.peft_type == "LORA" and (initial.lower() if isinstance(initial, str) else initial) not in REPEATABLE:
        raise RetentionBenchError(
            f"{folder} was initialised by {initial!r}, which changed the base model in a way that its files cannot "
            "repeat. Merge it with merge_and_unload where it was trained, and give the merged model."
        )
    if config.alora_invocation_tokens:
        raise RetentionBenchError(
            f"{folder} is an adapter that is active behind certain tokens alone (alora_invocation_tokens), and cannot "
            "be merged. Only adapters that can be are scored."
        )
    if weights.suffix == ".safetensors":
        try:
            with safe_open(weights, framework="pt") as file:
                shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise RetentionBenchError(f"{weights} is broken or cut off ({error}). Copy it again.") from error
        largest = max((size for shape in shapes for size in shape), default=0)
        asked = max([config.r or 0, *(config.rank_pattern or {}).values()])
        if asked > largest:  # peft would allocate it before it compares
            raise RetentionBenchError(
                f"{folder / CONFIG} has a rank of {asked}, and no tensor in {WEIGHTS} is that large. Correct the file."
            )


def _check_patterns(folder: Path, config: AdapterConfig, model: PreTrainedModel) -> None:
    """Match an adapter's patterns where they can be stopped, before peft does where they cannot.

    Raises:
        RetentionBenchError: One is no regular expression, or takes too long.
    """
    patterns = sorted({pattern for pattern in _patterns(config) if not _PLAIN.fullmatch(pattern)})
    if not patterns:
        return
    names = [name for name, _ in model.named_modules()]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _MATCH],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=_MATCHED_WITHIN_S,
        )
    except subprocess.TimeoutExpired as error:
        raise RetentionBenchError(
            f"{folder / CONFIG}: matching its patterns ({', '.join(map(repr, patterns))[:200]}) takes for ever. Write "
            "the modules' names out."
        ) from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it did not end"])[-1]
        raise RetentionBenchError(f"{folder / CONFIG}: a pattern is no regular expression ({reason[:200]}).")


def _patterns(config: AdapterConfig) -> Iterator[str]:
    """What peft takes for regular expressions; names in a list it compares as they are, but for layers_pattern."""
    for value in (config.target_modules, config.exclude_modules, config.layers_pattern):
        yield from [value] if isinstance(value, str) else value or ()
    extra = config.model_extra or {}
    for value in extra.values():
        if isinstance(value, str):
            yield value
    yield from config.rank_pattern or ()
    yield from config.alpha_pattern or ()
