"""What asks one model after another: a live model whose weights are exchanged in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from lm_eval.api.model import TemplateLM
from torch import Tensor


class Engine(Protocol):
    """A live model for scoring.

    Attributes:
        lm: What to hand to `score_lm`, and to lm-eval for tasks of its own; the same object before and after a swap.
    """

    lm: TemplateLM

    def swap(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put other weights into the model, in place.

        Args:
            weights: All of a model's weights by name, as a checkpoint in the Hugging Face layout has them, each in any
                dtype. A tied head may be among them or not. They may be read in another process, so they must be
                something that can be pickled: a `Checkpoint`, or for small models a list; no generator.

        Raises:
            RetentionBenchError: One is missing, not known, or of another shape. The engine then answers nothing until
                a swap has succeeded.
        """

    def close(self) -> None:
        """End it and give back all its memory; may be called twice."""
