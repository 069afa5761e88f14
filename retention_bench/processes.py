"""Processes that are started by one of ours, and end with it."""

from __future__ import annotations

import os
import threading


def end_with_parent() -> None:
    """From now on, end at once when the process that started this one is gone, however it went.

    That process holds the other end of this one's standard input, which ends with it.
    """
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
