"""Load a causal language model and its tokenizer: the one place that decides what may be loaded, for every command.

Models are read by transformers' own loaders, so that what is edited, trained and scored is what anybody else loads.
What stands here is what those are not trusted with: code that comes with a model never runs, and nobody is asked if
it may; pickles are read on request alone; and whatever goes wrong is said in one line.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from retention_bench.data import read_json, shortened
from retention_bench.data.files import refuse_pointer
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models.explain import explained, reason, without_bars
from retention_bench.models.families import family

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_READ = (*_TOKENIZERS, *_SETTINGS, "added_tokens.json", "merges.txt", "chat_template.jinja")
_SAFE = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# No model that anybody has made has more; what is made of each would take for ever, or all memory.
_MOST = dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 1_000) | {"num_labels": 1_000_000}
_WITHOUT_EFFECT = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("early_stopping", "length_penalty"),  # of beams
)
# What a downloaded model needs; nothing from folders within it.
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def load_model(
    path: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    allow_pickle: bool = False,
    tokenizer: str | None = None,
    finite: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for editing, training or scoring, as transformers loads it.

    A tokenizer without a padding token pads with its end-of-text token. Generation settings that have no effect without
    sampling, and which transformers would refuse to save, are dropped.

    Args:
        path: A local folder, or a Hub id (`owner/name`).
        device: Where the model goes.
        dtype: What the weights are converted to, whatever they are stored in.
        revision: The Hub revision.
        allow_pickle: Whether pickled weights may be read where there are no others.
        tokenizer: A folder or Hub id to take the tokenizer from; None for the model's own.
        finite: Whether weights that are no numbers are refused. What a fine-tune that diverged has left is scored, and
            marked as such.

    Returns:
        The model, in evaluation mode, and its tokenizer, padding on the right.

    Raises:
        UsageError: No such folder, or a family that is not supported.
        RetentionBenchError: A file is missing, broken or of a kind that is not read; or the Hub has no answer.
    """
    folder = local_folder(path, revision, allow_pickle=allow_pickle)
    # What is missing is said before the weights are read, which takes longer.
    read_settings(folder)
    weight_files(folder, allow_pickle=allow_pickle)
    if tokenizer is None:
        _check_tokenizer(folder)
    model = read_model(folder, dtype=dtype, allow_pickle=allow_pickle, finite=finite)
    return model.to(device).eval(), load_tokenizer(tokenizer or str(folder))  # type: ignore[arg-type]


def read_model(folder: Path, *, dtype: torch.dtype, allow_pickle: bool = False, finite: bool = True) -> PreTrainedModel:
    """The model in a folder alone, on the CPU; else as `load_model`.

    Raises:
        UsageError: As `load_model`.
        RetentionBenchError: As `load_model`.
    """
    if _is_there(folder / "adapter_config.json"):
        raise RetentionBenchError(
            f"{folder} holds a peft adapter, not a whole model. Merge it with merge_and_unload, save that with its "
            "tokenizer, and give that folder; `score` takes BASE+ADAPTER_FOLDER."
        )
    config = load_config(folder)
    files = weight_files(folder, allow_pickle=allow_pickle)
    _check_size(folder, config, dtype)
    with explained(str(folder)), without_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=files[0].name in _SAFE,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, since transformers' own error doesn't name them
        )
    model, report = loaded
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise RetentionBenchError(
            f"{name} in {folder} has the shape {list(stored)}, and config.json asks for {list(wanted)}: they are not "
            "of the same model. Save model, configuration and tokenizer together, with save_pretrained."
        )
    if report["missing_keys"]:
        absent = sorted(report["missing_keys"])
        raise RetentionBenchError(
            f"The weights in {folder} lack {len(absent)} that the model needs, {absent[0]} among them, and those would "
            "be random. Give a checkpoint of a causal language model, saved whole."
        )
    if finite:
        check_finite(model, str(folder))
    _drop_without_effect(model, str(folder))
    return model


