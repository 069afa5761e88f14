"""How far a collection of covariance is, in memory and in a checkpoint, so that one that was cut off goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor

from retention_bench.data.durable import set_aside
from retention_bench.display import plain
from retention_bench.editors.covariance.fingerprint import distance
from retention_bench.editors.covariance.sums import Sums, block_shapes
from retention_bench.errors import RetentionBenchError
from retention_bench.models import read_tensors, write_tensors

_log = logging.getLogger("retention_bench")

_KIND = "checkpoint of a covariance"
_VERSION = 2
_GROUP = 100  # texts that are sorted by length together, so that a batch has little padding
_SAME = 5e-3  # relative distance of fingerprints of the same weights; the number of threads may change their bits
_SHARE = 20  # a checkpoint takes at most about 1/20 of the time

_Whole = Annotated[int, pydantic.Field(strict=True, ge=0, le=sys.maxsize)]


class _State(pydantic.BaseModel):
    """How far a run was.

    Attributes:
        done: Texts of its pass.
        tokens: Tokens of its pass.
        digest: Hash of those texts.
        whole: The same three for a whole pass, once there was one.
        finished: Layers of the passes that are over.
        summed: Number of blocks of each layer of its pass.
    """

    done: _Whole
    tokens: _Whole
    digest: str
    whole: tuple[_Whole, _Whole, str]
    finished: list[_Whole]
    summed: dict[int, _Whole]


class _About(pydantic.BaseModel):
    """What stands beside a checkpoint's tensors."""

    run: dict[str, Any]
    state: _State


class _OtherRunError(RetentionBenchError):
    """A checkpoint is whole, and belongs to another run."""


