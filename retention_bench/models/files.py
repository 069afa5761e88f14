"""Tensors in safetensors files that say what they are: written whole or not at all, checked when they are read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from retention_bench.data import checked, find_file, parse_json, shortened
from retention_bench.data.durable import sync
from retention_bench.errors import RetentionBenchError, UsageError

T = TypeVar("T")

REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes of numbers that are computed with; anything else in their place would be converted without a word."""

_ABOUT = "retention_bench"
_REAL = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}
_LONGEST_NAME = 1000
_NO_SUCH_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], *, kind: str, version: int, **about: Any) -> None:
    """Write tensors: to a temporary name first, then renamed, so no reader sees half a file.

    Args:
        path: The file.
        tensors: The tensors by name.
        kind: What the file holds, in words.
        version: Version of its layout.
        about: JSON values to keep beside them.

    Raises:
        UsageError: There can be no file of that name.
    """
    # One metadata entry: safetensors writes several in no fixed order, and the same tensors shall be the same bytes.
    about = {"kind": kind, "version": version, "sha256": _sha256(tensors), **about}
    contents = save(_apart(tensors), {_ABOUT: json.dumps(about, sort_keys=True)})
    with replacing(path) as partial:
        partial.write_bytes(contents)


def read_tensors(
    path: Path | str, schema: type[T], *, kind: str, version: int, also: Collection[str] = ()
) -> tuple[dict[str, Tensor], T]:
    """Read what `write_tensors` wrote, or another wrote in its form.

    Args:
        path: The file.
        schema: What stands beside the tensors: a pydantic model, or any type that pydantic knows.
        kind: What it must hold.
        version: The version that it must have.
        also: Dtypes that tensors may have besides those in `REAL`, by safetensors' names: `"I64"`.

    Returns:
        The tensors by name, none of them empty, and what was kept beside them.

    Raises:
        UsageError: There is no such file, or it is a folder, a pipe or a device.
        RetentionBenchError: It holds something else or another version, it is broken, or has a tensor of another dtype
            or a number that is not finite.
    """
    with _opened(path, schema, kind, version) as (file, about, stated):
        tensors = {name: _tensor(file, name, also, path) for name in file.keys()}  # noqa: SIM118 - no mapping
    if "sha256" in about and about["sha256"] != _sha256(tensors):
        raise RetentionBenchError(
            f"{path} is damaged: its numbers are not those that were written. Make it again, or fetch it again."
        )
    return tensors, stated


def read_header(path: Path | str, schema: type[T], *, kind: str, version: int) -> tuple[dict[str, list[int]], T]:
    """Read what a file of `write_tensors` says of itself, without its tensors.

    Args:
        path: The file.
        schema: As for `read_tensors`.
        kind: What it must hold.
        version: The version that it must have.

    Returns:
        The tensors' shapes by name, and what was kept beside them.

    Raises:
        UsageError: There is no such file, or it is a folder, a pipe or a device.
        RetentionBenchError: It holds something else or another version, or it is broken.
    """
    with _opened(path, schema, kind, version) as (file, _, stated):
        return {name: file.get_slice(name).get_shape() for name in file.keys()}, stated  # noqa: SIM118 - no mapping


def kind_of(path: Path) -> str | None:
    """What a file says that it holds; None where it is not one that `write_tensors` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            about = parse_json((file.metadata() or {}).get(_ABOUT, "{}"), str(path))
    except (SafetensorError, OSError, RetentionBenchError):
        return None
    return about.get("kind") if isinstance(about, dict) else None


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside a file; what is written there takes the file's place at the end, once it is on the disk.

    Raises:
        UsageError: There can be no file of that name: it is a folder, or its folder is missing.
    """
    path, partial = Path(path), _partial(Path(path))
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except OSError as error:
        if error.errno not in _NO_SUCH_PLACE:
            raise
        raise UsageError(
            f"{path} could not be written: {error.strerror}. Give the path of a file, in a folder that is there."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system can do so with a folder
        sync(path.parent)


def check_place(path: Path | str) -> None:
    """Find out whether a file can be written somewhere before hours of work are to end there.

    Raises:
        UsageError: It cannot: there is a folder, a pipe or a device of that name, its folder is missing or not
            writable, or no file can have such a name.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(Path(path).stat().st_mode):
                raise UsageError(f"{path} is no file, and is not written over. Give the path of a file.")
        partial = _partial(Path(path))
        partial.touch()
        partial.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{path} cannot be written: {reason}. Give the path of a file, in a folder that is there and can be "
            "written to."
        ) from error


@contextlib.contextmanager
def _opened(path: Path | str, schema: type[T], kind: str, version: int) -> Iterator[tuple[Any, dict[str, Any], T]]:
    """A file that must hold a kind of tensors: open, what stands beside them, and that by its schema."""
    found = find_file(path, f"file with a {kind}")
    try:
        with safe_open(found, framework="pt") as file:
            place = f"{path}, metadata"
            about = checked(dict[str, Any], parse_json((file.metadata() or {}).get(_ABOUT, "{}"), place), place)
            if (about.get("kind"), about.get("version")) != (kind, version):
                other = f"{shortened(about.get('kind'))} of version {shortened(about.get('version'))}"
                raise RetentionBenchError(
                    f"{path} should hold a {kind} of version {version}, and holds "
                    f"{other if 'kind' in about else 'something else'}. Make it again."
                )
            yield file, about, checked(schema, about, place)
    except (SafetensorError, OSError) as error:
        raise RetentionBenchError(f"{path} is no safetensors file, or is cut off ({error}). Make it again.") from error


def _tensor(file: Any, name: str, also: Collection[str], path: Path | str) -> Tensor:
    """A tensor of an open file; looked at before it is read, as torch does not know all dtypes."""
    if len(name) > _LONGEST_NAME:
        raise RetentionBenchError(f"{path}: a tensor's name has {len(name)} characters. Make the file again.")
    part = file.get_slice(name)
    dtype, shape = part.get_dtype(), part.get_shape()
    if dtype not in _REAL and dtype not in also:
        raise RetentionBenchError(
            f"{path}: {shortened(name)} is of the dtype {dtype}; {', '.join(_REAL.values())} are allowed. Make the "
            "file again."
        )
    if 0 in shape:
        raise RetentionBenchError(f"{path}: {shortened(name)} has the shape {shape}: it is empty. Make the file again.")
    tensor: Tensor = file.get_tensor(name)
    if not tensor.isfinite().all():
        raise RetentionBenchError(f"{path}: {shortened(name)} has numbers that are not finite. Make the file again.")
    return tensor


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and none in another's memory: safetensors writes no others."""
    apart: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().data_ptr() in places:
            tensor = tensor.clone()
        places.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    return apart


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of tensors and their names, whatever file they stand in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name!r} {tensor.dtype} {list(tensor.shape)}\n".encode())
        plain: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(memoryview(plain))
    return digest.hexdigest()


def _partial(path: Path) -> Path:
    """A temporary name beside a file; of a length of its own, as a name may be as long as the file system allows."""
    return path.with_name(f".{os.getpid()}-{zlib.crc32(os.fsencode(path.name)):08x}.partial")
