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

_WHOLE = (".weight", ".base_layer.weight", ".token_adapter.base_layer.weight")
"""Ends of names under which peft keeps embeddings and heads that it saves whole."""

_SAVED_TWICE = re.compile(r".*\.(modules_to_save|original_module)\.weight")
_RANKED = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA")
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
        layer_replication: Which layers are used several times.
    """

    model_config = pydantic.ConfigDict(extra="allow")
    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True
    alora_invocation_tokens: list[int] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_pattern: str | list[str] | None = None
    layer_replication: list[Any] | None = None


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
        if rows := vocabulary(weights, model):
            model.resize_token_embeddings(rows)
        whole: Any = PeftModel.from_pretrained(model, str(folder))
        if whole.active_peft_config.is_prompt_learning:
            raise RetentionBenchError(
                f"{folder} is an adapter of the prompt ({config.peft_type}), not of weights, and cannot be merged. "
                "Only adapters that can be are scored."
            )
        loaded = whole.load_adapter(str(folder), "default")
    parameters = dict(whole.named_parameters(remove_duplicate=False))
    found = {id(tensor) for name, tensor in parameters.items() if name not in loaded.missing_keys}
    # What several modules share, as VB-LoRA's bank of vectors, stands in the file once.
    missing = [name for name in loaded.missing_keys if id(parameters.get(name)) not in found]
    # Where tokens were added, peft writes what modules_to_save replaces, and what replaces it, a second time.
    unexpected = [name for name in loaded.unexpected_keys if not (rows and _SAVED_TWICE.fullmatch(name))]
    if unexpected or missing:
        name = min([*unexpected, *missing])
        raise RetentionBenchError(
            f"{folder}: its file and its configuration do not agree on {name}, which peft would pass over without a "
            "word. Save the adapter again where it was trained, or correct its configuration."
        )
    if not hasattr(whole.base_model, "merge_and_unload"):
        raise RetentionBenchError(
            f"{folder} is an adapter ({config.peft_type}) that peft cannot merge. Only those that it can are scored."
        )
    with explained(str(folder), "adapter"):
        _part_head(whole)
        merged: PreTrainedModel = whole.merge_and_unload()
    check_finite(merged, str(folder))
    return merged


def vocabulary(weights: Path, model: PreTrainedModel) -> int | None:
    """How many tokens the embeddings in an adapter's file have, where the model's have another number.

    Tokens were added before it was trained; `AutoPeftModelForCausalLM` and lm-eval then resize the base as well.

    Args:
        weights: The adapter's file; of a pickle nothing is known.
        model: The base model.

    Raises:
        RetentionBenchError: The model has a head of its own, and only one of the two is in the file.
    """
    if weights.suffix != ".safetensors" or not weights.is_file():
        return None
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    matrices = {id(part.weight) for part in parts}
    names = {f"base_model.model.{name}" for name, one in model.named_modules() if any(one is part for part in parts)}
    keys = {f"{name}{end}": name for name in names for end in _WHOLE}
    with safe_open(weights, framework="pt") as file:
        found = keys.keys() & set(file.keys())
        shapes = {keys[key]: file.get_slice(key).get_shape() for key in sorted(found)}
    whole = {name: shape[0] for name, shape in shapes.items() if shape}
    ours = len(model.get_input_embeddings().get_parameter("weight"))
    other = {rows for rows in whole.values() if rows != ours}
    if not other:
        return None
    if len(other) > 1 or len(whole) < len(matrices):
        raise RetentionBenchError(
            f"{weights} has {max(other)} tokens in {', '.join(sorted(whole))}, the base model {ours}, and the other of "
            "embeddings and head is not in the file. Merge it with merge_and_unload where it was trained."
        )
    return max(other)


def _part_head(whole: Any) -> None:
    """Give a head that is tied to the embeddings a copy of its own where an adapter changes one of them alone.

    Training saw it so; merged into the tied matrix the adapter would change both.
    """
    head, embeddings = whole.get_output_embeddings(), whole.get_input_embeddings()
    bases = [getattr(part, "base_layer", part) for part in (head, embeddings)]
    if any(hasattr(part, "base_layer") for part in (head, embeddings)) and bases[0].weight is bases[1].weight:
        bases[0].weight = torch.nn.Parameter(bases[0].weight.detach().clone())


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
    if config.peft_type in _RANKED and config.r is not None and config.r < 1:
        raise RetentionBenchError(f"{folder / CONFIG}: r is {config.r}, and a rank is 1 or more. Correct the file.")
    if config.peft_type == "XLORA":
        raise RetentionBenchError(
            f"{folder} is an adapter that mixes others by the text (XLORA), and cannot be merged. Only adapters that "
            "can be are scored."
        )
    if config.layer_replication:
        raise RetentionBenchError(
            f"{folder} uses layers several times (layer_replication), and peft merges all changes into the one. Give "
            "an adapter without."
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
