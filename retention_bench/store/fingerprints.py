"""What identifies a stage's inputs: models and data by their content, or by their place on the Hub at a commit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from retention_bench.data.durable import file_sha256
from retention_bench.data.files import refuse_pointer
from retention_bench.errors import RetentionBenchError, UsageError

_MODEL_FILES = (".json", ".safetensors", ".model", ".jinja", ".txt", ".bin")


OUTSIDE: Mapping[str, Any] = {"outside the key": True}
"""Marks a field that no result depends on: where a file lies, what something is called for people."""


class InputChangedError(RetentionBenchError):
    """A file that a stage reads is not what it was when the stage's key was made."""


@dataclasses.dataclass(frozen=True)
class Input:
    """What a stage reads from outside the store, as it was planned.

    Attributes:
        path: A file, a model's folder, or an id on the Hub; not a part of any key.
        fingerprint: As `source_fingerprint` or `model_fingerprint` gave it.
    """

    path: str = dataclasses.field(metadata=OUTSIDE)
    fingerprint: Mapping[str, Any]

    def check(self) -> tuple[tuple[int, ...], ...]:
        """See whether it is still what was planned; what lies on the Hub at a commit is.

        Returns:
            What tells whether its files are written to after this.

        Raises:
            InputChangedError: It is not.
        """
        if "hub" in self.fingerprint:
            return ()
        place = Path(self.path)
        try:
            if "files" in self.fingerprint:
                files = _model_files(place)
                now = {path.name: _hash(path) for path in files}
                planned = self.fingerprint["files"]
            else:
                files, now, planned = [place], {"": _hash(place)}, {"": self.fingerprint["sha256"]}
            changed = sorted(name for name in now.keys() | planned.keys() if now.get(name) != planned.get(name))
            found = [path.stat() for path in files]
        except (OSError, RetentionBenchError) as error:
            raise InputChangedError(
                f"{place} was changed while the run went on: {error} Then run the same command again."
            ) from error
        if changed:
            raise _changed(place / changed[0] if changed[0] else place)
        return tuple((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found)


@contextlib.contextmanager
def unchanged(inputs: Collection[Input]) -> Iterator[None]:
    """See to it that what is read in the block is what was planned, from its beginning to its end.

    Raises:
        InputChangedError: It is not, or a file was written to meanwhile, if only with what was in it.
    """
    before = [given.check() for given in inputs]
    yield
    for given, seen in zip(inputs, before, strict=True):
        if given.check() != seen:
            raise _changed(Path(given.path))


def _changed(path: Path) -> InputChangedError:
    return InputChangedError(
        f"{path} was changed while the run went on, so it is not what the results would be kept under. Leave it alone "
        "and run the same command again: what had finished is kept, the rest is computed with the file as it is then."
    )


def source_fingerprint(source: str, revision: str | None) -> dict[str, Any]:
    """What identifies rows: the hash of a local file, or a Hub id at a pinned revision.

    Raises:
        UsageError: The local file does not exist, or is none; or the Hub data set has no revision.
        RetentionBenchError: The local file cannot be read, or is a Git LFS pointer.
    """
    path = Path(source)
    if os.path.isfile(path):  # unlike Path.is_file, whatever the name is
        return {"sha256": _hash(path)}
    remedy = "Correct the path (`source` in a suite), or put the file there."
    if os.path.exists(path) and (revision is None or path.is_absolute()):
        raise UsageError(f"{source} is no file, where a data file is needed. {remedy}")
    if path.is_absolute() or source.startswith("."):
        raise UsageError(f"There is no data file at {source}. {remedy}")
    if revision is None:
        raise UsageError(
            f"There is no file {source}, and the Hub data set {source!r} needs a `revision` (a commit), so that its "
            "rows cannot change."
        )
    return {"hub": source, "revision": revision}


def model_fingerprint(path: str, revision: str | None) -> dict[str, Any]:
    """What identifies a model: the hash of its files, or its Hub id and the commit that the revision stands for."""
    folder = Path(path)
    if os.path.isdir(folder):
        named = _model_files(folder)
        if not any(p.suffix in (".safetensors", ".bin") or p.name.endswith(".index.json") for p in named):
            raise _no_model(path)
        return {"files": {p.name: _hash(p) for p in named}}
    return {"hub": path, "revision": config_file(path, revision).parent.name}


def _hash(path: Path) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RetentionBenchError(f"{path} is no regular file. Put a file in its place.")
        with path.open("rb") as file:
            refuse_pointer(path, file.read(64))
        return file_sha256(path)
    except OSError as error:
        raise RetentionBenchError(
            f"{path} cannot be read ({error.strerror}). Put the file there, or change its permissions."
        ) from error


def _model_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in _MODEL_FILES and not p.is_dir())


def config_file(path: str, revision: str | None) -> Path:
    """The model's `config.json`, fetched from the Hub where the model is not a folder.

    Raises:
        UsageError: The path leads to no folder, and can be no Hub id.
        RetentionBenchError: The folder has no such file, or the Hub has no answer.
    """
    if os.path.isdir(path):
        if not (Path(path) / "config.json").is_file():
            raise _no_model(path)
        return Path(path) / "config.json"
    if os.path.isabs(path) or os.path.lexists(path):
        raise UsageError(f"There is no model folder at {path}. Give a folder, or a Hub id as owner/name.")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, "config.json", revision=revision))
    except (OSError, ValueError) as error:
        raise RetentionBenchError(
            f"The model {path!r} could not be fetched from the Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Check the id, the network and, for a gated model, `hf auth login`; or give a local folder."
        ) from error


def _no_model(path: str) -> RetentionBenchError:
    return RetentionBenchError(
        f"The folder {path} holds no model. It needs config.json, *.safetensors and a tokenizer."
    )
