"""Output folders: new, or marked as ours by a file of ours; what others wrote is neither replaced nor removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

import pydantic

from retention_bench.data import read_json
from retention_bench.data.durable import file_sha256, sync, write_text
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.store.disk import disk_errors, held

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
