"""One line for whatever a library raises over somebody's files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

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
