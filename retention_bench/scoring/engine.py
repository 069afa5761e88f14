"""The protocol of what scores one checkpoint after another."""

from __future__ import annotations

from typing import Protocol

from lm_eval.api.model import TemplateLM

from retention_bench.models import Checkpoint


class Engine(Protocol):
    """What scores checkpoints.

    Attributes:
        lm: What to hand to `score_lm`, and to lm-eval for tasks of its own; there is one once a swap has succeeded.
    """

    lm: TemplateLM

    def swap(self, checkpoint: Checkpoint) -> None:
        """Answer with another checkpoint from now on.

        Raises:
            UsageError: As `Checkpoint.load`.
            RetentionBenchError: As `Checkpoint.load`; or the checkpoint has generation settings that change greedy
                answers. The engine then answers nothing until a swap has succeeded.
        """

    def close(self) -> None:
        """End it and give back all its memory; may be called twice."""
