"""What libraries say over somebody's files: one line for whatever they raise, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers.utils import logging

from retention_bench.errors import RetentionBenchError


@contextlib.contextmanager
def explained(path: str, what: str = "model") -> Iterator[None]:
    """Say of whatever the libraries raise which files it is about.

    Args:
        path: The files.
        what: What they should hold.

    Raises:
        RetentionBenchError: In place of every error of theirs, of whatever kind: a stranger's file can raise any.
    """
    try:
        yield
    except (RetentionBenchError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RetentionBenchError(f"The {what} in {path} could not be loaded ({reason(error)}).") from error


def reason(error: BaseException) -> str:
    """An error's kind and text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' own bars and warnings: our own progress says what is going on."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
