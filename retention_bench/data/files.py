"""Read files that others wrote; whatever is wrong with one is said in one line that names the file and the place.

Everything foreign that is text comes through here: facts, training rows, manifests, suites, configurations, results.
What is in a file is never executed, and nothing but a regular file is opened.
"""

from __future__ import annotations

import errno
import gzip
import io
import itertools
import json
import math
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import pydantic

from retention_bench.display import cut
from retention_bench.errors import RetentionBenchError, UsageError

T = TypeVar("T")

_BOM = b"\xef\xbb\xbf"

MAX_LINE = 32 * 2**20
"""Bytes that a line of a file read line by line may have: a row of data is never near it but by mistake."""

MAX_FILE = 2**30
"""Bytes that a file read whole may have, unpacked."""

MAX_RATIO = 200
"""How many times its size a compressed file may expand to. Text shrinks to a tenth, seldom to a fiftieth."""

_RATIO_FROM = 64 * 2**20
"""Unpacked bytes from which on `MAX_RATIO` holds; a small file of one repeated line is harmless."""

_CHUNK = 2**20
_BLANK = " \t\r\n\v\f"


def locate(path: Path | str) -> Path | None:
    """What a path leads to: a file, a folder or whatever else is there; None where nothing is.

    Args:
        path: As a user gave it; `~` stands for the home folder.

    Raises:
        UsageError: It holds a NUL, begins with `~` where there is no home folder, or cannot be looked at.
    """
    if not str(path):
        raise UsageError("A path must not be empty.")
    try:
        found = Path(path).expanduser()
        found.stat()
    except (ValueError, RuntimeError) as error:  # NUL; "~" without a home
        raise UsageError(f"No path can be {shortened(str(path))}: {str(error).rstrip('.')}. Correct it.") from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return None
        raise UsageError(f"{cut(str(path))} cannot be read: {error.strerror}. Correct the path.") from error
    return found


def output_folder(path: Path | str) -> Path:
    """The path of a folder to write into, which may be missing yet, as are those above it.

    Args:
        path: As a user gave it; `~` stands for the home folder.

    Raises:
        UsageError: A file stands there, or where a folder above it should be; or no folder can have such a name.
    """
    if (found := locate(path)) is not None:
        if not found.is_dir():
            raise UsageError(f"{path} is a file, where a folder is needed. Give the path of a folder, or a new one.")
        return found
    asked = _nameable(path)
    for above in (asked, *asked.parents):
        if above.is_symlink() and not above.exists():
            raise UsageError(f"There can be no folder {path}: {above} is a link to nothing. Give another path.")
        if above.is_dir():
            break
        if above.exists():
            raise UsageError(f"There can be no folder {path}: {above} is a file. Give another path.")
    return asked


def output_file(path: Path | str) -> Path:
    """The path of a file to write, which may be there already, in a folder that is.

    Args:
        path: As a user gave it; `~` stands for the home folder.

    Raises:
        UsageError: A folder, a pipe or a device stands there, the folder is missing, or no file can have such a name.
    """
    if locate(path) is not None:
        return find_file(path, "file to write")
    asked = _nameable(path)
    if not asked.parent.is_dir():
        raise UsageError(
            f"There is no folder {asked.parent} to write {asked.name} into. Make it, or give another path."
        )
    return asked


def _nameable(path: Path | str) -> Path:
    asked = Path(path).expanduser()
    if len(os.fsencode(asked)) > 4000 or any(len(os.fsencode(part)) > 250 for part in asked.parts):
        raise UsageError(f"No file or folder can have so long a name as {cut(str(path))}. Give a shorter one.")
    return asked


