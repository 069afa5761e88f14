"""How a checkpoint is named: a model, or a base model with a delta or an adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import adapter as adapters
from retention_bench.models.loading import local_folder

FORMS = "FOLDER or OWNER/NAME[@REVISION], alone or followed by +DELTA.safetensors or +ADAPTER_FOLDER"


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


def parse_reference(text: str, name: str | None = None) -> Reference:
    """Read a checkpoint as it is named on the command line.

    Args:
        text: One of `FORMS`. An adapter's folder alone stands for it on the base model that its configuration names.
        name: Its name in results; None for the text.

    Raises:
        UsageError: The text is empty, or names a folder or a file that does not exist.
        RetentionBenchError: An adapter does not say what its base model is.
    """
    name = name or text
    whole = Path(text).expanduser()
    if whole.is_dir() and (whole / adapters.CONFIG).is_file():
        base = adapters.adapter_config(whole).base_model_name_or_path
        if not base:
            raise RetentionBenchError(f"{text} does not say which model it adapts. Give BASE+{text}.")
        return dataclasses.replace(_base(base, name), adapter=str(whole))
    first, plus, change = text.rpartition("+")
    if whole.exists() or not plus:
        return _base(text, name)
    path = Path(change).expanduser()
    if path.is_file():
        return dataclasses.replace(_base(first, name), delta=str(path))
    if (path / adapters.CONFIG).is_file():
        return dataclasses.replace(_base(first, name), adapter=str(path))
    raise UsageError(f"{change!r} in {text!r} is neither a delta's file nor an adapter's folder. Allowed: {FORMS}.")


def _base(text: str, name: str) -> Reference:
    if Path(text).expanduser().exists():
        return Reference(name, str(Path(text).expanduser()))
    model, _, revision = text.partition("@")
    # What cannot be a Hub id must be a folder.
    if not model or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UsageError(f"There is no model folder at {text!r}. Allowed: {FORMS}.")
    return Reference(name, model, revision or None)


def fetch(reference: Reference, *, allow_pickle: bool = False) -> Path:
    """The folder with the base model's files; those of a Hub model are fetched.

    Raises:
        RetentionBenchError: The Hub has no answer.
    """
    return local_folder(reference.base, reference.revision, allow_pickle=allow_pickle)
