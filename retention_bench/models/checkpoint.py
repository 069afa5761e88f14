"""A checkpoint that somebody has: a model, or a base model with a delta or an adapter, read as a stream of weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import adapter as adapters
from retention_bench.models.adapter import Adapter
from retention_bench.models.delta import WeightDelta

_INDEX, _SINGLE, _PICKLE = "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"
FORMS = "FOLDER or OWNER/NAME[@REVISION], alone or followed by +DELTA.safetensors or +ADAPTER_FOLDER"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint's weights come from.

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


def parse_checkpoint(text: str, name: str | None = None) -> Checkpoint:
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
        base = adapters.adapter_config(whole).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
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


def _base(text: str, name: str) -> Checkpoint:
    if Path(text).expanduser().exists():
        return Checkpoint(name, str(Path(text).expanduser()))
    model, _, revision = text.partition("@")
    # What cannot be a Hub id must be a folder.
    if not model or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UsageError(f"There is no model folder at {text!r}. Allowed: {FORMS}.")
    return Checkpoint(name, model, revision or None)


def fetch(checkpoint: Checkpoint, *, allow_pickle: bool = False) -> Path:
    """The folder with the base model's files; those of a Hub model are fetched.

    Raises:
        RetentionBenchError: The Hub has no answer.
    """
    if Path(checkpoint.base).exists():
        return Path(checkpoint.base)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.bin"] if allow_pickle else [])]
    try:
        return Path(snapshot_download(checkpoint.base, revision=checkpoint.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise RetentionBenchError(
            f"The model {checkpoint.base!r} could not be fetched from the Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the id, the revision, the network and, for "
            "a gated model, `hf auth login`; or give a local folder."
        ) from error


def read_weights(
    checkpoint: Checkpoint, folder: Path, names: Mapping[str, Any] | Collection[str], *, allow_pickle: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's weights one after another, the delta or the adapter applied; nothing is written to disk.

    Args:
        checkpoint: The checkpoint.
        folder: Where its base model lies, see `fetch`.
        names: The names of the model's weights. Files that leave out the base model's prefix, as GPT-2's on the Hub,
            get it; what is no weight of the model, such as a stored attention mask, is passed over.
        allow_pickle: Read a `pytorch_model.bin` where there are no safetensors.

    Yields:
        Names as in `names`, and tensors in the dtype that they are stored in.

    Raises:
        RetentionBenchError: A file is missing, broken or pickled, a number is not finite, or the delta or the adapter
            is for another model.
    """
    stream: Iterable[tuple[str, Tensor]] = _named(_stored(folder, allow_pickle), names)
    if checkpoint.delta:
        stream = WeightDelta.load(checkpoint.delta).apply_to(stream)
    if checkpoint.adapter:
        stream = Adapter.load(checkpoint.adapter).apply_to(stream)
    for name, tensor in stream:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RetentionBenchError(
                f"{name} has numbers that are not finite. The checkpoint is broken, or its training diverged: train it "
                "again."
            )
        yield name, tensor


def _named(
    stream: Iterable[tuple[str, Tensor]], names: Mapping[str, Any] | Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    prefixes = {name.partition(".")[0] for name in names}
    for name, tensor in stream:
        found = next((full for full in (name, *(f"{prefix}.{name}" for prefix in prefixes)) if full in names), None)
        if found is not None:
            yield found, tensor


def _stored(folder: Path, allow_pickle: bool) -> Iterator[tuple[str, Tensor]]:
    for path in _files(folder, allow_pickle):
        if path.suffix == ".bin":
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
            continue
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RetentionBenchError(f"{path} is broken or cut off ({error}). Copy it again.") from error


def _files(folder: Path, allow_pickle: bool) -> list[Path]:
    if (folder / _INDEX).is_file():
        try:
            shards = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise RetentionBenchError(
                f"{folder / _INDEX} is no index of weights ({error!r}). Copy it again."
            ) from error
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise RetentionBenchError(
                    f"{folder / _INDEX} names {shard!r}, which is no file beside it. Copy it again."
                )
        return [folder / shard for shard in shards]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _PICKLE).is_file():
        if allow_pickle:
            return [folder / _PICKLE]
        raise RetentionBenchError(
            f"{folder} has only pickled weights ({_PICKLE}), and loading those can run code. If you trust them, give "
            "--allow-pickle, or load them with transformers and save_pretrained them again: that writes safetensors."
        )
    raise RetentionBenchError(f"{folder} has no weights ({_SINGLE}, or {_INDEX} and the files it names).")
