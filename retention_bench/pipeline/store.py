"""The content-addressed store: what a stage computed, under a key made from everything it was computed from.

A stage writes into a folder with a temporary name; the manifest, which seals every file's hash, goes in last and the
folder is renamed, so a reader sees a whole result or none. What was damaged since is set aside and computed again. A
lock that the operating system drops with its process keeps two runs from the same work.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

from retention_bench import __version__
from retention_bench.data import read_json
from retention_bench.data.durable import (
    DamagedError,
    canonical,
    check,
    file_sha256,
    remove,
    seal,
    set_aside,
    sync,
    write_text,
)
from retention_bench.display import plain
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.pipeline.disk import InUseError, disk_errors, held
from retention_bench.pipeline.inputs import Input, InputChangedError, unchanged

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


class Store:
    """Stage results by key below one folder.

    Args:
        root: The folder; made when the first result is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def key(self, stage: str, inputs: Mapping[str, Any]) -> str:
        """The key of a stage's result: 32 hex digits of the hash of stage, inputs and versions.

        Raises:
            UsageError: A name among the inputs is not UTF-8, so it could not be written either.
        """
        text = canonical({"stage": stage, "inputs": inputs, "versions": versions()})
        try:
            return hashlib.sha256(text.encode()).hexdigest()[:32]
        except UnicodeEncodeError as error:
            around = text[max(0, error.start - 20) : error.end + 20]
            raise UsageError(
                f"A name is not UTF-8: {plain(around)!r}. Rename the file or the folder, or correct the suite."
            ) from error

    def find(self, stage: str, inputs: Mapping[str, Any]) -> Path | None:
        """The folder of a finished result whose every byte is what was written, or None."""
        folder = self.root / stage / self.key(stage, inputs)
        return None if self._damage(folder) else folder

    def holds(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether a finished result is there, to judge by the sizes of its files: quick, whatever they are."""
        return not self._damage(self.root / stage / self.key(stage, inputs), hash_up_to=0)

    def get(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        compute: Callable[[Path], None],
        reads: Collection[Input] = (),
    ) -> Path:
        """The folder of a stage's result, computed now unless it is there already, and whole.

        Args:
            stage: The stage's name.
            inputs: Everything the result depends on, as JSON values.
            compute: Writes the result into the folder it is given.
            reads: What `compute` reads from outside the store; it must be what the key was made from.

        Raises:
            RetentionBenchError: The store cannot be written, its disk is full, or what is read was changed.
        """
        key = self.key(stage, inputs)
        folder = self.root / stage / key
        partial, work = (folder.with_name(f"{key}.{kind}") for kind in ("partial", "work"))
        with disk_errors(f"the {stage} stage", self.root):
            if not self._damage(folder):
                shutil.rmtree(work, ignore_errors=True)  # of a run that was killed right after it had finished
                return folder
            if os.path.lexists(folder.parent) and not folder.parent.is_dir():
                set_aside(folder.parent)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with held(folder.with_name(f"{key}.lock"), f"the {stage} stage", wait=True):
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
                    with unchanged(reads):
                        compute(partial)
                    about = {
                        "stage": stage,
                        "key": key,
                        "inputs": inputs,
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

    def inspect(self, stage: str, inputs: Mapping[str, Any]) -> None:
        """Say where a result that nobody reads now is damaged, and set it aside: it is computed again when it is read.

        Of large files only the sizes are looked at, since what is not read is not worth the time. Where it cannot be
        looked at, or not be set aside, that is said, and no reason to withhold what is whole.
        """
        folder = self.root / stage / self.key(stage, inputs)
        then = "The results do not need it; it is computed again when they do"
        try:
            damage = self._damage(folder, hash_up_to=LARGE) if os.path.lexists(folder) else None
            if not damage:
                return
            with (
                disk_errors(f"the {stage} stage", self.root),
                held(folder.with_name(f"{folder.name}.lock"), f"the {stage} stage", wait=False),
            ):
                damage = self._damage(folder, hash_up_to=LARGE)
                if damage and os.path.lexists(folder):
                    self._set_aside(folder, damage, then)
        except InUseError:
            pass  # whoever computes it sees for himself
        except RetentionBenchError as error:
            _log.warning("%s", plain(f"The store's {stage} {folder.name} could not be looked after: {error} {then}."))

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

    def scratch(self, stage: str, inputs: Mapping[str, Any]) -> Path:
        """A folder for what a stage has done so far, made where it is missing.

        Unlike the folder that `compute` writes the result into, it survives a kill and an error, so that the next run
        can go on from what is in it. `get` removes it once the result is in. To be used inside `compute`. Files in it
        have a suffix, folders none: what stands in a file's place, and what is neither, is removed.

        Args:
            stage: The stage's name.
            inputs: As for `get`.
        """
        folder = self.root / stage / f"{self.key(stage, inputs)}.work"
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
    """The rows of a JSONL file; `str.splitlines` would cut a row at a U+0085 or U+2028 within a text."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


MARK = ".retention-bench"
"""Begins the names of the files that mark an output folder as ours."""


class _Mark(pydantic.BaseModel):
    written_by: Literal["evaluate", "score"]
    files: dict[str, list[str]]


class Output:
    """An output folder that this run holds.

    A file in it is replaced or removed only where its hash stands in the folder's mark: where we wrote it.
    """

    def __init__(self, directory: Path, mark: _Mark) -> None:
        self._directory, self._mark = directory, mark

    def put(self, sources: Mapping[str, Path | None]) -> None:
        """Copy files into the folder.

        Args:
            sources: By name in the folder; None for a file that must not be there.

        Raises:
            UsageError: The folder holds a file of that name that we did not write.
        """
        check_output(self._directory, self._mark.written_by, tuple(sources))
        new = {name: [file_sha256(source)] for name, source in sources.items() if source is not None}
        # A kill may come between any two of these: until all is done, both the old files and the new are ours.
        both = {name: [*self._mark.files.get(name, []), *new.get(name, [])] for name in self._mark.files | new}
        self._write(both)
        for name, source in sources.items():
            if source is None:
                (self._directory / name).unlink(missing_ok=True)
                continue
            partial = self._directory / f"{MARK}.{name}"
            partial.unlink(missing_ok=True)
            shutil.copyfile(source, partial)
            sync(partial)
            partial.replace(self._directory / name)
        sync(self._directory)
        self._write({name: hashes for name, hashes in self._mark.files.items() if name not in sources} | new)

    def _write(self, files: dict[str, list[str]]) -> None:
        self._mark = _Mark(written_by=self._mark.written_by, files=files)
        write_text(self._directory / MARK, self._mark.model_dump_json(indent=2))


def check_output(directory: Path, kind: Literal["evaluate", "score"], names: Collection[str] = ()) -> None:
    """Refuse an output folder that is not ours; nothing is written.

    Args:
        directory: The folder; ours are those that are not there yet, empty, or marked by a run of the same kind.
        kind: The command that wants it.
        names: The files that will be replaced in it.

    Raises:
        UsageError: It holds something else, or there can be no such folder.
        RetentionBenchError: It may not be read.
    """
    _read_mark(directory, kind, names)


def _read_mark(directory: Path, kind: Literal["evaluate", "score"], names: Collection[str]) -> _Mark:
    remedy = "Give a new or an empty folder with --out."
    try:
        found = sorted(os.listdir(directory))
    except FileNotFoundError:
        if directory.is_symlink():
            raise UsageError(f"The output folder {directory} is a link to nothing. {remedy}") from None
        found = []
    except NotADirectoryError:
        raise UsageError(f"The output folder {directory} is a file, or lies below one. {remedy}") from None
    except PermissionError as error:
        raise RetentionBenchError(f"The output folder {directory} may not be read: {error.strerror}.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"There can be no output folder {str(directory)!r}: {reason}. {remedy}") from error
    if all(name.startswith(f"{MARK}.") for name in found):  # empty, but for what a killed run left
        return _Mark(written_by=kind, files={})
    if MARK not in found:
        listed = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise UsageError(
            f"The output folder {directory} holds {listed}, and `retention-bench {kind}` did not write it. Nothing was "
            f"touched. {remedy}"
        )
    try:
        mark = read_json(directory / MARK, _Mark)
    except RetentionBenchError as error:
        raise UsageError(f"The output folder {directory} has a mark that is not ours: {error} {remedy}") from error
    if mark.written_by != kind:
        raise UsageError(
            f"The output folder {directory} holds what `retention-bench {mark.written_by}` wrote, not {kind}. {remedy}"
        )
    for name in set(names) & set(found):
        path = directory / name
        ours = stat.S_ISREG(os.lstat(path).st_mode) and file_sha256(path) in mark.files.get(name, ())
        if not ours:
            raise UsageError(
                f"{path} would be replaced, and is not what `retention-bench {kind}` wrote there. Nothing was touched. "
                "Move it away, or give another folder with --out."
            )
    return mark


@contextlib.contextmanager
def exclusive(directory: Path, kind: Literal["evaluate", "score"], names: Collection[str] = ()) -> Iterator[Output]:
    """Hold an output folder against other runs, and mark it as ours.

    Args:
        directory: The folder; it is made where it's missing.
        kind: As for `check_output`.
        names: As for `check_output`.

    Raises:
        UsageError: As `check_output`.
        RetentionBenchError: Another run holds it, or it cannot be written.
    """
    check_output(directory, kind, names)
    with disk_errors("the output folder", directory):
        directory.mkdir(parents=True, exist_ok=True)
        with held(directory / f"{MARK}.lock", f"The output folder {directory}", wait=False):
            mark = _read_mark(directory, kind, names)
            if not (directory / MARK).exists():
                write_text(directory / MARK, mark.model_dump_json(indent=2))
            yield Output(directory, mark)
