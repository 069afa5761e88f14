"""What a running stage may use: the folders of other stages, the base model kept loaded between them, progress."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from retention_bench.display.progress import Progress, silent
from retention_bench.pipeline.loading import load
from retention_bench.pipeline.stage import Model, Stage
from retention_bench.store import Store

T = TypeVar("T")

Announce = Callable[[str, bool], None]
"""Called with a stage's title as it comes up, and whether the store held it."""


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
