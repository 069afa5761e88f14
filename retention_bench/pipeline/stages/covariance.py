"""The covariance of an MLP's keys (C, `mom2`), which locate-and-edit methods need: collected once for a model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from retention_bench.data import is_local, read_json
from retention_bench.pipeline.rows import Texts
from retention_bench.pipeline.stage import Bench, Model, Rows, Stage
from retention_bench.store import OUTSIDE, Input
from retention_bench.store.fingerprints import config_file, source_fingerprint
from retention_bench.store.store import versions

if TYPE_CHECKING:
    from retention_bench.editors.covariance import Covariance as Moments

FILE = "covariance.safetensors"


@dataclasses.dataclass(frozen=True)
class Covariance(Stage):
    """Second moments of the keys of some layers.

    Attributes:
        model: The base model.
        corpus: The texts.
        texts: How many texts, from the front.
        max_length: Tokens of a text that count.
        layers: The layers, in order.
        modules: The projections whose inputs the keys are, by layer.
        shard: (i, n) for every text whose index is i modulo n; None for all texts.
        memory: Bytes that the sums may take; None for what they need.
    """

    name: ClassVar[str] = "covariance"
    version: ClassVar[int] = 4

    model: Model
    corpus: Rows
    texts: int
    max_length: int
    layers: tuple[int, ...]
    modules: tuple[str, ...]
    shard: tuple[int, int] | None = None
    memory: int | None = dataclasses.field(default=None, metadata=OUTSIDE)

    @classmethod
    def of(
        cls,
        model: Model,
        corpus: Rows,
        layers: Sequence[int],
        *,
        texts: int,
        max_length: int,
        shard: tuple[int, int] | None = None,
        memory: int | None = None,
    ) -> Covariance:
        """The stage for some layers, the same for whoever asks for it.

        Raises:
            UsageError: The model's family is not supported.
            RetentionBenchError: The model's configuration is missing.
        """
        ordered, modules = _modules(model, layers)
        return cls(model, corpus, texts, max_length, ordered, modules, shard, memory)

    def title(self) -> str:
        """What it does, for people."""
        return "covariance" + (f", shard {self.shard[0]}/{self.shard[1]}" if self.shard else "")

    def run(self, folder: Path, bench: Bench) -> None:
        """Write `covariance.safetensors`; a run that was cut off goes on where it was."""
        from retention_bench.editors import collect_covariance

        corpus = self.corpus
        texts = Texts(corpus.path, corpus.revision, corpus.config, self.texts)
        # What is wrong with a file is found before hours of work are done, and before the model is loaded; of a data
        # set of the Hub, whether there is one.
        for _ in texts if is_local(corpus.path) else itertools.islice(texts, 1):
            pass
        model, tokenizer = bench.base(self.model)
        index, count = self.shard or (0, 1)
        # A file is passed round: where the corpus lay on one machine means nothing on another.
        named = Path(corpus.path).name if Path(corpus.path).is_file() else corpus.path
        collect_covariance(
            model,
            tokenizer,
            texts,
            list(self.layers),
            max_length=self.max_length,
            memory=self.memory,
            shard=(index, count) if self.shard else None,
            checkpoint=bench.store.scratch(self) / "checkpoint.safetensors",
            source=f"the first {self.texts} texts of {named}",
            settings={"inputs": dataclasses.replace(self, shard=None).inputs, "versions": versions()},
            total=-(-(self.texts - index) // count),
            progress=bench.progress,
        ).save(folder / FILE)

    def file(self, bench: Bench) -> Path:
        """The file."""
        return bench.get(self) / FILE

    def read(self, bench: Bench) -> Moments:
        """What it holds; read once, not for every edit."""
        return _read(self, bench)


@dataclasses.dataclass(frozen=True)
class CovarianceFile(Stage):
    """A covariance that was brought in a file, in place of one that is collected.

    Attributes:
        model: The base model.
        given: The file.
        layers: The layers that are needed, in order.
        modules: Their projections.
    """

    name: ClassVar[str] = "covariance_file"
    version: ClassVar[int] = 1

    model: Model
    given: Input
    layers: tuple[int, ...]
    modules: tuple[str, ...]

    @classmethod
    def of(cls, model: Model, path: str, layers: Sequence[int]) -> CovarianceFile:
        """The stage for some layers; what can be seen without the model is checked now.

        Raises:
            UsageError: There is no such file, or it lacks a layer, or is of another dtype or other modules.
            RetentionBenchError: The file is broken.
        """
        from retention_bench.editors.covariance import check_file

        ordered, modules = _modules(model, layers)
        check_file(path, ordered, dtype=model.dtype, modules=dict(zip(ordered, modules, strict=True)))
        return cls(model, Input(path, source_fingerprint(path, None)), ordered, modules)

    def title(self) -> str:
        """What it does, for people."""
        return f"covariance from {Path(self.given.path).name}"

    def run(self, folder: Path, bench: Bench) -> None:
        """Write `covariance.safetensors`, once the model has been found to be the file's."""
        from retention_bench.editors.covariance import Covariance as Loaded

        found = Loaded.load(self.given.path, proven=True)
        model, _ = bench.base(self.model)
        found.check(model, self.layers)
        found.save(folder / FILE)

    def file(self, bench: Bench) -> Path:
        """The file."""
        return bench.get(self) / FILE

    def read(self, bench: Bench) -> Moments:
        """What it holds; read once, not for every edit."""
        return _read(self, bench)


def _read(stage: Covariance | CovarianceFile, bench: Bench) -> Moments:
    from retention_bench.editors.covariance import Covariance as Loaded

    return bench.once((stage.name, stage.key), lambda: Loaded.load(stage.file(bench)))


def _modules(model: Model, layers: Sequence[int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Layers in order, and the projections whose inputs their keys are."""
    from retention_bench.models import family

    config = read_json(config_file(model.path, model.revision), dict, "model's configuration")
    names = family(str(config.get("model_type")))
    ordered = tuple(sorted(set(layers)))
    return ordered, tuple(f"{names.blocks}.{layer}.{names.projection}" for layer in ordered)
