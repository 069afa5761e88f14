"""Load a causal language model and its tokenizer from a folder or the Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models.families import family

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_model(
    path: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for editing, training or scoring.

    Only safetensors are read, unless pickles are allowed. A tokenizer without a padding token pads with its end-of-text
    token.

    Args:
        path: A local folder, or a Hub id (`owner/name`).
        device: Where the model goes.
        dtype: What the weights are converted to, whatever they are stored in.
        revision: The Hub revision.
        trust_remote_code: Whether code that comes with the model may run.
        allow_pickle: Whether pickled weights may be read where there are no others.

    Returns:
        The model, in evaluation mode, and its tokenizer, padding on the right.

    Raises:
        UsageError: No such folder, or a family that is not supported.
        RetentionBenchError: The folder lacks a file, weights are missing or broken, or the Hub has no answer.
    """
    _check_folder(path, allow_pickle)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _explained(path):
        config = AutoConfig.from_pretrained(path, **common)
        family(config.model_type)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **common,
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
    if report["missing_keys"]:
        absent = sorted(report["missing_keys"])
        raise RetentionBenchError(
            f"The weights of {path} lack {len(absent)} that the model needs, {absent[0]} among them, and those would "
            "be random. Give a checkpoint of a causal language model, saved whole."
        )
    return model.to(device).eval(), _padded(path, tokenizer)


def empty_model(
    folder: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model whose weights are whatever was in memory, to be filled from a stream.

    Args:
        folder: A folder with `config.json` and a tokenizer.
        device: Where the model goes.
        dtype: Of its weights.

    Returns:
        The model, in evaluation mode, and its tokenizer, padding on the right.

    Raises:
        UsageError: A family that is not supported.
        RetentionBenchError: A file is missing or broken.
    """
    _check_tokenizer(folder)
    with _explained(str(folder)):
        config = AutoConfig.from_pretrained(folder)
        family(config.model_type)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.to(device).eval(), _padded(str(folder), tokenizer)


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Say of the libraries' errors which model they are about, and what to do.

    Raises:
        RetentionBenchError: One of them.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if Path(path).is_dir():
            raise RetentionBenchError(f"The model in {path} could not be loaded ({reason}).") from error
        raise RetentionBenchError(
            f"The model {path!r} could not be loaded from the Hub ({reason}). Check the id and the revision, the "
            "network and HF_HUB_OFFLINE, that it has safetensors and, for a gated model, `hf auth login`; or "
            "give a local folder."
        ) from error


def _padded(path: str, tokenizer: Any) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RetentionBenchError(
                f"The tokenizer of {path} has neither a padding nor an end-of-text token. Give it one."
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _check_folder(path: str, allow_pickle: bool) -> None:
    """Say what a local folder lacks; a path that cannot be a Hub id must be a folder."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or folder.exists():
            raise UsageError(f"There is no model folder at {path}. Give a folder, or a Hub id as owner/name.")
        return
    if not (folder / "config.json").is_file():
        raise RetentionBenchError(f"{path} has no config.json. Give a folder that save_pretrained wrote.")
    pickled = any(folder.glob("*.bin"))
    if not any(folder.glob("*.safetensors")) and not (pickled and allow_pickle):
        if pickled:
            raise RetentionBenchError(
                f"{path} has only pickled weights (*.bin), and loading those can run code. If you trust them, load "
                "them with transformers and save_pretrained them again: that writes safetensors."
            )
        raise RetentionBenchError(f"{path} has no weights (*.safetensors).")
    _check_tokenizer(folder)


def _check_tokenizer(folder: Path | str) -> None:
    if not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        raise RetentionBenchError(
            f"{folder} has no tokenizer (one of {', '.join(_TOKENIZER_FILES)}). "
            "Save it there with tokenizer.save_pretrained."
        )
