"""The covariance C = E[k k^T] of a model's keys: which model it belongs to, its file, what its eigenvalues say."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from retention_bench.data import find_file, shortened
from retention_bench.editors.covariance.fingerprint import TOLERANCE, distance, key_fingerprint
from retention_bench.editors.locate.linalg import not_positive_semidefinite, null_space_projector
from retention_bench.editors.settings import MOST_LAYERS
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import key_size, kind_of, projection_name, read_header, read_tensors, write_tensors

_Count = Annotated[int, Field(strict=True, ge=1, le=2**63 - 1)]
_Index = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
_Layer = Annotated[int, Field(ge=0, le=MOST_LAYERS - 1)]

KIND = "covariance"
"""What a file of one says that it is."""

_VERSION = 3
_PARTS = {"mom2": "mom2", "fingerprint": "fingerprint"}
_LAYER = re.compile(r"0|[1-9]\d{0,3}", re.ASCII)
# Version 2 has the same contents under other names; measuring them again would take hours.
_OLD_KIND, _OLD_VERSION = "set of key statistics", 2
_OLD_PARTS = {"moment": "mom2", "probe": "fingerprint"}

KINDS = (KIND, _OLD_KIND)
"""What files of one may say that they are."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How a covariance was measured; merged parts agree in all of it but `texts` and `shard`.

    Attributes:
        texts: Number of texts; None where not known.
        max_length: Tokens of a text that count; None where not known.
        dtype: The model's, for example `"float32"`; None where not known.
        modules: The projection's full name by layer.
        shard: (i, n) for every text whose index is i modulo n; None for all texts.
        settings: What the caller files the whole measurement under: JSON values.
    """

    texts: _Count | None = None
    max_length: _Count | None = None
    dtype: str | None = None
    modules: Mapping[_Layer, str] = dataclasses.field(default_factory=dict)
    shard: tuple[_Index, _Index] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, layers: Sequence[int], **known: Any) -> Measurement:
        """One on a model, with its dtype and the projections' names.

        Args:
            model: The model.
            layers: The layers.
            known: The other fields.
        """
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(dtype=dtype, modules={layer: projection_name(model, layer) for layer in layers}, **known)


class _About(pydantic.BaseModel):
    """What stands beside the tensors of a file."""

    tokens: _Count
    source: str
    measured: Measurement
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """What a layer's eigenvalues say.

    Attributes:
        trace: Their sum, the keys' mean squared norm.
        largest: The largest.
        smallest: The smallest; a little below zero by rounding where the matrix is singular.
        rank: How many are above rounding: the largest times size times float32's epsilon.
        condition: The largest over the smallest; infinite where the matrix is singular.
        below: How many are below the limit that was asked for: directions that text hardly uses.
    """

    trace: float
    largest: float
    smallest: float
    rank: int
    condition: float
    below: int


@dataclasses.dataclass(frozen=True, eq=False)
class Covariance:
    """The uncentred covariance of a model's keys, by layer.

    Attributes:
        mom2: By layer C = E[k k^T], float32 [d_mlp, d_mlp], on the CPU; ROME's `mom2`, divided by the tokens.
        tokens: Number of tokens that the expectation was taken over.
        source: What it was computed from, for people.
        fingerprint: By layer the model's mean key on a fixed row of tokens, float32 [d_mlp]; see `key_fingerprint`.
            Without it `check` compares layers and sizes only.
        measured: How it was measured.
    """

    mom2: Mapping[int, Tensor]
    tokens: int
    source: str = ""
    fingerprint: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)
    measured: Measurement = Measurement()
    _projectors: dict[tuple[int, float], Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def projector(self, layer: int, threshold: float, device: torch.device) -> Tensor:
        """`null_space_projector` of a layer: computed once, however many edits ask for it, and kept on the CPU.

        Args:
            layer: One of the layers.
            threshold: As in `null_space_projector`.
            device: Where it is computed and goes.

        Returns:
            P in float64 [d_mlp, d_mlp].

        Raises:
            UsageError: As `null_space_projector`.
        """
        kept = self._projectors.get((layer, threshold))
        if kept is None:
            kept = null_space_projector(self.mom2[layer].to(device), threshold).cpu()
            self._projectors[layer, threshold] = kept
        return kept.to(device)

    def check(self, model: PreTrainedModel, layers: Sequence[int], *, edited: bool = False) -> None:
        """Refuse a covariance that cannot be this model's; runs one row of 32 tokens where there is a fingerprint.

        Args:
            model: The model; it is left as it was found.
            layers: The layers that are needed.
            edited: The model carries edits already, so its keys differ from the measured ones: compare layers and
                sizes only.

        Raises:
            UsageError: A layer is missing, its keys have another size than the model's, or the model's fingerprint is
                farther from the kept one than `TOLERANCE`.
        """
        for layer in layers:
            size = key_size(model, layer)
            if layer not in self.mom2:
                raise UsageError(
                    f"The covariance covers layers {sorted(self.mom2)}, not layer {layer}. Collect it for all layers "
                    "that are edited."
                )
            if self.mom2[layer].shape != (size, size):
                raise UsageError(
                    f"The covariance of layer {layer} is for keys of size {len(self.mom2[layer])}, the model's have "
                    f"{size}: it belongs to another model. Collect it on the model that is edited."
                )
        compared = [] if edited else [layer for layer in layers if layer in self.fingerprint]
        for layer, keys in (key_fingerprint(model, compared) if compared else {}).items():
            away = distance(keys, self.fingerprint[layer])
            if not away <= TOLERANCE:
                raise UsageError(
                    f"The covariance was measured on another model: its fingerprint of layer {layer} differs by "
                    f"{100 * away:.1f} % from this model's; another dtype or device changes it by less than "
                    f"{100 * TOLERANCE:g} %. Collect it on the unedited model that is edited."
                )

    def spectrum(self, layer: int, *, limit: float = 2e-2) -> Spectrum:
        """Summarise the eigenvalues of a layer, taken in float64.

        Args:
            layer: One of the layers.
            limit: Eigenvalues below it are counted; by default AlphaEdit's threshold.
        """
        values = torch.linalg.eigvalsh(self.mom2[layer].double())
        smallest, largest = values[0].item(), values[-1].item()
        rounding = largest * len(values) * torch.finfo(torch.float32).eps
        return Spectrum(
            trace=values.sum().item(),
            largest=largest,
            smallest=smallest,
            rank=int((values > rounding).sum()),
            condition=largest / smallest if smallest > rounding else float("inf"),
            below=int((values < limit).sum()),
        )

    def summary(self) -> dict[str, Any]:
        """What it holds, as JSON values.

        Returns:
            `source`, `tokens`, `fingerprint` (whether every layer has one), the fields of `Measurement`, and by layer
            in `layers` the projection's name (`module`), `size` and the fields of `Spectrum`, with an infinite
            condition as None.
        """
        measured = dataclasses.asdict(self.measured)
        modules = measured.pop("modules")
        layers = {}
        for layer, matrix in self.mom2.items():
            spectrum = dataclasses.asdict(self.spectrum(layer))
            if not math.isfinite(spectrum["condition"]):
                spectrum["condition"] = None
            layers[str(layer)] = {"module": modules.get(layer), "size": len(matrix), **spectrum}
        return {
            "source": self.source,
            "tokens": self.tokens,
            "fingerprint": set(self.fingerprint) == set(self.mom2),
            **measured,
            "layers": layers,
        }

    def save(self, path: Path | str) -> None:
        """Write as safetensors: to a temporary name first, then renamed, so no reader sees half a file.

        Raises:
            UsageError: There can be no file of that name.
        """
        tensors = {f"mom2.{layer}": matrix for layer, matrix in self.mom2.items()}
        tensors |= {f"fingerprint.{layer}": keys for layer, keys in self.fingerprint.items()}
        about = {"tokens": self.tokens, "source": self.source, "measured": dataclasses.asdict(self.measured)}
        write_tensors(path, tensors, kind=KIND, version=_VERSION, **about)

    @classmethod
    def load(cls, path: Path | str, *, proven: bool = False) -> Covariance:
        """Read what `save` wrote.

        Args:
            path: The file.
            proven: Refuse a file without a hash of its matrices, or without the fingerprint that tells its model.

        Raises:
            UsageError: There is no such file.
            RetentionBenchError: It holds no covariance or one of another version, it is broken, a matrix in it cannot
                be a covariance, or what `proven` asks for is missing.
        """
        kind, version, parts = _form(path)
        tensors, about = read_tensors(path, _About, kind=kind, version=version)
        names = _layers_of(path, tensors, parts)
        mom2 = {layer: tensors[name].float() for layer, name in names["mom2"].items()}
        keys = {layer: tensors[name].float() for layer, name in names["fingerprint"].items()}
        for layer, matrix in mom2.items():
            wrong = not_positive_semidefinite(matrix)
            if wrong:
                raise RetentionBenchError(
                    f"{path}: {names['mom2'][layer]} is no covariance: {wrong}. Make the file again."
                )
        for layer, key in keys.items():
            if layer not in mom2 or key.shape != mom2[layer].shape[:1] or not key.isfinite().all():
                raise RetentionBenchError(
                    f"{path}: {names['fingerprint'][layer]} is no key of that layer: its shape is {list(key.shape)}, "
                    f"its matrix's {list(mom2[layer].shape) if layer in mom2 else 'not there'}. Make the file again."
                )
        _check_shard(path, about.measured)
        if proven:
            _check_proven(path, mom2, keys, about)
        return cls(mom2, about.tokens, about.source, keys, about.measured)


def check_file(path: Path | str, layers: Sequence[int], *, dtype: str, modules: Mapping[int, str]) -> None:
    """Refuse a file that cannot serve a model before the model is loaded; reads the file's header only.

    What is left to see is seen by `Covariance.load` with `proven`, and with the model by `Covariance.check`.

    Args:
        path: The file.
        layers: The layers that are needed.
        dtype: The dtype that the model is edited in, for example `"float32"`.
        modules: By layer the full name of the model's projection, as `projection_name` gives it.

    Raises:
        UsageError: There is no such file, or it is a shard, lacks a layer, or was measured in another dtype or on a
            model with other modules.
        RetentionBenchError: It holds no covariance, it is broken, or it has no hash or fingerprint.
    """
    kind, version, parts = _form(path)
    shapes, about = read_header(path, _About, kind=kind, version=version)
    names = _layers_of(path, shapes, parts)
    _check_shard(path, about.measured)
    _check_proven(path, names["mom2"], names["fingerprint"], about)
    measured = about.measured
    if measured.shard:
        index, count = measured.shard
        raise UsageError(
            f"{path} is the shard {index}/{count} of a covariance. Merge all {count} with `retention-bench covariance "
            "merge` first."
        )
    missing = [layer for layer in layers if layer not in names["mom2"]]
    if missing:
        raise UsageError(
            f"{path} covers the layers {sorted(names['mom2'])}, and {', '.join(map(str, missing))} "
            f"{'is' if len(missing) == 1 else 'are'} needed too. Give a covariance of all layers that are edited."
        )
    if measured.dtype is not None and measured.dtype != dtype:
        raise UsageError(
            f"{path} was measured on a model in {measured.dtype}, and the model is edited in {dtype}. Measure it in "
            f"{dtype}, with `--dtype {dtype}`."
        )
    for layer in layers:
        named = measured.modules.get(layer)
        if named is not None and named != modules[layer]:
            raise UsageError(
                f"{path} was measured on another model: the keys of its layer {layer} go into {shortened(named)}, this "
                f"model's into {modules[layer]}. Collect it on the model that is edited."
            )


def _form(path: Path | str) -> tuple[str, int, Mapping[str, str]]:
    """The kind and version to read a file as, and what the parts of tensors' names stand for."""
    if kind_of(find_file(path, f"file with a {KIND}")) == _OLD_KIND:
        return _OLD_KIND, _OLD_VERSION, _OLD_PARTS
    return KIND, _VERSION, _PARTS


