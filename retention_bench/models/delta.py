"""`WeightDelta`: what an edit adds to a model's weights. A checkpoint is the base model plus one of these."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor
from transformers import PreTrainedModel

from retention_bench.errors import RetentionBenchError, unknown_name
from retention_bench.models.families import family
from retention_bench.models.files import REAL, read_tensors, write_tensors

_KIND = "weight delta"
_VERSION = 1


class _About(pydantic.BaseModel):
    """What stands beside a delta's tensors."""

    base: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix as the product of two thin ones.

    Attributes:
        left: [a, r], float32.
        right: [r, b], float32.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the product."""
        return torch.Size((self.left.shape[0], self.right.shape[1]))


@dataclasses.dataclass(frozen=True, eq=False)
class WeightDelta:
    """Summands for some of a model's parameters, each in the orientation that the parameter is stored in.

    Tensors are kept on the CPU in float32. Two deltas for the same base add up with `+`.

    Attributes:
        entries: By parameter name, a dense tensor of the parameter's shape or a `LowRank` of that shape.
        base: The model it belongs to, by name or hash, for people; None where not known.

    Raises:
        RetentionBenchError: Low-rank factors that do not fit, a tensor that is empty or of other than real numbers, or
            a number that is not finite in float32; the parameter is named.
    """

    entries: Mapping[str, Tensor | LowRank]
    base: str | None = None

    def __post_init__(self) -> None:
        checked = {name: _checked(name, entry) for name, entry in self.entries.items()}
        object.__setattr__(self, "entries", checked)

    def __add__(self, other: WeightDelta) -> WeightDelta:
        """Both deltas in one.

        Raises:
            RetentionBenchError: They belong to different base models, or their shapes differ.
        """
        if self.base and other.base and self.base != other.base:
            raise RetentionBenchError(
                f"The deltas belong to different models, {self.base!r} and {other.base!r}, and cannot be added."
            )
        merged = dict(self.entries)
        for name, entry in other.entries.items():
            merged[name] = _sum(name, merged[name], entry) if name in merged else entry
        return WeightDelta(merged, self.base or other.base)

    def scaled(self, factor: float) -> WeightDelta:
        """Every summand times a finite number; low-rank entries stay in their factors."""

        def times(entry: Tensor | LowRank) -> Tensor | LowRank:
            return LowRank(entry.left * factor, entry.right) if isinstance(entry, LowRank) else entry * factor

        return WeightDelta({name: times(entry) for name, entry in self.entries.items()}, self.base)

    def norms(self) -> dict[str, float]:
        """Frobenius norm by parameter name."""
        return {name: _norm(entry) for name, entry in self.entries.items()}

    def layers(self, model: PreTrainedModel) -> tuple[int, ...]:
        """The layers that it changes, ascending.

        Raises:
            UsageError: The model's family is not supported.
        """
        prefix = f"{family(model.config.model_type).blocks}."
        numbers = (name[len(prefix) :].partition(".")[0] for name in self.entries if name.startswith(prefix))
        return tuple(sorted({int(number) for number in numbers if number.isdecimal()}))

    def apply_(self, model: PreTrainedModel) -> None:
        """Add to a model's weights in place; the sum is taken in float32 and rounded once to the weight's dtype.

        Raises:
            RetentionBenchError: The model lacks a parameter or has it in another shape; then nothing was changed. Or a
                sum is not finite; then parameters may have been changed.
        """
        for name, parameter, entry in self._targets(model):
            _add_(name, parameter.data, entry)

    @contextlib.contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Apply for the time of a `with` block; afterwards the model has its own bits again.

        Raises:
            RetentionBenchError: As `apply_`.
        """
        self._targets(model)  # refuses another model's delta before anything is saved
        with restoring(model, self.entries):
            self.apply_(model)
            yield

    def apply_to(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Apply to a stream of weights; tensors without a summand pass through as they are.

        Args:
            weights: Names and tensors, in any order. They are not changed.

        Yields:
            The same names, with the summed tensors in place of those that the delta has.

        Raises:
            RetentionBenchError: A shape differs, a sum is not finite, or the stream ended without one of the delta's
                parameters.
        """
        missing = set(self.entries)
        for name, tensor in weights:
            if name in self.entries:
                missing.discard(name)
                _check_shape(name, self.entries[name], tensor)
                tensor = tensor.clone()
                _add_(name, tensor, self.entries[name])
            yield name, tensor
        if missing:
            raise RetentionBenchError(
                f"The weights ended without {', '.join(sorted(missing))}, which the delta changes. "
                "Give the weights of the model that the delta was made for."
            )

    def save(self, path: Path | str) -> None:
        """Write as safetensors: to a temporary name first, then renamed, so no reader sees half a file.

        Raises:
            UsageError: There can be no file of that name.
        """
        tensors: dict[str, Tensor] = {}
        for name, entry in self.entries.items():
            parts = {"dense": entry} if isinstance(entry, Tensor) else {"left": entry.left, "right": entry.right}
            tensors |= {f"{name}:{part}": tensor for part, tensor in parts.items()}
        write_tensors(path, tensors, kind=_KIND, version=_VERSION, base=self.base)

    @classmethod
    def load(cls, path: Path | str) -> WeightDelta:
        """Read a delta that `save` wrote.

        Raises:
            UsageError: There is no such file.
            RetentionBenchError: It is no delta or of another version, or its content is broken.
        """
        tensors, about = read_tensors(path, _About, kind=_KIND, version=_VERSION)
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(":")
            parts.setdefault(name, {})[part] = tensor
        try:
            return cls({name: _entry(name, found) for name, found in parts.items()}, about.base)
        except RetentionBenchError as error:
            raise RetentionBenchError(f"{path}: {error}") from error

    def _targets(self, model: PreTrainedModel) -> list[tuple[str, Tensor, Tensor | LowRank]]:
        """The model's parameters with their summands, all checked."""
        parameters: dict[str, Any] = dict(model.named_parameters())
        for name, entry in self.entries.items():
            if name not in parameters:
                raise RetentionBenchError(str(unknown_name("parameter", name, parameters)))
            _check_shape(name, entry, parameters[name])
        return [(name, parameters[name], entry) for name, entry in self.entries.items()]


@contextlib.contextmanager
def restoring(model: PreTrainedModel, names: Iterable[str]) -> Iterator[None]:
    """For the time of a `with` block parameters may change; afterwards they have their own bits again.

    Args:
        model: The model.
        names: Full names of the parameters. Each is copied once, however many deltas are applied within.
    """
    parameters = [model.get_parameter(name) for name in names]
    saved = [parameter.data.clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, original in zip(parameters, saved, strict=True):
            parameter.data.copy_(original)


def _checked(name: str, entry: Tensor | LowRank) -> Tensor | LowRank:
    """The entry on the CPU in float32."""
    if isinstance(entry, LowRank):
        left, right = (_plain(name, factor) for factor in (entry.left, entry.right))
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise RetentionBenchError(
                f"The low-rank factors of {name} do not fit: {list(left.shape)} times {list(right.shape)}."
            )
        entry = LowRank(left, right)
        finite = bool(left.isfinite().all() and right.isfinite().all())
    else:
        entry = _plain(name, entry)
        finite = bool(entry.isfinite().all())
    if not finite:
        raise RetentionBenchError(f"The delta of {name} has numbers that are not finite.")
    return entry


def _plain(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in REAL:
        raise RetentionBenchError(
            f"The delta of {name} has the dtype {str(tensor.dtype).removeprefix('torch.')}. Give it in float32."
        )
    if not tensor.numel():
        raise RetentionBenchError(f"The delta of {name} has the shape {list(tensor.shape)}: it is empty.")
    return tensor.detach().to("cpu", torch.float32)


def _entry(name: str, parts: Mapping[str, Tensor]) -> Tensor | LowRank:
    if set(parts) == {"dense"}:
        return parts["dense"]
    if set(parts) == {"left", "right"}:
        return LowRank(parts["left"], parts["right"])
    raise RetentionBenchError(f"{name or 'a tensor'} has the parts {sorted(parts)}, not dense or left and right.")


def _dense(entry: Tensor | LowRank) -> Tensor:
    return entry.left @ entry.right if isinstance(entry, LowRank) else entry


def _sum(name: str, first: Tensor | LowRank, second: Tensor | LowRank) -> Tensor | LowRank:
    _check_shape(name, second, first)
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        rows, columns = first.shape
        if (first.left.shape[1] + second.left.shape[1]) * (rows + columns) > rows * columns:
            return _dense(first) + _dense(second)  # the factors would take more than the matrix
        return LowRank(torch.cat([first.left, second.left], 1), torch.cat([first.right, second.right], 0))
    return _dense(first) + _dense(second)


def _norm(entry: Tensor | LowRank) -> float:
    if isinstance(entry, Tensor):
        return float(torch.linalg.vector_norm(entry.double()))
    left, right = entry.left.double(), entry.right.double()
    # |L R|^2 = tr(L'L RR'), without the product itself; rounding can put a zero a little below zero.
    return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())


def _check_shape(name: str, entry: Tensor | LowRank, other: Tensor | LowRank) -> None:
    if entry.shape != other.shape:
        raise RetentionBenchError(
            f"The delta of {name} has the shape {list(entry.shape)}, the weight {list(other.shape)}. "
            "Give the model that the delta was made for."
        )


def _add_(name: str, weight: Tensor, entry: Tensor | LowRank) -> None:
    """Add in float32, round once; low-rank factors are multiplied on the weight's device.

    Raises:
        RetentionBenchError: A sum is not finite in the weight's dtype; the weight is as it was.
    """
    with torch.no_grad():
        if isinstance(entry, LowRank):
            summand = entry.left.to(weight.device) @ entry.right.to(weight.device)
        else:
            summand = entry.to(weight.device)
        total = (weight.float() + summand).to(weight.dtype)
        if not total.isfinite().all():
            raise RetentionBenchError(
                f"The delta of {name} makes weights that are not finite in {str(weight.dtype).removeprefix('torch.')}. "
                "Make it anew, or take a dtype with a wider range."
            )
        weight.copy_(total)
