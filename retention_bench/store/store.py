"""The content-addressed store: what a stage computed, under a key made from everything it was computed from.

A stage writes into a folder with a temporary name; the manifest, which seals every file's hash, goes in last and the
folder is renamed, so a reader sees a whole result or none. What was damaged since is set aside and computed again. A
lock that the operating system drops with its process keeps two runs from the same work.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import resource
import shutil
import stat
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from retention_bench.data.durable import (
    DamagedError,
    canonical,
    check,
    remove,
    seal,
    set_aside,
    sync,
)
from retention_bench.display import plain
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.store.disk import InUseError, disk_errors, held
from retention_bench.store.fingerprints import Input, InputChangedError, unchanged
from retention_bench.version import __version__

_log = logging.getLogger("retention_bench")

MANIFEST = "manifest.json"
LARGE = 2**28
"""Bytes of a file that is hashed only to be read."""
NUMERICS = ("torch", "transformers", "tokenizers", "trl", "peft", "accelerate", "lm-eval", "datasets")
"""The packages whose version is a part of every key: another version may compute another result."""


def default_root() -> Path:
    """`$RETENTION_BENCH_STORE`, or a folder in the user's cache; below the working folder where there is no home.

    Raises:
        UsageError: `$RETENTION_BENCH_STORE` begins with a `~` that stands for nothing, or is not UTF-8.
    """
    named = os.environ.get("RETENTION_BENCH_STORE")
    try:
        if named:
            named.encode()  # the libraries that read tensors and tokenizers take no other names
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retention-bench"
    except UnicodeEncodeError as error:
        raise UsageError(f"RETENTION_BENCH_STORE is {named!r}, which is not UTF-8. Name another folder.") from error
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


class Keyed(Protocol):
    """What the store keeps a result of: a stage, or an `Entry`."""

    @property
    def name(self) -> str:
        """Which kind of stage it is; a folder of the store."""

    @property
    def key(self) -> str:
        """As `key_of` makes it."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Everything the result depends on, as JSON values; the manifest keeps them."""

    @property
    def reads(self) -> Collection[Input]:
        """What is read from outside the store; it must be what the key was made from."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A result that no stage computes, such as a file that was brought from elsewhere; see `Keyed`."""

    name: str
    inputs: Mapping[str, Any]
    reads: tuple[Input, ...] = ()

    @functools.cached_property
    def key(self) -> str:
        """As `key_of` makes it."""
        return key_of(self.name, self.inputs)


def key_of(name: str, inputs: Mapping[str, Any]) -> str:
    """The key of a stage's result: 32 hex digits of the hash of stage, inputs and versions.

    Args:
        name: The stage's name.
        inputs: Everything the result depends on, as JSON values.

    Raises:
        UsageError: A name among the inputs is not UTF-8, so it could not be written either.
    """
    text = canonical({"stage": name, "inputs": inputs, "versions": versions()})
    try:
        return hashlib.sha256(text.encode()).hexdigest()[:32]
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20]
        raise UsageError(
            f"A name is not UTF-8: {plain(around)!r}. Rename the file or the folder, or correct the suite."
        ) from error


