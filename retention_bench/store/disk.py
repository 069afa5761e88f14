"""What the disk does to a run: it is full, it may not be written, another run holds a folder."""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pydantic
from filelock import FileLock, Timeout

from retention_bench.data import read_json
from retention_bench.data.durable import set_aside, write_text
from retention_bench.display import plain
from retention_bench.errors import RetentionBenchError

_log = logging.getLogger("retention_bench")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO, errno.EISDIR)
# safetensors, tokenizers, torch and numpy report a failed write as an error of their own, which may quote the cause
_SAYS_FULL = re.compile(
    "|".join(re.escape(os.strerror(number)) for number in _FULL)
    + r"|os error (28|122|27)\b|unexpected pos \d+ vs \d+|PytorchStreamWriter failed writing"
    r"|\d+ requested and \d+ written"
)


class InUseError(RetentionBenchError):
    """Another run holds what this one wants, and this one does not wait for it."""


class _Holder(pydantic.BaseModel):
    pid: int
    host: str
    since: str


@contextlib.contextmanager
def disk_errors(what: str, where: Path) -> Iterator[None]:
    """Say plainly that a disk is full or a folder not writable, whichever library noticed it.

    Args:
        what: What is written: `"the edit stage"`.
        where: The folder that it is written below.

    Raises:
        RetentionBenchError: The disk is full, or the folder cannot be written.
    """
    try:
        yield
    except RetentionBenchError:
        raise
    except Exception as error:
        if any(_says_full(one) for one in _chain(error)):
            raise RetentionBenchError(
                f"The disk is full: {what} could not be written below {where}. A quota, or a limit on the size of "
                "files (ulimit -f), counts too. Every stage that had finished is kept; free some space, or name a "
                "folder on a larger disk, for the store with RETENTION_BENCH_STORE, and run the same command again."
            ) from error
        refused = isinstance(error, PermissionError | NotADirectoryError | FileExistsError)
        if refused or (isinstance(error, OSError) and error.errno in _REFUSED):
            raise RetentionBenchError(
                f"{what.capitalize()} could not be written: {error}. Give a folder that can be written; for the store, "
                "set RETENTION_BENCH_STORE to one."
            ) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from: the first to notice a full disk is often not the last to complain."""
    for _ in range(20):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _says_full(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in _FULL) or _SAYS_FULL.search(str(error)) is not None


@contextlib.contextmanager
def held(lock: Path, what: str, *, wait: bool) -> Iterator[None]:
    """Hold a lock that the operating system drops with this process; who holds it stands in a file beside it.

    Args:
        lock: The lock's file, in a folder that exists.
        what: What it is held for: `"the edit stage"`.
        wait: Whether to wait for another run that holds it, which is said once, or to refuse.

    Raises:
        InUseError: Another run holds it.
    """
    beside = lock.with_suffix(".holder")
    if os.path.lexists(lock) and not stat.S_ISREG(os.lstat(lock).st_mode):
        set_aside(lock)
    own = FileLock(lock)
    try:
        own.acquire(timeout=0)
    except Timeout:
        holder = _holder(beside)
        if not wait:
            raise InUseError(
                f"{what} is in use by another run: {holder}. Wait for it to end, or give another with --out."
            ) from None
        _log.warning("%s", plain(f"Waiting for {holder}, which is computing {what}."))
        own.acquire(poll_interval=0.2)
    try:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        # Only for people: without it the lock is as good.
        with contextlib.suppress(OSError):
            write_text(beside, _Holder(pid=os.getpid(), host=socket.gethostname(), since=now).model_dump_json())
        yield
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        own.release()


def _holder(beside: Path) -> str:
    try:
        found = read_json(beside, _Holder)
    except RetentionBenchError:  # it has not written it yet, or could not
        return "another process"
    return f"process {found.pid} on {found.host}, which began at {found.since}"
