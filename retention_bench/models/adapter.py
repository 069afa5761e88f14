"""A peft adapter on disk, LoRA or DoRA, merged into a stream of weights without a model."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from retention_bench.errors import RetentionBenchError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")


@dataclasses.dataclass(frozen=True)
class _Change:
    """What an adapter does to one weight: `down` [r, in], `up` [out, r], DoRA's `magnitude` [out]; all float32."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None
    scale: float


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank adapter (Hu et al. 2021; with magnitudes Liu et al. 2024) for weights by name.

    Attributes:
        changes: By the name of a weight, what is done to it.
        transposed: Whether weights are stored [in, out], as GPT-2's are.
        base: The base model's folder or Hub id, as the adapter's configuration has it.
    """

    changes: Mapping[str, Any]
    transposed: bool
    base: str | None

    @classmethod
    def load(cls, folder: Path | str) -> Adapter:
        """Read a folder that peft's `save_pretrained` wrote.

        Raises:
            RetentionBenchError: A file is missing or broken, or it is no LoRA or DoRA adapter of linear maps alone.
        """
        folder = Path(folder)
        config = adapter_config(folder)
        if not (folder / WEIGHTS).is_file():
            raise RetentionBenchError(
                f"{folder} has no {WEIGHTS}. Save the adapter with save_pretrained, as safetensors."
            )
        try:
            tensors = load_file(folder / WEIGHTS)
        except SafetensorError as error:
            raise RetentionBenchError(f"{folder / WEIGHTS} is broken or cut off ({error}). Copy it again.") from error
        trained = [key for key in ("modules_to_save", "layer_replication") if config.get(key)]
        unread = [name for name in tensors if not _KEY.fullmatch(name)]
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or trained or unread:
            what = unread or trained or [str(config.get("peft_type")), f"bias {config.get('bias')}"]
            raise RetentionBenchError(
                f"{folder} is no adapter of linear maps by LoRA or DoRA alone: {', '.join(what[:3])}. Merge it with "
                "peft's merge_and_unload and give the merged model."
            )
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise RetentionBenchError(f"{folder / WEIGHTS}: {name} has numbers that are not finite.")
            found = _KEY.fullmatch(name)
            assert found is not None  # all others were refused
            parts.setdefault(found[1], {})[found[2]] = tensor.float()
        changes = {f"{module}.weight": _change(folder, config, module, some) for module, some in parts.items()}
        return cls(changes, bool(config.get("fan_in_fan_out")), config.get("base_model_name_or_path"))

    def apply_to(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Merge into a stream of weights; the sum is taken in float32 and rounded once to the weight's dtype.

        Args:
            weights: Names and tensors, in any order. They are not changed.

        Yields:
            The same names, with the merged tensors in place of those that the adapter changes.

        Raises:
            RetentionBenchError: A shape differs, or the stream ended without one of the adapter's weights.
        """
        missing = set(self.changes)
        for name, tensor in weights:
            if name in self.changes:
                missing.discard(name)
                tensor = _merged(name, tensor, self.changes[name], self.transposed)
            yield name, tensor
        if missing:
            raise RetentionBenchError(
                f"The base model has no {sorted(missing)[0]}, which the adapter changes. Give the base model that it "
                "was trained on."
            )


def adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter's configuration.

    Raises:
        RetentionBenchError: It is missing or no JSON object.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RetentionBenchError(f"{folder / CONFIG} cannot be read ({error}).") from error
    if not isinstance(config, dict):
        raise RetentionBenchError(f"{folder / CONFIG} holds no JSON object.")
    return config


def _change(folder: Path, config: Mapping[str, Any], module: str, parts: Mapping[str, Tensor]) -> _Change:
    if not {"lora_A", "lora_B"} <= set(parts) or bool(config.get("use_dora")) != ("lora_magnitude_vector" in parts):
        raise RetentionBenchError(f"{folder / WEIGHTS}: {module} has only {', '.join(sorted(parts))}.")
    down, up = parts["lora_A"], parts["lora_B"]
    rank = down.shape[0]
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return _Change(down, up, parts.get("lora_magnitude_vector"), scale)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """As peft does it: the first pattern that ends the module's name."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _merged(name: str, weight: Tensor, change: _Change, transposed: bool) -> Tensor:
    rows, columns = change.up.shape[0], change.down.shape[1]
    if tuple(weight.shape) != ((columns, rows) if transposed else (rows, columns)):
        raise RetentionBenchError(
            f"The adapter of {name} is for a weight of {rows} outputs and {columns} inputs, and the base model's has "
            f"the shape {list(weight.shape)}. Give the base model that it was trained on."
        )
    whole = (weight.T if transposed else weight).float() + change.scale * (change.up @ change.down)
    if change.magnitude is not None:
        whole *= (change.magnitude / torch.linalg.vector_norm(whole, dim=1))[:, None]
    return (whole.T if transposed else whole).to(weight.dtype).contiguous()