def find_file(path: Path | str, what: str = "file") -> Path:
    """The path of a regular file, or of a link to one.

    Args:
        path: As a user gave it; `~` stands for the home folder.
        what: What the file should be, for the error: `"facts file"`.

    Raises:
        UsageError: There is none of that name, it is a folder, a pipe or a device, or no file can have such a name.
    """
    if not str(path):
        raise UsageError(f"There is no {what} without a name. Give its path.")
    shown = cut(str(path))
    try:
        found = Path(path).expanduser()
        mode = found.stat().st_mode
    except (ValueError, RuntimeError) as error:  # NUL; "~" without a home
        reason = str(error).rstrip(".")
        raise UsageError(f"There is no {what} at {shown!r}: {reason}. Correct the path.") from error
    except FileNotFoundError as error:
        raise UsageError(f"There is no {what} at {shown}. Correct the path, or put the file there.") from error
    except OSError as error:
        raise UsageError(f"There is no {what} at {shown}: {error.strerror}. Correct the path.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UsageError(f"{shown} is {kind}, where a {what} is needed. Give the path of a file.")
    return found


def read_text(path: Path | str, what: str = "file") -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        UsageError: As `find_file`.
        RetentionBenchError: It cannot be read, or is not UTF-8; the line is named.
    """
    found = find_file(path, what)
    chunks, size = [], 0
    with open_bytes(found) as file:
        while chunk := file.read(_CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_FILE:
                raise RetentionBenchError(
                    f"{path} has more than {MAX_FILE // 2**20:,} MiB, the most that is read in one piece. Give rows of "
                    "data as JSONL, an object a line, which is read line by line."
                )
    return _decoded(b"".join(chunks).removeprefix(_BOM), f"{path}")


def read_lines(path: Path | str, what: str = "file") -> Iterator[tuple[int, str]]:
    r"""The lines of a text file that are not blank, with their numbers from 1, one at a time.

    Lines end at `\n` or `\r\n` alone: a U+0085 or U+2028 within a text does not cut it.

    Raises:
        UsageError: As `find_file`, when this is called.
        RetentionBenchError: As `read_text`, when the line is reached; also where a line has more than `MAX_LINE` bytes,
            or a compressed file is damaged or expands beyond `MAX_RATIO`.
    """
    return ((number, line.rstrip("\r\n")) for number, line in raw_lines(path, what) if line.strip(_BLANK))


def raw_lines(path: Path | str, what: str = "file") -> Iterator[tuple[int, str]]:
    """The lines of a text file as `read_lines` gives them, but blank ones too, and each with its end.

    Raises:
        UsageError: As `read_lines`.
        RetentionBenchError: As `read_lines`.
    """
    found = find_file(path, what)

    def lines() -> Iterator[tuple[int, str]]:
        with open_bytes(found) as file:
            for number in itertools.count(1):
                line = file.readline(MAX_LINE + 1)
                if not line:
                    return
                if len(line) > MAX_LINE:
                    raise RetentionBenchError(
                        f"{path}, line {number}: the line has more than {MAX_LINE // 2**20} MiB, the most that is "
                        "read. Split it, or leave it out."
                    )
                if number == 1:
                    line = line.removeprefix(_BOM)
                yield number, _decoded(line, f"{path}, line {number}", number)

    return lines()


def parse_json(text: str, place: str, *, halves: bool = False, once: bool = False) -> Any:
    """A JSON value, as the standard has it: no NaN, no text that is half a character.

    Args:
        text: The JSON.
        place: Where it stands, for the error: a file, or a file and a line.
        halves: Half characters pass, for a caller that leaves out what `has_half` finds.
        once: A key that stands twice in an object is an error; else the last one counts, as everywhere.

    Raises:
        RetentionBenchError: It is not JSON, or nested too deeply to be read.
    """
    try:
        value = json_value(text, once=once)
    except ValueError as error:
        raise RetentionBenchError(f"{place}: {error}.") from error
    if not halves and may_hold_half(text):
        check_characters(value, place)
    return value


def json_value(text: str, *, once: bool = False) -> Any:
    """A JSON value, as `parse_json` has it, with half characters.

    Raises:
        ValueError: It is not JSON, or nested too deeply to be read.
    """
    pairs = _once if once else None
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply to be read") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def may_hold_half(text: str) -> bool:
    """Whether a JSON text has an escape that can be half a character; only then is `has_half` worth its time."""
    return "\\ud" in text or "\\uD" in text


def check_characters(value: Any, place: str) -> None:
    """Refuse a JSON value with a text that is half a character, as none can be written or asked.

    Raises:
        RetentionBenchError: It has one.
    """
    if has_half(value):
        raise RetentionBenchError(
            f"{place}: a text holds half a character (a lone surrogate, \\ud800 to \\udfff). Correct the text, or "
            "leave the row out."
        )


def has_half(value: Any) -> bool:
    """Whether a text in a JSON value holds half a character: a lone surrogate, as a cut-off emoji leaves it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def read_json(path: Path | str, schema: type[T], what: str = "file") -> T:
    """A JSON file that fits a schema.

    Args:
        path: The file.
        schema: A pydantic model, or any type that pydantic knows: `dict[str, int]`.
        what: What the file should be, for the error.

    Raises:
        UsageError: As `find_file`.
        RetentionBenchError: It is not JSON, or does not fit; the first place where it does not is named.
    """
    return checked(schema, parse_json(read_text(path, what), f"{path}"), f"{path}")


def checked(schema: type[T], value: Any, place: str) -> T:
    """A value as a schema has it.

    Args:
        schema: A pydantic model, or any type that pydantic knows.
        value: What was read.
        place: Where it stands, for the error.

    Raises:
        RetentionBenchError: It does not fit; the first place where it does not is named, with what was given.
    """
    try:
        return fitted(schema, value)
    except ValueError as error:
        raise RetentionBenchError(f"{place}: {error}.") from error


def fitted(schema: type[T], value: Any) -> T:
    """A value as a schema has it, as `checked`.

    Raises:
        ValueError: It does not fit.
    """
    try:
        return pydantic.TypeAdapter(schema).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{part}." for part in first["loc"])[:-1]
        what = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{f'{where}: ' if where else ''}{what}, got {shortened(first['input'])}") from error


def shortened(value: Any) -> str:
    """A value in a few words, however large it is."""
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    try:
        return cut(repr(value), 60)
    except ValueError:  # Python writes out no more than some thousand digits
        return "a number of thousands of digits"


def refuse_pointer(path: Path, begin: bytes) -> None:
    """Refuse a file that only says which file of Git LFS belongs in its place.

    Args:
        path: The file, for the error.
        begin: Its first bytes, 64 of them or more.

    Raises:
        RetentionBenchError: It is one.
    """
    if begin.startswith(b"version https://git-lfs"):
        raise RetentionBenchError(
            f"{path} is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`, or from the Hub with "
            "`hf download`."
        )


def open_bytes(path: Path) -> IO[bytes]:
    """Open a regular file, unpacked where its name ends in `.gz` or `.zst`.

    A pipe that took the file's place meanwhile does not block.

    Raises:
        RetentionBenchError: It cannot be read or is a Git LFS pointer; and from its `read`, where a compressed file is
            damaged, or expands to more than `MAX_RATIO` times its size.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        refuse_pointer(path, file.peek(64))
    except OSError as error:
        raise RetentionBenchError(f"{path} cannot be read: {error.strerror}.") from error
    if path.suffix not in (".gz", ".zst"):
        return file
    return io.BufferedReader(_Unpacked(file, path), _CHUNK)


class _Unpacked(io.RawIOBase):
    """What a compressed file holds, as long as it is sound and no bomb."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._size, self._given = os.fstat(file.fileno()).st_size, 0
        self._kind = "gzip" if path.suffix == ".gz" else "zstd"
        self._unpacked: Any
        if self._kind == "gzip":
            self._unpacked = gzip.GzipFile(fileobj=file, mode="rb")
        else:
            import pyarrow

            self._unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._unpacked.read(len(buffer))
        except (EOFError, OSError, zlib.error) as error:
            raise RetentionBenchError(
                f"{self._path} is no {self._kind} file, or is cut off ({error}). Make it again."
            ) from error
        self._given += len(data)
        if self._given > max(_RATIO_FROM, MAX_RATIO * self._size):
            raise RetentionBenchError(
                f"{self._path} expands to more than {MAX_RATIO} times its {self._size:,} bytes, as a compression bomb "
                "does. Give it unpacked if it is what you want to read."
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _decoded(data: bytes, place: str, line: int | None = None) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = "" if line else f", line {data.count(10, 0, error.start) + 1}"
        raise RetentionBenchError(
            f"{place}{at}: the byte 0x{data[error.start]:02x} is not UTF-8; the file may be Latin-1 or another "
            "encoding. Save it as UTF-8."
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shortened(twice)} stands twice in an object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON knows")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{cut(text, 60)} is larger than any number here may be")
    return value
