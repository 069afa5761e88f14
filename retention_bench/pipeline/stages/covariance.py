"""The covariance of an MLP's keys (C, `mom2`), which locate-and-edit methods need: collected once for a model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from retention_bench.data import is_local, read_json
from retention_bench.pipeline.rows import Texts
from retention_bench.pipeline.stage import Model, Rows, Stage
from retention_bench.store import OUTSIDE
from retention_bench.store.fingerprints import config_file
from retention_bench.store.store import versions

if TYPE_CHECKING:
    from retention_bench.pipeline.bench import Bench

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
    version: ClassVar[int] = 3

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
        from retention_bench.models import family

        config = read_json(config_file(model.path, model.revision), dict, "model's configuration")
        names = family(str(config.get("model_type")))
        ordered = tuple(sorted(set(layers)))
        modules = tuple(f"{names.blocks}.{layer}.{names.projection}" for layer in ordered)
        return cls(model, corpus, texts, max_length, ordered, modules, shard, memory)

    def title(self) -> str:
        """What it does, for people."""
        return "covariance" + (f", shard {self.shard[0]}/{self.shard[1]}" if self.shard else "")

    def run(self, folder: Path, bench: Bench) -> None:
        """Write `covariance.safetensors`; a run that was cut off goes on where it was."""
        from retention_bench.editors import collect_key_statistics

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
        collect_key_statistics(
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