def load_config(path: Path | str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a model of a supported family.

    Raises:
        UsageError: No such folder, or a family that is not supported.
        RetentionBenchError: It is missing or broken, needs code of its own, or describes a model that cannot be.
    """
    folder = local_folder(str(path), revision)
    settings = read_settings(folder)
    method = settings.get("quantization_config")
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise RetentionBenchError(
            f"The weights in {folder} are quantised ({name}), and only plain ones are read. Load them with "
            "transformers, call dequantize(), and save_pretrained them again."
        )
    family(str(settings.get("model_type")))
    _check_counts(folder, settings)
    with explained(str(path)):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model that a configuration describes, its weights on the device `meta`: nothing is allocated.

    Raises:
        RetentionBenchError: It describes no model that can be.
    """
    with explained(str(config.name_or_path)), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def load_tokenizer(path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of a Hub model, padding on the right.

    Raises:
        UsageError: No such folder.
        RetentionBenchError: It is missing or broken, needs code of its own, has no token to pad with, or ends every
            text with a special token, behind which a prompt has no answer.
    """
    folder = local_folder(path, revision)
    _check_tokenizer(folder)
    if (folder / "config.json").exists():  # which transformers reads too
        _check_counts(folder, read_settings(folder))
    with explained(path, "tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        ids, bare = (tokenizer.encode("The", add_special_tokens=special) for special in (True, False))
    if tokenizer.pad_token is None:
        raise RetentionBenchError(
            f"The tokenizer of {path} has neither a padding nor an end-of-text token. Give it one."
        )
    if ids[-1:] != bare[-1:]:
        last = tokenizer.convert_ids_to_tokens(ids[-1])
        raise RetentionBenchError(
            f"The tokenizer of {path} puts {last!r} behind every text, so no prompt could be answered. Set "
            '"add_eos_token": false in its tokenizer_config.json, or take that token out of its post-processor.'
        )
    return tokenizer


def read_settings(folder: Path) -> dict[str, Any]:
    """What a model folder's `config.json` says.

    Raises:
        RetentionBenchError: It is missing, no JSON object, or no file.
    """
    path = folder / "config.json"
    if not path.exists():
        raise RetentionBenchError(f"{folder} has no config.json. Give a folder that save_pretrained wrote.")
    return read_json(path, dict[str, Any], "model configuration")


def local_folder(path: str, revision: str | None = None, *, allow_pickle: bool = False) -> Path:
    """The folder with a model's files; those of a Hub model are fetched.

    Args:
        path: A folder, or a Hub id.
        revision: The Hub revision.
        allow_pickle: Also fetch pickled weights.

    Raises:
        UsageError: There is no such folder, and it cannot be a Hub id.
        RetentionBenchError: The Hub has no answer.
    """
    try:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return folder
        there = folder.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, "~" without a home
        raise UsageError(
            f"There is no model folder at {path!r} ({error}). Give a folder, or a Hub id as owner/name."
        ) from error
    if there or folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise UsageError(f"There is no model folder at {path}. Give a folder, or a Hub id as owner/name.")
    from huggingface_hub import snapshot_download

    try:
        patterns = [*_WANTED, *(["*.bin"] if allow_pickle else [])]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"))
    except Exception as error:  # its own, httpx's, and those of the file system
        raise RetentionBenchError(
            f"The model {path!r} could not be loaded from the Hub ({reason(error)}). Check the id and the revision, "
            "the network and HF_HUB_OFFLINE, that it has safetensors and, for a gated model, `hf auth login`; or give "
            "a local folder."
        ) from error


def weight_files(folder: Path, *, allow_pickle: bool = False) -> list[Path]:
    """The files that transformers reads a folder's weights from, an index first where there is one.

    Raises:
        RetentionBenchError: There are none, only pickles that may not be read, an index that names something else, or
            one of them is no file.
    """
    safe = next((folder / name for name in _SAFE if _is_there(folder / name)), None)
    pickled = next((folder / name for name in _PICKLED if _is_there(folder / name)), None)
    if safe is None and pickled is not None and not allow_pickle:
        raise RetentionBenchError(
            f"{folder} has only pickled weights ({pickled.name}), and loading those can run code. If you trust them, "
            "give `score` --allow-pickle, or save the model again with save_pretrained: that writes safetensors."
        )
    first = safe or pickled
    if first is None:
        raise RetentionBenchError(
            f"{folder} has no weights (model.safetensors). Give a folder that save_pretrained wrote."
        )
    files = [first]
    if first.suffix == ".json":
        index = read_json(first, dict[str, Any], "index of weights")
        places = index.get("weight_map")
        if not isinstance(places, Mapping) or not places:
            raise RetentionBenchError(f"{first} is no index of weights: it has no `weight_map`. Make it again.")
        suffix = ".safetensors" if first is safe else ".bin"
        for part in sorted({str(place) for place in places.values()}):
            if Path(part).name != part or not part.endswith(suffix):
                raise RetentionBenchError(
                    f"{first} names {part!r}, which is no {suffix} file beside it. Save the model again."
                )
            files.append(folder / part)
    for path in files:
        check_regular(path)
    return files


def check_regular(path: Path) -> None:
    """Refuse what stands in a file's place: a folder, a pipe, a dangling link, or Git LFS's word for a file.

    Raises:
        RetentionBenchError: It is no file that can be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise RetentionBenchError(f"{path} is no regular file. Copy the model again.")
        with path.open("rb") as file:
            begin = file.read(64)
    except OSError as error:
        raise RetentionBenchError(f"{path} cannot be read ({error.strerror}). Copy the model again.") from error
    refuse_pointer(path, begin)


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        RetentionBenchError: One is infinite or NaN; it is named.
    """
    for weight, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise RetentionBenchError(
                f"{weight} in {name} has numbers that are not finite. The file is damaged, or the training that made "
                "it diverged: make it again."
            )


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)  # a dangling link is a file that is broken, not one that isn't there


def _check_counts(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a configuration that transformers would fill all memory with.

    Raises:
        RetentionBenchError: It asks for more of something than any model has.
    """
    for name, most in _MOST.items():
        count = settings.get(name, 0)
        if isinstance(count, (int, float)) and not 0 <= count <= most:
            raise RetentionBenchError(
                f"{folder / 'config.json'}: {name} is {shortened(count)}, and 0 to {most} are built. Correct it."
            )


def _check_size(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Refuse a model that this machine cannot hold before anything is allocated.

    Raises:
        RetentionBenchError: It is larger than the memory, or cannot be made.
    """
    model = empty_model(config)
    needed = sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers())) * dtype.itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise RetentionBenchError(
            f"The model that {folder / 'config.json'} describes takes {needed / 2**30:,.0f} GiB in "
            f"{str(dtype).removeprefix('torch.')}, and this machine has {memory / 2**30:,.0f} GiB of memory. Take a "
            "smaller dtype or a larger machine, or correct the file."
        )


def _check_tokenizer(folder: Path) -> None:
    if not any(_is_there(folder / name) for name in _TOKENIZERS):
        raise RetentionBenchError(
            f"{folder} has no tokenizer (one of {', '.join(_TOKENIZERS)}). Save it there with "
            "tokenizer.save_pretrained, or give `score` --tokenizer FOLDER."
        )
    for name in _READ:
        if _is_there(folder / name):
            check_regular(folder / name)
            if name in _SETTINGS:
                read_json(folder / name, dict[str, Any], "model file")


def _drop_without_effect(model: Any, name: str) -> None:
    """Drop generation settings that have no effect without sampling or beams, for transformers refuses to save them.

    Llama 2 and Vicuna have a temperature without `do_sample`.

    Raises:
        RetentionBenchError: They cannot be saved without them either.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    with explained(name, "generation_config.json"):
        try:
            config.validate(strict=True)
        except ValueError:
            if config.do_sample:
                raise
            for setting in _WITHOUT_EFFECT:
                if hasattr(config, setting):
                    setattr(config, setting, getattr(GenerationConfig(), setting))
            config.validate(strict=True)
