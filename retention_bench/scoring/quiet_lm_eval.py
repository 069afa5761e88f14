"""lm-eval without its progress bars, its log lines and its use of the global random generator."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
from collections.abc import Iterator

import lm_eval.api.task


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keep lm-eval from writing to the terminal, errors apart, and from advancing Python's random generator."""
    logger = logging.getLogger("lm_eval")
    level, bar, state = logger.level, lm_eval.api.task.tqdm, random.getstate()
    logger.setLevel(logging.ERROR)
    # The bar of "building contexts" has no switch, so it is swapped for one that does not draw.
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
        random.setstate(state)  # lm-eval draws a random name for each task that it looks up
