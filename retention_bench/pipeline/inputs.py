"""What identifies a stage's inputs: models and data by their content, or by their place on the Hub at a commit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.pipeline.store import file_sha256
from retention_bench.pipeline.suite import ModelConfig

_MODEL_FILES = (".json", ".safetensors", ".model", ".jinja", ".txt", ".bin")


def model_inputs(model: ModelConfig, device: str) -> dict[str, Any]:
    """What a stage's key has of the model: its files, its dtype and where it runs.

    Raises:
        RetentionBenchError: The model's files are missing.
    """
    return {"model": model_fingerprint(model.path, model.revision), "dtype": model.dtype, "device": device}


def source_fingerprint(source: str, revision: str | None) -> dict[str, Any]:
    """What identifies rows: the hash of a local file, or a Hub id at a pinned revision.

    Raises:
        UsageError: The local file does not exist, or the Hub data set has no revision.
    """
    path = Path(source)
    if path.is_file():
        return {"sha256": file_sha256(path)}
    if path.is_absolute() or source.startswith("."):
        raise UsageError(
            f"There is no data file at {source}. Correct the path (`source` in a suite), or put the file there."
        )
    if revision is None:
        raise UsageError(f"The Hub data set {source!r} needs a `revision` (a commit), so that its rows cannot change.")
    return {"hub": source, "revision": revision}


@functools.lru_cache(maxsize=8)
def model_fingerprint(path: str, revision: str | None) -> dict[str, Any]:
    """What identifies a model: the hash of its files, or its Hub id and the commit that the revision stands for."""
    folder = Path(path)
    if folder.is_dir():
        named = sorted(p for p in folder.iterdir() if p.suffix in _MODEL_FILES)
        if not named:
            raise _no_model(path)
        return {"files": {p.name: file_sha256(p) for p in named}}
    return {"hub": path, "revision": config_file(path, revision).parent.name}


def config_file(path: str, revision: str | None) -> Path:
    """The model's `config.json`, fetched from the Hub where the model is not a folder."""
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise _no_model(path)
        return Path(path) / "config.json"
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
