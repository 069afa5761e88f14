"""Load a model for a stage, and save one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    path: str, revision: str | None, *, dtype: str, device: str, finite: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_model` by the names that a suite uses, without the library's own bars and warnings.

    Args:
        path: A local folder, or a Hub id.
        revision: The Hub revision.
        dtype: The name of a torch dtype.
        device: Where the model goes.
        finite: As for `load_model`.

    Raises:
        RetentionBenchError: As `load_model`.
    """
    import torch
    import transformers

    from retention_bench.models import load_model

    # Our own progress says what is going on.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return load_model(path, device=device, dtype=getattr(torch, dtype), revision=revision, finite=finite)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer as a checkpoint, in safetensors.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        folder: The checkpoint's folder; made where it is missing.
    """
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