class Run:
    """What a run has so far: the matrices of finished passes, and the sums of the pass that it is in.

    Args:
        fingerprint: The model's, by layer.
        about: What must agree for a checkpoint to be gone on from: JSON values.
        dtype: The dtype of the sums.
        path: The checkpoint's file, or None.
        every: Seconds between two checkpoints at least.
    """

    def __init__(
        self,
        fingerprint: dict[int, Tensor],
        about: Mapping[str, Any],
        dtype: torch.dtype,
        path: Path | None,
        every: float,
    ) -> None:
        self.fingerprint = fingerprint
        self.dtype = dtype
        self.about = json.loads(json.dumps(about))  # as a checkpoint gives it back
        self.path = path
        self.every = every
        self.due = time.monotonic() + every
        self.mom2: dict[int, Tensor] = {}
        self.sums: Sums | None = None
        self.done, self.tokens, self.digest = 0, 0, ""
        self.whole: tuple[int, int, str] = (0, 0, "")  # the same at the end of a pass

    def groups(self, texts: Iterator[str]) -> Iterator[list[str]]:
        """The texts in groups, without those that an earlier run had done.

        A group counts as done when the next one is asked for, and then a checkpoint is written if one is due.

        Raises:
            RetentionBenchError: The texts are not those that the earlier run had.
        """
        before, digest, seen = self.done, hashlib.sha256(), 0
        while group := list(itertools.islice(texts, _GROUP)):
            for text in group:
                contents = text.encode("utf-8", "surrogatepass")
                digest.update(len(contents).to_bytes(8, "big") + contents)
            seen += len(group)
            if seen - len(group) < before:
                if seen > before or (seen == before and digest.hexdigest() != self.digest):
                    raise self._other("its texts are others")
                continue
            yield group
            self.done, self.digest = seen, digest.hexdigest()
            if self.path and time.monotonic() >= self.due:
                self._save(self.path)
        if seen < before:
            raise self._other(f"it had {before} texts already, and this one has {seen}")

    def finish(self) -> None:
        """End a pass.

        Raises:
            RetentionBenchError: There was no token, or the texts were others than in the pass before.
        """
        if not self.tokens:
            raise RetentionBenchError("The texts for the covariance hold no token. Give texts that are not empty.")
        whole = (self.done, self.tokens, self.digest)
        if self.mom2 and whole != self.whole:
            raise RetentionBenchError(
                "The texts for the covariance were not the same in two passes over them. Give texts that stay the same."
            )
        assert self.sums is not None
        self.mom2 |= self.sums.means(self.tokens)
        self.sums, self.whole = None, whole
        self.done, self.tokens, self.digest = 0, 0, ""

    def resume(self, device: torch.device) -> None:
        """Go on from the checkpoint, where there is one.

        Raises:
            RetentionBenchError: It is of another run.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            tensors, about = read_tensors(self.path, _About, kind=_KIND, version=_VERSION)
            for name, ours in self.about.items():
                if about.run.get(name) != ours:
                    raise self._other(f"its {name} is {str(about.run.get(name))[:200]}, this one's {ours}")
            state = about.state
            if {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} != self._contents(state):
                raise RetentionBenchError(f"{self.path} is damaged: it lacks tensors, or has others.")
        except _OtherRunError:
            raise
        except RetentionBenchError as error:
            # Left where it is, it would stop every later run too.
            aside = set_aside(self.path)
            notice = f"{error} It was set aside as {aside}, and the covariance is collected from the start."
            _log.warning("%s", plain(notice))
            return
        if not all(distance(tensors[f"fingerprint.{layer}"], keys) < _SAME for layer, keys in self.fingerprint.items()):
            raise self._other("its model has other weights")
        self.done, self.tokens, self.digest = state.done, state.tokens, state.digest
        self.whole = state.whole
        self.mom2 = {layer: tensors[f"mom2.{layer}"] for layer in state.finished}
        self.sums = Sums(
            {
                layer: [tensors[f"sum.{layer}.{number}"].to(device) for number in range(blocks)]
                for layer, blocks in sorted(state.summed.items())
            }
        )

    def _contents(self, state: _State) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """The tensors of a checkpoint in a state, dtype and shape by name; none where a run is never in that state.

        A run is in one of its passes, and has the matrices of those before.
        """
        for number, part in enumerate(self.about["passes"]):
            if part != sorted(state.summed) or state.finished != list(itertools.chain(*self.about["passes"][:number])):
                continue
            sizes = {layer: len(keys) for layer, keys in self.fingerprint.items()}
            found = {f"fingerprint.{layer}": (torch.float32, [size]) for layer, size in sizes.items()}
            found |= {f"mom2.{layer}": (torch.float32, [sizes[layer]] * 2) for layer in state.finished}
            for layer in part:
                shapes = enumerate(block_shapes(sizes[layer]))
                found |= {f"sum.{layer}.{block}": (self.dtype, list(shape)) for block, shape in shapes}
            return {name: (dtype, torch.Size(shape)) for name, (dtype, shape) in found.items()}
        return {}

    def _save(self, path: Path) -> None:
        began = time.monotonic()
        tensors = {f"fingerprint.{layer}": keys for layer, keys in self.fingerprint.items()}
        tensors |= {f"mom2.{layer}": matrix for layer, matrix in self.mom2.items()}
        assert self.sums is not None
        for layer, blocks in self.sums.blocks.items():
            tensors |= {f"sum.{layer}.{number}": block.cpu() for number, block in enumerate(blocks)}
        state = {
            "done": self.done,
            "tokens": self.tokens,
            "digest": self.digest,
            "whole": self.whole,
            "finished": list(self.mom2),
            "summed": {layer: len(blocks) for layer, blocks in self.sums.blocks.items()},
        }
        write_tensors(path, tensors, kind=_KIND, version=_VERSION, run=self.about, state=state)
        now = time.monotonic()
        self.due = now + (max(self.every, _SHARE * (now - began)) if self.every else 0)

    def _other(self, why: str) -> _OtherRunError:
        return _OtherRunError(
            f"The checkpoint {self.path} is of another run: {why}. Delete it to begin anew, or name another file."
        )
