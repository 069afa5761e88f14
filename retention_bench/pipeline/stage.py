"""A stage: plain values that say what is computed, from which it is computed, and under which key it is kept.

A stage holds the stages that it needs, so the last one of a cell is the whole plan. It pickles, it can be written as
JSON and read back in another process, and its key follows from its values alone: nothing is loaded to make a plan. A
bench computes it.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from retention_bench.display.progress import Progress, silent
from retention_bench.pipeline.loading import load
from retention_bench.store import OUTSIDE, Input, Store
from retention_bench.store.store import key_of

T = TypeVar("T")

Announce = Callable[[str, bool], None]
"""Called with a stage's title as it comes up, and whether the store held it."""


@dataclasses.dataclass(frozen=True)
class Model(Input):
    """A base model as stages read it.

    Attributes:
        path: Its folder or Hub id.
        fingerprint: As `model_fingerprint` gave it.
        dtype: The dtype that it is edited, trained and scored in, by torch's name.
        device: `"cpu"` or `"cuda"`.
        revision: The Hub revision that it is read at; the fingerprint has the commit that this stands for.
    """

    dtype: str
    device: str
    revision: str | None = dataclasses.field(default=None, metadata=OUTSIDE)


@dataclasses.dataclass(frozen=True)
class Rows(Input):
    """A local file or a Hub data set as stages read it.

    Attributes:
        path: The file, or the Hub id.
        fingerprint: As `source_fingerprint` gave it.
        config: The Hub data set's configuration.
        revision: The Hub revision; the fingerprint has it too.
    """

    config: str | None = None
    revision: str | None = dataclasses.field(default=None, metadata=OUTSIDE)


@dataclasses.dataclass(frozen=True)
class Stage(abc.ABC):
    """What all stages have. Each is a frozen dataclass in a file of its own below `stages/`.

    Fields are JSON values, dataclasses of them, inputs and other stages. All are a part of the key but those that are
    marked with `OUTSIDE`.
    """

    name: ClassVar[str]
    """Which stage it is; a folder of the store."""
    version: ClassVar[int]
    """Raised when the stage's mathematics or files change, so that results of the old one are not found any more."""

    @abc.abstractmethod
    def title(self) -> str:
        """What it does, for people."""

    @abc.abstractmethod
    def run(self, folder: Path, bench: Bench) -> None:
        """Compute the result.

        Args:
            folder: Where its files go.
            bench: Gives the folders of the stages that this one needs, and the base model.
        """

    @functools.cached_property
    def key(self) -> str:
        """What its result is kept under."""
        return key_of(self.name, self.inputs)

    @functools.cached_property
    def inputs(self) -> Mapping[str, Any]:
        """Everything that its result depends on, as JSON values; a stage stands there by its key."""
        return {"version": self.version, **values_of(self, inside=True)}

    @property
    def needs(self) -> tuple[Stage, ...]:
        """The stages that it needs, in the order of its fields, each once."""
        return tuple({stage.key: stage for stage in _found(self, Stage)}.values())

    @property
    def reads(self) -> tuple[Input, ...]:
        """What it reads from outside the store, itself and not through another stage."""
        return tuple(_found(self, Input))

    def plan(self) -> list[Stage]:
        """This stage and all that it needs, directly or not, each once and behind those that it needs itself."""
        ordered: dict[str, Stage] = {}
        waiting: list[tuple[Stage, bool]] = [(self, False)]
        while waiting:
            stage, ready = waiting.pop()
            if stage.key in ordered:
                continue
            if ready:
                ordered[stage.key] = stage
            else:
                waiting += [(stage, True), *((need, False) for need in reversed(stage.needs))]
        return list(ordered.values())


class Bench:
    """Computes stages, those first that one needs, and lends them what several of them use.

    Args:
        store: Where results are kept.
        progress: Told how far the running stage is.
        announce: Told each stage as it comes up, once.
    """

    def __init__(
        self, store: Store, progress: Progress = silent, announce: Announce = lambda title, cached: None
    ) -> None:
        self.store = store
        self.progress = progress
        self._announce = announce
        self._announced: set[str] = set()
        self._base: tuple[str, tuple[Any, Any]] | None = None
        self._kept: dict[Hashable, Any] = {}

    def get(self, stage: Stage) -> Path:
        """The folder of a stage's result, from the store or computed now, what it needs first.

        Raises:
            RetentionBenchError: As the stage, or the store.
        """
        found = self.store.find(stage)
        if found is None:
            for need in stage.needs:
                self.get(need)
        if stage.key not in self._announced:
            self._announced.add(stage.key)
            self._announce(stage.title(), found is not None)
        return found or self.store.get(stage, lambda folder: stage.run(folder, self))

    def ahead(self, stage: Stage) -> int:
        """How many stages `get` will announce: not those that only stages need which the store holds."""
        seen: set[str] = set()
        waiting = [stage]
        while waiting:
            one = waiting.pop()
            if one.key not in seen:
                seen.add(one.key)
                waiting += () if self.store.holds(one) else one.needs
        return len(seen)

    def tell(self, title: str) -> None:
        """Announce work that is no stage."""
        self._announce(title, False)

    def base(self, model: Model) -> tuple[Any, Any]:
        """A base model and its tokenizer, loaded once; whoever changes its weights puts them back."""
        key = f"{model.path} {model.fingerprint} {model.dtype} {model.device}"
        if self._base is None or self._base[0] != key:
            self.release()
            # Training keeps the dtype; the recipes' mixed precision is the fine-tune's own affair.
            self._base = key, load(model.path, model.revision, dtype=model.dtype, device=model.device)
        return self._base[1]

    def release(self) -> None:
        """Drop the base model, so that its memory is free for training."""
        self._base = None
        gc.collect()
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # other processes cannot use what torch keeps for later

    @contextlib.contextmanager
    def edited(self, model: Model, delta: Path) -> Iterator[tuple[Any, Any]]:
        """The base model with a delta applied; afterwards it has its own bits back."""
        from retention_bench.models import WeightDelta

        base, tokenizer = self.base(model)
        with WeightDelta.load(delta).applied(base):
            yield base, tokenizer

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What several stages of this run read or sample alike, such as a pool of facts; made when it is first asked.

        Args:
            key: What tells it from everything else: what it is, and the keys of the stages that it is made from.
            make: Makes it.
        """
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def _found(value: Any, kind: type) -> Iterator[Any]:
    """What of a kind stands in the fields of a stage, also within dataclasses and tuples; not within other stages."""
    parts = [getattr(value, field.name) for field in dataclasses.fields(value)] if _is_record(value) else value
    for part in parts:
        if isinstance(part, kind):
            yield part
        elif isinstance(part, tuple | list) or (_is_record(part) and not isinstance(part, Stage | Input)):
            yield from _found(part, kind)


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def values_of(record: Any, *, inside: bool) -> dict[str, Any]:
    """The fields of a dataclass as JSON values; with `inside` those alone that a key is made of."""
    fields = [f for f in dataclasses.fields(record) if not (inside and f.metadata == OUTSIDE)]
    return {f.name: _plain(getattr(record, f.name), inside=inside) for f in fields}


def _plain(value: Any, *, inside: bool) -> Any:
    if isinstance(value, Stage):
        return value.key
    if _is_record(value):
        return values_of(value, inside=inside)
    if isinstance(value, Mapping):
        return {str(name): _plain(part, inside=inside) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part, inside=inside) for part in value]
    return value
