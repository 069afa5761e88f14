"""Read files that others wrote; whatever is wrong with one is said in one line that names the file and the place.

Everything foreign that is text comes through here: facts, training rows, manifests, suites, configurations, results.
What is in a file is never executed, and nothing but a regular file is opened.
"""

from __future__ import annotations

import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import pydantic

from retention_bench.errors import RetentionBenchError, UsageError

T = TypeVar("T")

_BOM = b"\xef\xbb\xbf"


def find_file(path: Path | str, what: str = "file") -> Path:
    """The path of a regular file, or of a link to one.

    Args:
        path: As a user gave it; `~` stands for the home folder.
        what: What the file should be, for the error: `"facts file"`.

    Raises:
        UsageError: There is none of that name, it is a folder, a pipe or a device, or no file can have such a name.
    """
    shown = str(path)
    try:
        found = Path(path).expanduser()
        mode = found.stat().st_mode
    except (ValueError, RuntimeError) as error:  # NUL; "~" without a home
        raise UsageError(f"There is no {what} at {shown!r}: {error}. Correct the path.") from error
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
    with _open(found) as file:
        data = b"".join(_guarded(file, found))
    return _decoded(data.removeprefix(_BOM), f"{path}")


def read_lines(path: Path | str, what: str = "file") -> Iterator[tuple[int, str]]:
    r"""The lines of a text file that are not blank, with their numbers from 1, one at a time.

    Lines end at `\n` or `\r\n` alone: a U+0085 or U+2028 within a text does not cut it.

    Raises:
        UsageError: As `find_file`, when this is called.
        RetentionBenchError: As `read_text`, when the line is reached; also where a `.gz` file is damaged.
    """
    found = find_file(path, what)

    def lines() -> Iterator[tuple[int, str]]:
        with _open(found) as file:
            for number, line in enumerate(_guarded(file, found), start=1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield number, _decoded(line, f"{path}, line {number}", number).rstrip("\r\n")

    return lines()


def parse_json(text: str, place: str) -> Any:
    """A JSON value, as the standard has it: no NaN, no text that is half a character.

    Args:
        text: The JSON.
        place: Where it stands, for the error: a file, or a file and a line.

    Raises:
        RetentionBenchError: It is not JSON, or nested too deeply to be read.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RetentionBenchError(
            f"{place}: a text holds half a character (a lone surrogate, \\ud800 to \\udfff). Correct the text, or "
            "leave the row out."
        ) from error
    except RecursionError as error:
        raise RetentionBenchError(f"{place}: the JSON is nested too deeply to be read.") from error
    except ValueError as error:
        raise RetentionBenchError(f"{place}: not JSON: {error}.") from error
    return value


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


def read_jsonl(path: Path | str, what: str = "file") -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file with the numbers of their lines; blank lines are passed over.

    Raises:
        UsageError: As `find_file`, when this is called.
        RetentionBenchError: A line is not UTF-8 or not JSON, when it is reached.
    """
    return ((number, parse_json(line, f"{path}, line {number}")) for number, line in read_lines(path, what))


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
        return pydantic.TypeAdapter(schema).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RetentionBenchError(
            f"{place}: {f'{where}: ' if where else ''}{first['msg']}, got {shortened(first['input'])}."
        ) from error


def shortened(value: Any) -> str:
    """A value in a few words, however large it is, for an error."""
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    try:
        text = repr(value)
    except ValueError:  # Python writes out no more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _open(path: Path) -> IO[bytes]:
    """Open a regular file; a pipe that took its place meanwhile does not block."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise RetentionBenchError(f"{path} cannot be read: {error.strerror}.") from error
    return gzip.GzipFile(fileobj=file, mode="rb") if path.suffix == ".gz" else file  # type: ignore[return-value]


def _guarded(file: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RetentionBenchError(f"{path} is no gzip file, or is cut off ({error}). Make it again.") from error


def _decoded(data: bytes, place: str, line: int | None = None) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = "" if line else f", line {data.count(10, 0, error.start) + 1}"
        raise RetentionBenchError(
            f"{place}{at}: the byte 0x{data[error.start]:02x} is not UTF-8; the file may be Latin-1 or another "
            "encoding. Save it as UTF-8."
        ) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON knows")
