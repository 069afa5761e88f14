"""Tensors in safetensors files that say what they are: written whole or not at all, checked when they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from retention_bench.errors import RetentionBenchError

_ABOUT = "retention_bench"


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], *, kind: str, version: int, **about: Any) -> None:
    """Write tensors: to a temporary name first, then renamed, so no reader sees half a file.

    Args:
        path: The file.
        tensors: The tensors by name.
        kind: What the file holds, in words.
        version: Version of its layout.
        about: JSON values to keep beside them.
    """
    path = Path(path)
    # One metadata entry: safetensors writes several in no fixed order, and the same tensors shall be the same bytes.
    stated = json.dumps({"kind": kind, "version": version, **about}, sort_keys=True)
    contents = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {_ABOUT: stated})
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_bytes(contents)
    partial.replace(path)


def read_tensors(path: Path | str, *, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Args:
        path: The file.
        kind: What it must hold.
        version: The version that it must have.

    Returns:
        The tensors by name, and what was kept beside them.

    Raises:
        RetentionBenchError: There is no such file, it holds something else or another version, it is broken, or has
            a number that is not finite.
    """
    if not Path(path).is_file():
        raise RetentionBenchError(f"There is no file {path}; it should hold a {kind}.")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, json.JSONDecodeError) as error:
        raise RetentionBenchError(f"{path} is no safetensors file, or is cut off ({error}). Make it again.") from error
    if (about.get("kind"), about.get("version")) != (kind, version):
        found = f"{about['kind']} of version {about.get('version')}" if "kind" in about else "something else"
        raise RetentionBenchError(
            f"{path} should hold a {kind} of version {version}, and holds {found}. Make it again."
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise RetentionBenchError(f"{path}: {name} has numbers that are not finite. Make the file again.")
    return tensors, about
