"""Write to standard output and standard error, whatever their encoding; what is printed never ends a run."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING, Any, TextIO

from retention_bench.display.escape import json_text, plain

if TYPE_CHECKING:
    from retention_bench.display.terminal import Screen


def prepare_streams() -> None:
    r"""Have the standard streams write what their encoding lacks as `\u2026`, where they would raise an error.

    Warnings that the package logs are said on standard error.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(ValueError):  # it was detached, or closed
                stream.reconfigure(errors="backslashreplace")
    log = logging.getLogger("retention_bench")
    if not log.handlers:
        log.addHandler(_Said())


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say_error(record.getMessage())


def say(text: object) -> None:
    """Print a text of anybody's on standard output."""
    _write(sys.stdout, plain(text))


def say_error(text: object) -> None:
    """Print a text of anybody's on standard error."""
    _write(sys.stderr, plain(text))


def say_json(value: Any, *, indent: int | None = 2) -> None:
    """Print JSON on standard output; in ASCII where the output is not UTF-8, so that it stays JSON."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").replace("_", "")
    _write(sys.stdout, json_text(value, indent=indent, ascii_only=encoding != "utf8"))


def screen(*, stderr: bool = False) -> Screen:
    """A `Screen` on standard output, or on standard error; imported here, since rich takes a while."""
    from retention_bench.display.terminal import Screen

    return Screen(stderr=stderr)


def _write(stream: TextIO | None, text: str) -> None:
    if stream is not None:  # there is none where a process was started without
        stream.write(text + "\n")
        stream.flush()