def _layers_of(path: Path | str, tensors: Iterable[str], parts: Mapping[str, str]) -> dict[str, dict[int, str]]:
    """The tensors' names by layer, ascending, of `mom2` and of `fingerprint`."""
    found: dict[str, dict[int, str]] = {"mom2": {}, "fingerprint": {}}
    for name in tensors:
        part, _, layer = name.partition(".")
        if part not in parts or not _LAYER.fullmatch(layer):
            raise RetentionBenchError(
                f"{path}: a tensor is named {shortened(name)}, where {' and '.join(f'{part}.LAYER' for part in parts)} "
                "are expected. Make the file again."
            )
        found[parts[part]][int(layer)] = name
    if not found["mom2"]:
        raise RetentionBenchError(f"{path} holds no matrix of a layer. Make the file again.")
    return {part: dict(sorted(names.items())) for part, names in found.items()}


def _check_shard(path: Path | str, measured: Measurement) -> None:
    if measured.shard and not 0 <= measured.shard[0] < measured.shard[1]:
        index, count = measured.shard
        raise RetentionBenchError(f"{path}: there is no shard {index}/{count}. Make the file again.")


def _check_proven(path: Path | str, mom2: Mapping[int, object], keys: Mapping[int, object], about: _About) -> None:
    """Refuse a file whose matrices, or whose model, nothing in it vouches for."""
    if about.sha256 is None:
        raise RetentionBenchError(
            f"{path} has no hash of its matrices (`sha256` in its metadata), so that nobody can tell whether they are "
            "those that were measured. Give a file that `retention-bench covariance` wrote."
        )
    without = [layer for layer in mom2 if layer not in keys]
    if without:
        raise RetentionBenchError(
            f"{path} has no fingerprint of its model for the layers {without}, so that nobody can tell whose it is. "
            "Give a file that `retention-bench covariance` measured or imported."
        )
