"""Our own files and folders: written durably and sealed, so that later damage is noticed.

A seal is a JSON file in a folder: the size and the SHA-256 of every file below that folder, and a hash of itself. Sizes
cost next to nothing to check; a file's hash is taken once in a process, and again where the file was written to.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pydantic

from retention_bench.data.files import checked, parse_json, read_text
from retention_bench.errors import RetentionBenchError

FORMAT = 2
"""Of a seal; 1 had neither sizes nor hashes."""

KEPT = 2
"""How many things of one name are kept that were set aside."""

_SETTLED_NS = 50_000_000
_hashed: dict[tuple[int, ...], str] = {}


class DamagedError(RetentionBenchError):
    """A sealed folder is not what was sealed; the message says what of it, in a few words."""


class _File(pydantic.BaseModel):
    size: int
    sha256: str


class _Seal(pydantic.BaseModel, extra="allow"):
    files: dict[str, _File]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no white space: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, taken once in a process for a file that nobody writes to."""
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        seen = _identity(found)
        if seen in _hashed:
            return _hashed[seen]
        began = time.time_ns()
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        # Clocks of file systems tick slowly: what was written a moment ago may be written again at the same time.
        settled = began - max(found.st_mtime_ns, found.st_ctime_ns) > _SETTLED_NS
        if settled and _identity(os.fstat(file.fileno())) == seen:
            _hashed[seen] = digest
    return digest


def sync(path: Path) -> None:
    """See to it that a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a file system that has no such thing for folders
            raise
    finally:
        os.close(number)


def write_text(path: Path, text: str) -> None:
    """Write a text to a temporary name, bring it to the disk, then rename it."""
    partial = path.with_name(f".{path.name.removeprefix('.')}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, or nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename what is damaged, and remove all but the last of what was set aside before.

    Args:
        path: A file, a folder or a link.

    Returns:
        Where it is now.
    """
    pattern = re.compile(re.escape(path.name) + r"\.damaged-(\d{1,9})")
    earlier = sorted(
        (int(found[1]), other) for other in path.parent.iterdir() if (found := pattern.fullmatch(other.name))
    )
    target = path.with_name(f"{path.name}.damaged-{earlier[-1][0] + 1 if earlier else 1}")
    path.rename(target)
    for _, old in earlier[: max(0, len(earlier) + 1 - KEPT)]:
        remove(old)
    return target


def seal(folder: Path, name: str, about: Mapping[str, Any], beside: Collection[str] = ()) -> None:
    """Bring a folder to the disk and write its seal.

    Args:
        folder: The folder; it holds nothing but regular files and folders.
        name: The seal's file name.
        about: JSON values to keep in the seal.
        beside: Paths, relative to the folder, of files outside that belong to it.
    """
    found = _listing(folder)
    found.pop(name, None)
    for file, one in found.items():
        if not stat.S_ISREG(one.st_mode):
            raise RetentionBenchError(
                f"{folder / file} is no regular file, and nothing else can be kept. Write a file."
            )
    files = {}
    for file in (*found, *beside):
        sync(folder / file)
    for file in sorted([*found, *beside]):
        files[file] = {"size": (folder / file).stat().st_size, "sha256": file_sha256(folder / file)}
    # As it will be read again: JSON turns keys into texts.
    sealed = json.loads(json.dumps({"format": FORMAT, **about, "files": files}))
    sealed["sha256"] = _own_hash(sealed)
    write_text(folder / name, _text(sealed))
    for place, _, _ in os.walk(folder):
        sync(Path(place))


def check(folder: Path, name: str, *, hash_up_to: float = math.inf) -> dict[str, Any]:
    """Check that a folder is what was sealed: no file changed, missing, too many, or a link.

    Args:
        folder: The folder.
        name: The seal's file name.
        hash_up_to: Of files with more bytes only the size is looked at.

    Returns:
        What the seal says.

    Raises:
        DamagedError: It is not.
        RetentionBenchError: It may not be read.
    """
    try:
        return _check(folder, name, hash_up_to)
    except PermissionError as error:
        raise RetentionBenchError(
            f"{error.filename or folder} may not be read: {error.strerror}. Change its permissions."
        ) from error
    except OSError as error:
        raise DamagedError(f"{Path(str(error.filename or folder)).name} cannot be read ({error.strerror})") from error


def _check(folder: Path, name: str, hash_up_to: float) -> dict[str, Any]:
    if not stat.S_ISDIR(folder.stat().st_mode):
        raise DamagedError("it is no folder")
    sealed = _read(folder / name)
    files = _Seal(**sealed).files
    found = _listing(folder)
    del found[name]
    for file in files:
        if file.startswith("../"):
            found[file] = os.lstat(folder / file)
    for file in sorted(files.keys() - found.keys()):
        raise DamagedError(f"{file} is missing")
    for file in sorted(found.keys() - files.keys()):
        raise DamagedError(f"{file} does not belong there")
    for file, wanted in files.items():
        if not stat.S_ISREG(found[file].st_mode):
            raise DamagedError(f"{file} is no regular file")
        if found[file].st_size != wanted.size:
            raise DamagedError(f"{file} has {found[file].st_size:,} bytes and should have {wanted.size:,}")
    for file, wanted in files.items():
        if wanted.size <= hash_up_to and file_sha256(folder / file) != wanted.sha256:
            raise DamagedError(f"{file} has been changed")
    return sealed


def _read(path: Path) -> dict[str, Any]:
    """A seal that is whole."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise DamagedError(f"{path.name} is no regular file")
    try:
        text = read_text(path)
        sealed = parse_json(text, path.name)
    except RetentionBenchError as error:
        if isinstance(error.__cause__, PermissionError):
            raise error.__cause__ from None
        raise DamagedError(f"{path.name} cannot be read as JSON") from error
    if not isinstance(sealed, dict) or not isinstance(sealed.get("format", 1), int):
        raise DamagedError(f"{path.name} is not what was written")
    if sealed.get("format", 1) != FORMAT:
        raise DamagedError(f"{path.name} is of another version of retention-bench")
    try:
        if sealed.get("sha256") != _own_hash(sealed) or text != _text(sealed):
            raise DamagedError(f"{path.name} has been changed")
        checked(_Seal, sealed, path.name)
    except (ValueError, RecursionError, RetentionBenchError) as error:  # not a seal of ours
        raise DamagedError(f"{path.name} has been changed") from error
    return sealed


def _text(sealed: Mapping[str, Any]) -> str:
    return json.dumps(sealed, indent=2, ensure_ascii=False, allow_nan=False)


def _own_hash(sealed: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in sealed.items() if key != "sha256"}
    return hashlib.sha256(canonical(rest).encode()).hexdigest()


def _listing(folder: Path) -> dict[str, os.stat_result]:
    """All files below a folder, and links to folders, by their path in it."""
    found: dict[str, os.stat_result] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found |= {f"{entry.name}/{name}": one for name, one in _listing(Path(entry.path)).items()}
            else:
                found[entry.name] = os.lstat(entry.path)
    return found


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