class Store:
    """Results by key below one folder.

    Args:
        root: The folder; made when the first result is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def place(self, entry: Keyed) -> Path:
        """The folder that a result has, or will have."""
        return self.root / entry.name / entry.key

    def find(self, entry: Keyed) -> Path | None:
        """The folder of a finished result whose every byte is what was written, or None."""
        folder = self.place(entry)
        return None if self._damage(folder) else folder

    def holds(self, entry: Keyed) -> bool:
        """Whether a finished result is there, to judge by the sizes of its files: quick, whatever they are."""
        return not self._damage(self.place(entry), hash_up_to=0)

    def get(self, entry: Keyed, compute: Callable[[Path], None]) -> Path:
        """The folder of a result, computed now unless it is there already, and whole.

        Args:
            entry: What the result is of.
            compute: Writes the result into the folder it is given.

        Raises:
            RetentionBenchError: The store cannot be written, its disk is full, or what is read was changed.
        """
        key, folder = entry.key, self.place(entry)
        partial, work = (folder.with_name(f"{key}.{kind}") for kind in ("partial", "work"))
        with disk_errors(f"the {entry.name} stage", self.root):
            if not self._damage(folder):
                shutil.rmtree(work, ignore_errors=True)  # of a run that was killed right after it had finished
                return folder
            if os.path.lexists(folder.parent) and not folder.parent.is_dir():
                set_aside(folder.parent)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with held(folder.with_name(f"{key}.lock"), f"the {entry.name} stage", wait=True):
                damage = self._damage(folder)
                if not damage:  # another run has just finished it
                    return folder
                if os.path.lexists(folder):
                    self._set_aside(folder, damage, "It is computed again")
                # What a killed run left behind; nobody works on it, since we hold the lock.
                remove(partial)
                partial.mkdir()
                began = time.monotonic()
                try:
                    with unchanged(entry.reads):
                        compute(partial)
                    about = {
                        "stage": entry.name,
                        "key": key,
                        "inputs": entry.inputs,
                        "versions": versions(),
                        "seconds": round(time.monotonic() - began, 3),
                        "peak_memory_mib": peak_memory_mib(),
                    }
                    seal(partial, MANIFEST, about)
                except BaseException as error:
                    remove(partial)
                    if isinstance(error, InputChangedError):
                        remove(work)  # it may have begun with what the file was meanwhile
                    raise
                partial.rename(folder)
                sync(folder.parent)
                shutil.rmtree(work, ignore_errors=True)
        return folder

    def inspect(self, entry: Keyed) -> None:
        """Say where a result that nobody reads now is damaged, and set it aside: it is computed again when it is read.

        Of large files only the sizes are looked at, since what is not read is not worth the time. Where it cannot be
        looked at, or not be set aside, that is said, and no reason to withhold what is whole.
        """
        folder = self.place(entry)
        then = "The results do not need it; it is computed again when they do"
        try:
            damage = self._damage(folder, hash_up_to=LARGE) if os.path.lexists(folder) else None
            if not damage:
                return
            with (
                disk_errors(f"the {entry.name} stage", self.root),
                held(folder.with_name(f"{folder.name}.lock"), f"the {entry.name} stage", wait=False),
            ):
                damage = self._damage(folder, hash_up_to=LARGE)
                if damage and os.path.lexists(folder):
                    self._set_aside(folder, damage, then)
        except InUseError:
            pass  # whoever computes it sees for himself
        except RetentionBenchError as error:
            what = f"The store's {entry.name} {folder.name} could not be looked after: {error} {then}."
            _log.warning("%s", plain(what))

    def _set_aside(self, folder: Path, damage: str, then: str) -> None:
        aside = set_aside(folder)
        about = (
            f"The store's {folder.parent.name} {folder.name} is damaged: {damage}. {then}; what was there is kept as"
        )
        _log.warning("%s", plain(f"{about} {aside}."))

    def _damage(self, folder: Path, *, hash_up_to: float = math.inf) -> str | None:
        """Why a folder is no finished result, in a few words; None where it is one."""
        with disk_errors(f"the {folder.parent.name} stage", self.root):
            try:
                os.lstat(folder)
            except (FileNotFoundError, NotADirectoryError):
                return "it is not there"
            try:
                found = check(folder, MANIFEST, hash_up_to=hash_up_to)
            except DamagedError as error:
                return str(error)
        of = (found.get("stage"), found.get("key"))
        return None if of == (folder.parent.name, folder.name) else f"it is of another stage, {of[0]} {of[1]}"

    def scratch(self, entry: Keyed) -> Path:
        """A folder for what a stage has done so far, made where it is missing.

        Unlike the folder that `compute` writes the result into, it survives a kill and an error, so that the next run
        can go on from what is in it. `get` removes it once the result is in. To be used inside `compute`. Files in it
        have a suffix, folders none: what stands in a file's place, and what is neither, is removed.

        Args:
            entry: As for `get`.
        """
        folder = self.place(entry).with_name(f"{entry.key}.work")
        if folder.is_symlink() or not folder.is_dir():
            remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            # Nobody could write a file where something else has its name, and all that has a suffix is a file.
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and not path.suffix)):
                _log.warning("%s", plain(f"{path} is no file of ours, and was removed."))
                remove(path)
        return folder


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished result, from a folder that the store has given out."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def peak_memory_mib() -> int:
    """The process's peak resident memory so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of ours; `str.splitlines` would cut a row at a U+0085 or U+2028 within a text."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
