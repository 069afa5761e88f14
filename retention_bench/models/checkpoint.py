"""A checkpoint's weights as a stream: what a model needs of it, and one read from a folder with an edit on top."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from retention_bench.errors import RetentionBenchError
from retention_bench.models.adapter import Adapter
from retention_bench.models.delta import WeightDelta


@dataclasses.dataclass(frozen=True)
class Layout:
    """The weights that a model consists of, known from its config alone.

    Attributes:
        shapes: By name, as `save_pretrained` writes them; tied weights are among them. The names are those of
            `model.state_dict()`, but for GPT-NeoX' head.
        tied: Names of weights that are another one's tensor, as a tied head; a checkpoint may leave them out.
        prefix: What a checkpoint of the bare model, without head, leaves off the names.
        ignored: Patterns of names that old checkpoints have and, where they aren't among `shapes`, nobody needs.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]
    prefix: str
    ignored: tuple[str, ...]

    @classmethod
    def of(cls, config: PretrainedConfig) -> Layout:
        """The layout of the causal language model that a config describes; nothing is allocated."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        everything = model.state_dict()
        own = {name: tensor for name, tensor in everything.items() if name not in model.all_tied_weights_keys}
        shapes = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, everything).items()}
        return cls(
            shapes=shapes,
            tied=frozenset(shapes.keys() - revert_weight_conversion(model, own).keys()),
            prefix=f"{model.base_model_prefix}.",
            ignored=tuple(sorted(model._keys_to_ignore_on_load_unexpected or ())),
        )

    def check(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass a model's weights through, each checked before it is handed on, and without the tied ones.

        Args:
            weights: Names and tensors, in any order.

        Yields:
            The same pairs; where a weight is tied, only the one that it is tied to.

        Raises:
            RetentionBenchError: A name is not known, a shape differs, or the stream ended without a weight.
        """
        missing = set(self.shapes) - self.tied
        for name, tensor in weights:
            if name not in self.shapes:
                near = difflib.get_close_matches(name, self.shapes, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise RetentionBenchError(f"The model has no weight {name!r}.{hint} {_SAME_MODEL}")
            if tuple(tensor.shape) != self.shapes[name]:
                raise RetentionBenchError(
                    f"The weight {name} has the shape {list(tensor.shape)}; the model's has "
                    f"{list(self.shapes[name])}. {_SAME_MODEL}"
                )
            missing.discard(name)
            if name not in self.tied:
                yield name, tensor
        if missing:
            raise RetentionBenchError(
                f"The weights ended without {len(missing)} that the model needs, {min(missing)} among them. "
                f"{_SAME_MODEL}"
            )


_SINGLE, _PICKLE = "model.safetensors", "pytorch_model.bin"
_SAME_MODEL = "Give the weights of a model of the same config, whole."


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The weights in a model folder, with an edit or an adapter on top, read anew whenever they are iterated over.

    It can be pickled, and is small then: another process reads the files itself.

    Attributes:
        folder: A folder with safetensors files, as `save_pretrained` writes it.
        layout: Of the model in it.
        delta: File of a `WeightDelta` for that model; None for the model as it is.
        dtype: What the weights are converted to, before anything is added.
        adapter: Folder of a peft adapter for that model.
        allow_pickle: Also read a `pytorch_model.bin`; loading one of an unknown origin is a risk.
    """

    folder: str
    layout: Layout
    delta: str | None = None
    dtype: torch.dtype = torch.float32
    adapter: str | None = None
    allow_pickle: bool = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """The names of `layout`, and tensors on the CPU; one at a time is held.

        Raises:
            RetentionBenchError: The folder has no safetensors files or broken ones, a number is not finite, or the
                delta or the adapter does not fit.
        """
        weights: Iterator[tuple[str, Tensor]] = ((name, tensor.to(self.dtype)) for name, tensor in self._named())
        if self.delta is not None:
            weights = WeightDelta.load(self.delta).apply_to(weights)
        if self.adapter is not None:
            weights = Adapter.load(self.adapter).apply_to(weights)
        for name, tensor in weights:
            if not tensor.isfinite().all():
                raise RetentionBenchError(
                    f"{name} in {self.folder} has numbers that are not finite. The file is damaged, or the training "
                    "that made it diverged: make it again."
                )
            yield name, tensor

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """The stored weights under their names within the whole model."""
        shapes = self.layout.shapes
        for name, tensor in self._stored():
            full = self.layout.prefix + name
            if name not in shapes and full in shapes:
                yield full, tensor
            elif name in shapes or not any(re.search(pattern, name) for pattern in self.layout.ignored):
                yield name, tensor

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        for path in self._files():
            if path.suffix == ".bin":
                yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - no mapping
                        yield name, file.get_tensor(name)
            except (SafetensorError, FileNotFoundError) as error:
                raise RetentionBenchError(
                    f"{path} could not be read as safetensors ({error}). Make it again."
                ) from error

    def _files(self) -> list[Path]:
        folder = Path(self.folder)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise RetentionBenchError(f"{index} is no index of weights ({error!r}). Make it again.") from error
            for part in parts:
                if Path(part).name != part:
                    raise RetentionBenchError(f"{index} names {part!r}, which is not beside it. Make it again.")
            return [folder / part for part in parts]
        if (folder / _PICKLE).is_file() and not (folder / _SINGLE).is_file():
            if self.allow_pickle:
                return [folder / _PICKLE]
            raise RetentionBenchError(
                f"{folder} has only pickled weights ({_PICKLE}), and loading those can run code. If you trust them, "
                "give --allow-pickle, or save them again with transformers' save_pretrained: that writes safetensors."
            )
        return [folder / _SINGLE]
