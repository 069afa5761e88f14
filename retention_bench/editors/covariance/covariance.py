"""Second moments of the keys over ordinary text: which model they belong to, files, shards, unused directions."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.data import shortened
from retention_bench.editors.base import EditContext
from retention_bench.editors.covariance.rome_npz import SAMPLE, check_resemblance, read_second_moment
from retention_bench.editors.locate.linalg import what_is_wrong
from retention_bench.editors.settings import MOST_LAYERS
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import frozen, key_size, projection_name, read_tensors, record, write_tensors

TOLERANCE = 0.02
"""How far, relatively, a model's mean keys on the probe may lie from those that were kept with the statistics.

Measured on atlas-gpt2, atlas-llama and the tests' golden GPT-2 against the same weights in float32: bfloat16 0.001 to
0.005 (it grows with depth), float16 below 0.001, another attention kernel below 0.0001. Above the first layer, 20 steps
of fine-tuning at a learning rate of 2e-5 gave 0.014 to 0.65, one fact written by AlphaEdit 0.03 to 0.12, random weights
of the same shape over 1. A layer below everything that changed keeps its keys, and its statistics hold.
"""

_Count = Annotated[int, Field(strict=True, ge=1, le=2**63 - 1)]
_Index = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
_Layer = Annotated[int, Field(ge=0, le=MOST_LAYERS - 1)]

KIND = "set of key statistics"
"""What a file of them says that it is."""

_VERSION = 2
_PARTS = ("moment", "probe")
_NAME = re.compile(r"(moment|probe)\.(0|[1-9]\d{0,3})", re.ASCII)
_PROBE = 32  # token ids 1 to this, whatever they stand for: no tokenizer has a part


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How statistics were measured; merged parts agree in all of it but `texts` and `shard`.

    Attributes:
        texts: Number of texts; None where not known.
        max_length: Tokens of a text that count; None where not known.
        dtype: The model's, for example `"float32"`.
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


class _About(pydantic.BaseModel):
    """What stands beside the tensors of a file."""

    tokens: _Count
    source: str
    measured: Measurement


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """What a second moment's eigenvalues say.

    Attributes:
        trace: Their sum, the keys' mean squared norm.
        largest: The largest.
        smallest: The smallest; a little below zero by rounding where the moment is singular.
        rank: How many are above rounding: the largest times size times float32's epsilon.
        condition: The largest over the smallest; infinite where the moment is singular.
        below: How many are below the limit that was asked for: directions that text hardly uses.
    """

    trace: float
    largest: float
    smallest: float
    rank: int
    condition: float
    below: int


@dataclasses.dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Uncentred second moments of a model's keys.

    Attributes:
        moments: By layer E[k k^T], float32 [d_mlp, d_mlp], on the CPU.
        tokens: Number of tokens that the expectation was taken over.
        source: What it was computed from, for people.
        probe: By layer the model's mean key on a fixed row of tokens, float32 [d_mlp]; see `probe_keys`. Without it
            `check` compares layers and sizes only.
        measured: How they were measured.
    """

    moments: Mapping[int, Tensor]
    tokens: int
    source: str = ""
    probe: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)
    measured: Measurement = Measurement()
    _projectors: dict[tuple[int, float], Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def projector(self, layer: int, threshold: float, device: torch.device) -> Tensor:
        """`null_space_projector` of a layer's moment: made once, however many edits ask for it, and kept on the CPU.

        Args:
            layer: One of the layers.
            threshold: As in `null_space_projector`.
            device: Where it is made and goes.

        Returns:
            P in float64 [d_mlp, d_mlp].

        Raises:
            UsageError: As `null_space_projector`.
        """
        kept = self._projectors.get((layer, threshold))
        if kept is None:
            kept = null_space_projector(self.moments[layer].to(device), threshold).cpu()
            self._projectors[layer, threshold] = kept
        return kept.to(device)

    def check(self, model: PreTrainedModel, layers: Sequence[int], *, edited: bool = False) -> None:
        """Refuse statistics that cannot be this model's; runs one row of 32 tokens where there is a probe.

        Args:
            model: The model; it is left as it was found.
            layers: The layers whose statistics are needed.
            edited: The model carries edits already, so that its keys differ from the measured ones on purpose: compare
                layers and sizes only.

        Raises:
            UsageError: A layer is missing, its keys have another size than the model's, or the model's keys on the
                probe are farther from the kept ones than `TOLERANCE`.
        """
        for layer in layers:
            size = key_size(model, layer)
            if layer not in self.moments:
                raise UsageError(
                    f"The key statistics cover layers {sorted(self.moments)}, not layer {layer}. "
                    "Collect them for all layers that are edited."
                )
            if self.moments[layer].shape != (size, size):
                raise UsageError(
                    f"The key statistics of layer {layer} are for keys of size {len(self.moments[layer])}, the "
                    f"model's have {size}: they belong to another model. Collect them on the model that is edited."
                )
        probed = [] if edited else [layer for layer in layers if layer in self.probe]
        for layer, keys in (probe_keys(model, probed) if probed else {}).items():
            away = distance(keys, self.probe[layer])
            if not away <= TOLERANCE:
                raise UsageError(
                    f"The key statistics were measured on another model: its keys of layer {layer} on a probe differ "
                    f"by {100 * away:.1f} % from this model's, and {100 * TOLERANCE:g} % is what another dtype or "
                    "device may make. Collect them on the unedited model that is edited."
                )

    def spectrum(self, layer: int, *, limit: float = 2e-2) -> Spectrum:
        """Summarise the eigenvalues of a layer's moment, taken in float64.

        Args:
            layer: One of the layers.
            limit: Eigenvalues below it are counted; AlphaEdit's threshold.
        """
        values = torch.linalg.eigvalsh(self.moments[layer].double())
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

    @classmethod
    def merged(cls, parts: Sequence[KeyStatistics]) -> KeyStatistics:
        """The statistics over all texts of several, each weighted by its tokens.

        Args:
            parts: All shards of one measurement, in any order, or statistics over different texts.

        Raises:
            UsageError: Nothing to merge, parts that are missing, given twice or of different measurements, or parts
                of different models, layers or settings.
        """
        if not parts:
            raise UsageError("No key statistics were given to merge.")
        first = parts[0]
        for part in parts[1:]:
            _check_alike(first, part)
        shards = sorted(part.measured.shard for part in parts if part.measured.shard)
        if shards:
            count = shards[0][1]
            whole = len(shards) == len(parts) == count and shards == [(index, count) for index in range(count)]
            if not whole:
                named = ", ".join("/".join(map(str, shard)) for shard in shards)
                raise UsageError(
                    f"The shards {named} are not the whole of one measurement. Merge 0/{count} to "
                    f"{count - 1}/{count}, each once."
                )
        elif any(_same(one, other) for one, other in itertools.combinations(parts, 2)):
            raise UsageError("The same key statistics were given twice, and would count twice. Give each once.")
        tokens = sum(part.tokens for part in parts)
        moments = {}
        for layer in first.moments:
            total = torch.zeros_like(first.moments[layer], dtype=torch.float64)
            for part in parts:
                total.add_(part.moments[layer], alpha=part.tokens / tokens)
            moments[layer] = total.float()
        counts = [part.measured.texts for part in parts]
        texts = None if None in counts else sum(count for count in counts if count is not None)
        sources = "; ".join(dict.fromkeys(part.source for part in parts if part.source))
        return cls(moments, tokens, sources, first.probe, dataclasses.replace(first.measured, texts=texts, shard=None))

    @classmethod
    def from_npz(
        cls,
        files: Mapping[int, Path | str],
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        texts: Sequence[str] = SAMPLE,
        source: str = "",
    ) -> KeyStatistics:
        """Read covariance files of ROME's, MEMIT's or AlphaEdit's own code (`layer_stats`).

        Args:
            files: The `.npz` file of each layer.
            model: The model that they should belong to. It is run over `texts`, refuses what is another model's or
                another layer's, and gives the result its probe. A relative of the model, such as one fine-tuned from
                it, cannot be told apart by this.
            tokenizer: The model's tokenizer; given with it.
            texts: Text to compare on, a few hundred tokens of it; nearer to what the files were measured on is better.
            source: What they were measured on, for people.

        Raises:
            UsageError: No files, files over different numbers of tokens, or files that are not this model's.
            RetentionBenchError: A file is missing, not of that form, or its matrix is no second moment.
        """
        if not files:
            raise UsageError("No .npz files were given to read key statistics from.")
        read = {layer: read_second_moment(path) for layer, path in sorted(files.items())}
        counts = {layer: tokens for layer, (_, tokens) in read.items()}
        if len(set(counts.values())) > 1:
            raise UsageError(
                f"The files were measured over different numbers of tokens, by layer {counts}: not on the same texts. "
                "Give files of one run."
            )
        moments = {layer: moment for layer, (moment, _) in read.items()}
        tokens = next(iter(counts.values()))
        found = cls(moments, tokens, source)
        if model is None:
            return found
        if tokenizer is None:
            raise UsageError("A model without its tokenizer was given to compare key statistics with. Give both.")
        return found.of_model(model, tokenizer, texts)

    def of_model(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = SAMPLE
    ) -> KeyStatistics:
        """The same with the model's probe, for statistics that came without; see `from_npz`.

        Raises:
            UsageError: They are not this model's.
        """
        layers = list(self.moments)
        self.check(model, layers)
        check_resemblance(model, tokenizer, self.moments, texts)
        return KeyStatistics(self.moments, self.tokens, self.source, probe_keys(model, layers), describe(model, layers))

    def save(self, path: Path | str) -> None:
        """Write as safetensors: to a temporary name first, then renamed, so no reader sees half a file.

        Raises:
            UsageError: There can be no file of that name.
        """
        tensors = {f"moment.{layer}": moment for layer, moment in self.moments.items()}
        tensors |= {f"probe.{layer}": keys for layer, keys in self.probe.items()}
        measured = dataclasses.asdict(self.measured)
        about: dict[str, Any] = {"tokens": self.tokens, "source": self.source, "measured": measured}
        write_tensors(path, tensors, kind=KIND, version=_VERSION, **about)

    @classmethod
    def load(cls, path: Path | str) -> KeyStatistics:
        """Read statistics that `save` wrote.

        Raises:
            UsageError: There is no such file.
            RetentionBenchError: It holds no statistics or of another version, it is broken, or a matrix in it cannot
                be a second moment.
        """
        tensors, about = read_tensors(path, _About, kind=KIND, version=_VERSION)
        moments, probe = ({layer: tensor.float() for layer, tensor in _part(tensors, part)} for part in _PARTS)
        if not moments:
            raise RetentionBenchError(f"{path} holds no second moment. Make the file again.")
        if len(moments) + len(probe) < len(tensors):
            other = next(name for name in tensors if not _NAME.fullmatch(name))
            raise RetentionBenchError(
                f"{path}: a tensor is named {shortened(other)}, where moment.LAYER and probe.LAYER are expected. Make "
                "the file again."
            )
        for layer, moment in moments.items():
            wrong = what_is_wrong(moment)
            if wrong:
                raise RetentionBenchError(f"{path}: moment.{layer} is no second moment: {wrong}. Make the file again.")
        for layer, keys in probe.items():
            if layer not in moments or keys.shape != moments[layer].shape[:1] or not keys.isfinite().all():
                raise RetentionBenchError(
                    f"{path}: probe.{layer} is no key of that layer: its shape is {list(keys.shape)}, its moment's "
                    f"{list(moments[layer].shape) if layer in moments else 'not there'}. Make the file again."
                )
        shard = about.measured.shard
        if shard and not 0 <= shard[0] < shard[1]:
            raise RetentionBenchError(f"{path}: there is no shard {shard[0]}/{shard[1]}. Make the file again.")
        return cls(moments, about.tokens, about.source, probe, about.measured)


def _part(tensors: Mapping[str, Tensor], part: str) -> list[tuple[int, Tensor]]:
    """The tensors of a part with their layers, ascending."""
    names = filter(None, map(_NAME.fullmatch, tensors))
    return sorted(((int(name[2]), tensors[name[0]]) for name in names if name[1] == part), key=operator.itemgetter(0))


def required_statistics(
    editor: str, model: PreTrainedModel, context: EditContext, layers: Sequence[int]
) -> KeyStatistics:
    """The statistics that an edit was given.

    Raises:
        UsageError: There are none, or they cannot be this model's.
    """
    if context.statistics is None:
        raise UsageError(
            f"{editor} needs the key statistics of layers {list(layers)}. "
            "Make them with collect_key_statistics and put them into the EditContext."
        )
    # Keys remembered from earlier edits say that the model carries those, which its statistics know nothing of.
    context.statistics.check(model, layers, edited=bool(context.remembered))
    return context.statistics


def probe_keys(model: PreTrainedModel, layers: Sequence[int]) -> dict[int, Tensor]:
    """A model's mean keys on a fixed row of tokens: what tells models of one shape apart.

    Args:
        model: The model; it is left as it was found.
        layers: The layers.

    Returns:
        By layer [d_mlp], float32 on the CPU: the mean over the tokens 1 to 32, modulo the size of the vocabulary, or as
        many as the model has positions for.
    """
    length = min(_PROBE, model.config.max_position_embeddings)
    ids = torch.arange(1, length + 1, device=model.device).remainder(model.config.vocab_size)[None]
    with frozen(model):
        keys, _ = record(model, ids, torch.ones_like(ids), keys=layers)
    return {layer: keys[layer][0].float().mean(0).cpu() for layer in layers}


def describe(model: PreTrainedModel, layers: Sequence[int], **known: Any) -> Measurement:
    """The `Measurement` on a model, with its dtype and the projections' names.

    Args:
        model: The model.
        layers: The layers.
        known: The other fields.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    return Measurement(dtype=dtype, modules={layer: projection_name(model, layer) for layer in layers}, **known)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative distance; NaN where a number is."""
    return ((found - expected).norm() / expected.norm()).item()


def null_space_projector(moment: Tensor, threshold: float) -> Tensor:
    """The projector onto the directions of key space that text hardly uses (AlphaEdit, section 3.2, equation 7).

    Args:
        moment: E[k k^T], symmetric [d_mlp, d_mlp].
        threshold: Eigenvectors whose eigenvalue is below this, an absolute number, span the space.

    Returns:
        P = U U^T in float64 [d_mlp, d_mlp], on the moment's device.

    Raises:
        UsageError: No eigenvalue is below the threshold.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    unused = vectors[:, values < threshold]
    if not unused.shape[1]:
        raise UsageError(
            f"nullspace_threshold is {threshold:g}, and no direction of the keys is below it (the smallest is "
            f"{values[0]:.3g}). Raise the threshold."
        )
    return unused @ unused.T


def _same(first: KeyStatistics, other: KeyStatistics) -> bool:
    """Whether two have the same numbers."""
    return first.tokens == other.tokens and all(
        torch.equal(moment, other.moments[layer]) for layer, moment in first.moments.items()
    )


def _check_alike(first: KeyStatistics, other: KeyStatistics) -> None:
    """Refuse parts that do not belong together."""
    shapes = [{layer: len(moment) for layer, moment in part.moments.items()} for part in (first, other)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"Key statistics of different layers or sizes cannot be merged: size of the keys by layer is {shapes[0]} "
            f"in one and {shapes[1]} in another."
        )
    plain = [dataclasses.replace(part.measured, texts=None, shard=None) for part in (first, other)]
    for field in dataclasses.fields(Measurement):
        ours, theirs = (getattr(measured, field.name) for measured in plain)
        if ours != theirs:
            raise UsageError(
                f"Key statistics that were measured differently cannot be merged: {field.name} is {str(ours)[:200]} in "
                f"one and {str(theirs)[:200]} in another."
            )
    if set(first.probe) != set(other.probe):
        raise UsageError("Key statistics with and without a probe of their model cannot be merged: collect them anew.")
    for layer, keys in first.probe.items():
        away = distance(other.probe[layer], keys)
        if not away <= TOLERANCE:
            raise UsageError(
                f"Key statistics of different models cannot be merged: their keys of layer {layer} on a probe differ "
                f"by {100 * away:.1f} %."
            )
