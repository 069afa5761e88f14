"""The content-addressed store: what a stage computed, under a key made from everything it was computed from.

A stage writes into a folder with a temporary name; the manifest goes in last and the folder is renamed, so a reader
sees a whole result or none. A lock that the operating system drops with its process keeps two runs from the same work.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from retention_bench import __version__
from retention_bench.errors import RetentionBenchError, UsageError

NUMERICS = ("torch", "transformers", "tokenizers", "trl", "peft", "accelerate", "lm-eval", "datasets")
"""The packages whose version is a part of every key: another version may compute another result."""


def default_root() -> Path:
    """`$RETENTION_BENCH_STORE`, or a folder in the user's cache; below the working folder where there is no home.

    Raises:
        UsageError: `$RETENTION_BENCH_STORE` begins with a `~` that stands for nothing.
    """
    named = os.environ.get("RETENTION_BENCH_STORE")
    try:
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retention-bench"
    except RuntimeError as error:
        if named:
            raise UsageError(
                f"RETENTION_BENCH_STORE is {named!r}, and there is no such home. Name a folder."
            ) from error
        return Path.cwd() / ".cache" / "retention-bench"  # as in a container without $HOME and without the user's name


@functools.cache
def versions() -> dict[str, str]:
    """Versions of this package and of `NUMERICS`."""
    return {"retention-bench": __version__} | {name: importlib.metadata.version(name) for name in NUMERICS}


def canonical(value: Any) -> str:
    """JSON with sorted keys and no white space: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """Stage results by key below one folder.

    Args:
        root: The folder; made when the first result is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def key(self, stage: str, inputs: Mapping[str, Any]) -> str:
        """The key of a stage's result: 32 hex digits of the hash of stage, inputs and versions."""
        text = canonical({"stage": stage, "inputs": inputs, "versions": versions()})
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def find(self, stage: str, inputs: Mapping[str, Any]) -> Path | None:
        """The folder of a finished result, or None."""
        folder = self.root / stage / self.key(stage, inputs)
        return folder if (folder / "manifest.json").is_file() else None

    def get(self, stage: str, inputs: Mapping[str, Any], compute: Callable[[Path], None]) -> Path:
        """The folder of a stage's result, computed now unless it is there already.

        Args:
            stage: The stage's name.
            inputs: Everything the result depends on, as JSON values.
            compute: Writes the result into the folder it is given.

        Raises:
            RetentionBenchError: The store cannot be written, or its disk is full.
        """
        key = self.key(stage, inputs)
        folder = self.root / stage / key
        partial, work = (folder.with_name(f"{key}.{kind}") for kind in ("partial", "work"))
        found = self.find(stage, inputs)
        if found is not None:
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed right after it had finished
            return found
        with _disk_errors(f"the {stage} stage", self.root):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f"{key}.lock")):
                if (folder / "manifest.json").is_file():  # another run has just finished it
                    return folder
                # What a killed run left behind; nobody works on it, since we hold the lock.
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                began = time.monotonic()
                try:
                    compute(partial)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                manifest = {
                    "stage": stage,
                    "key": key,
                    "inputs": inputs,
                    "versions": versions(),
                    "seconds": round(time.monotonic() - began, 3),
                    "peak_memory_mib": peak_memory_mib(),
                }
                write_text(partial / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False))
                partial.rename(folder)
                shutil.rmtree(work, ignore_errors=True)
        return folder

    def scratch(self, stage: str, inputs: Mapping[str, Any]) -> Path:
        """A folder for what a stage has done so far, made where it is missing.

        Unlike the folder that `compute` writes the result into, it survives a kill and an error, so that the next run
        can go on from what is in it. `get` removes it once the result is in. To be used inside `compute`.

        Args:
            stage: The stage's name.
            inputs: As for `get`.
        """
        folder = self.root / stage / f"{self.key(stage, inputs)}.work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished result."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def peak_memory_mib() -> int:
    """The process's peak resident memory so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; `str.splitlines` would cut a row at a U+0085 or U+2028 within a text."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_text(path: Path, text: str) -> None:
    """Write a text to a temporary name, then rename it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold an output folder against other runs.

    Args:
        directory: The folder; it is made where it's missing.

    Raises:
        RetentionBenchError: Another run holds it, or it cannot be written.
    """
    with _disk_errors("the output folder", directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RetentionBenchError(
                f"The output folder {directory} is in use by another run. "
                "Wait for it to end, or give another with --out."
            ) from None
        try:
            yield
        finally:
            lock.release()


@contextlib.contextmanager
def _disk_errors(what: str, where: Path) -> Iterator[None]:
    """Say plainly that a disk is full or a folder not writable, whichever library noticed it."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors and torch report a failed write as an error of their own that only quotes the cause
        if (
            number in (errno.ENOSPC, errno.EDQUOT)
            or "No space left on device" in str(error)
            or "os error 28" in str(error)
        ):
            raise RetentionBenchError(
                f"The disk is full: {what} could not be written below {where}. Every stage that had finished is kept; "
                "free some space, or set RETENTION_BENCH_STORE to a folder on a larger disk, and run the same command "
                "again."
            ) from error
        if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)) or number == errno.EROFS:
            raise RetentionBenchError(
                f"{what.capitalize()} could not be written: {error}. Give a folder that can be written."
            ) from error
        raise
