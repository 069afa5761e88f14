"""How a checkpoint is named: a model, or a base model with a delta or an adapter."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pydantic

from retention_bench.data import checked, locate, parse_json, read_lines
from retention_bench.display import line
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import adapter as adapters
from retention_bench.models.loading import local_folder

FORMS = "FOLDER or OWNER/NAME[@REVISION], alone or followed by +DELTA.safetensors or +ADAPTER_FOLDER"

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9_.-]{1,96})?")
_NAMED = 5
"""How many files that are passed over are named."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """Where a checkpoint lies, and what is put on top of it.

    Attributes:
        name: What it is called in results.
        base: A folder or a Hub id: the model itself, or what the change is made to.
        revision: The Hub revision of the base.
        delta: A file that `WeightDelta.save` wrote.
        adapter: A folder with a peft adapter.
    """

    name: str
    base: str
    revision: str | None = None
    delta: str | None = None
    adapter: str | None = None


@dataclasses.dataclass(frozen=True)
class Named:
    """A checkpoint as a manifest names it.

    Attributes:
        text: As `parse_reference` takes it, or a pattern.
        name: Its name in results, where it has one.
    """

    text: str
    name: str | None = None


class _Entry(pydantic.BaseModel):
    """An object in a manifest."""

    model_config = pydantic.ConfigDict(strict=True)
    checkpoint: str = pydantic.Field(min_length=1)
    name: str = pydantic.Field(min_length=1)


def parse_reference(text: str, name: str | None = None) -> Reference:
    """Read a checkpoint as it is named on the command line.

    Args:
        text: One of `FORMS`. An adapter's folder alone stands for it on the base model that its configuration names, at
            the revision that stands there.
        name: Its name in results; None for the text.

    Raises:
        UsageError: The text is empty, or names a folder or a file that does not exist, or a file that is no delta.
        RetentionBenchError: An adapter does not say what its base model is.
    """
    name = name or text
    whole = locate(text) if text else None
    if whole is not None and (whole / adapters.CONFIG).is_file():
        config = adapters.adapter_config(whole)
        base = config.base_model_name_or_path
        if not base:
            raise RetentionBenchError(f"{text} does not say which model it adapts. Give BASE+{text}.")
        reference = _base(base, name)
        if reference.revision is None and locate(base) is None and config.revision:
            reference = dataclasses.replace(reference, revision=config.revision)
        return dataclasses.replace(reference, adapter=str(whole))
    first, plus, change = text.rpartition("+")
    if whole is not None or not plus:
        return _base(text, name)
    path = locate(change) if change else None
    if path is not None and path.is_file():
        return dataclasses.replace(_base(first, name), delta=str(path))
    if path is not None and (path / adapters.CONFIG).is_file():
        return dataclasses.replace(_base(first, name), adapter=str(path))
    raise UsageError(f"{change!r} in {text!r} is neither a delta's file nor an adapter's folder. Allowed: {FORMS}.")


def _base(text: str, name: str) -> Reference:
    found = locate(text) if text else None
    if found is not None:
        if not found.is_dir():
            raise UsageError(f"{text!r} is a file, and a checkpoint is a folder. Allowed: {FORMS}.")
        return Reference(name, str(found))
    model, _, revision = text.partition("@")
    # What cannot be a Hub id must be a folder.
    if not _HUB_ID.fullmatch(model) or "--" in model or ".." in model:
        raise UsageError(f"There is no model folder at {text!r}. Allowed: {FORMS}.")
    return Reference(name, model, revision or None)


def read_manifest(path: Path | str) -> list[Named]:
    """Read a manifest: a checkpoint a line, or a JSON object with `checkpoint` and `name`; `#` begins a comment.

    Raises:
        UsageError: There is no such file.
        RetentionBenchError: It is not UTF-8, or an object is malformed; the line is named.
    """
    texts = ((number, text.strip()) for number, text in read_lines(path, "manifest"))
    return [_named(text, f"{path}, line {number}") for number, text in texts if not text.startswith("#")]


def _named(text: str, place: str) -> Named:
    if "\0" in text:
        raise UsageError(f"{place}: no path can hold a NUL. Give a text file with a checkpoint a line.")
    if not text.startswith("{"):
        return Named(text)
    try:
        entry = checked(_Entry, parse_json(text, place), place)
    except RetentionBenchError as error:
        raise UsageError(f"{error} This is no JSON object with name and checkpoint.") from error
    return Named(entry.checkpoint, entry.name)


def read_references(
    texts: Iterable[str | Named], passed_over: Callable[[str], None] = lambda text: None
) -> tuple[list[Reference], dict[str, str]]:
    """Read checkpoints as they are named on the command line, or in a manifest.

    Args:
        texts: As `parse_reference` takes them; a pattern with `*`, `?` or `[`, alone for folders of models and
            adapters, behind `MODEL+` for deltas and adapters; or a JSON object with `checkpoint` and `name`.
        passed_over: Told what fits a pattern and is no checkpoint, in a sentence.

    Returns:
        The checkpoints, and by name why others cannot be read.

    Raises:
        UsageError: A pattern fits no checkpoint, or has a name of its own and fits several.
    """
    references, unreadable = [], {}
    for given in texts:
        named = given if isinstance(given, Named) else _named(given, repr(given))
        texts_of = [named.text]
        if glob.has_magic(named.text) and locate(named.text) is None:
            texts_of = _fitting(named.text, passed_over)
            if named.name is not None and len(texts_of) > 1:
                raise UsageError(
                    f"The name {named.name!r} stands for {len(texts_of)} checkpoints that fit {named.text!r}."
                )
        for one in texts_of:
            if any("\ud800" <= c <= "\udfff" for c in one):
                unreadable[named.name or line(one)] = "Its name is not UTF-8. Rename the folder."
                continue
            try:
                references.append(parse_reference(one, named.name))
            except (RetentionBenchError, OSError) as error:
                unreadable[named.name or one] = str(error)
    return references, unreadable


def _fitting(pattern: str, passed_over: Callable[[str], None]) -> list[str]:
    """The checkpoints that fit a pattern.

    Raises:
        UsageError: There are none.
    """
    base, plus, change = "", "", pattern
    found = _paths(pattern)
    if not found and "+" in pattern:
        base, plus, change = pattern.rpartition("+")
        found = _paths(change)
    if not found:
        raise UsageError(f"No folder fits {pattern!r}. Correct the pattern, or name a checkpoint: {FORMS}.")
    taken = [path for path in found if (_is_change(path) if plus else _is_checkpoint(path))]
    left = [path for path in found if path not in set(taken)]
    what = "a delta or an adapter" if plus else "a model or an adapter"
    some = ", ".join(left[:_NAMED]) + (f" and {len(left) - _NAMED:,} more" if len(left) > _NAMED else "")
    if not taken:
        raise UsageError(f"Nothing that fits {pattern!r} is {what}: {some}. A model is a folder with a config.json.")
    if left:
        passed_over(f"Of what fits {pattern!r} this is no checkpoint, and passed over: {some}.")
    return [f"{base}{plus}{path}" for path in taken]


def _paths(pattern: str) -> list[str]:
    locate(pattern)  # says why where no path can be like that
    return sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))


def _is_checkpoint(path: str) -> bool:
    """Whether a path is a folder of a model or an adapter, be it broken."""
    if not Path(path).is_dir():
        return False
    names = os.listdir(path)
    return (
        "config.json" in names or adapters.CONFIG in names or any(n.endswith((".safetensors", ".bin")) for n in names)
    )


def _is_change(path: str) -> bool:
    """Whether a path is a delta's file or an adapter's folder."""
    return Path(path).suffix == ".safetensors" if Path(path).is_file() else (Path(path) / adapters.CONFIG).is_file()


def fetch(reference: Reference, *, allow_pickle: bool = False) -> Path:
    """The folder with the base model's files; those of a Hub model are fetched.

    Raises:
        RetentionBenchError: The Hub has no answer.
    """
    return local_folder(reference.base, reference.revision, allow_pickle=allow_pickle)
