"""Covariance files of ROME's, MEMIT's and AlphaEdit's own code, and whether one can belong to a model.

They share `layer_stats`, which keeps one `.npz` for each layer: `mom2.mom2`, the sum of k k^T [d_mlp, d_mlp], and
`mom2.count`, the number of tokens (`CombinedStat` and `SecondMoment` in their `runningstats.py`). Nothing in the file
names the model.
"""

from __future__ import annotations

import dataclasses
import io
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.data import find_file, shortened
from retention_bench.editors.covariance.covariance import Covariance, Measurement
from retention_bench.editors.covariance.fingerprint import key_fingerprint
from retention_bench.editors.locate.linalg import not_positive_semidefinite
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import frozen, pad, record

RESEMBLANCE = 0.1
"""The least correlation of a file's matrix with one sampled from the model, both normalised to a unit diagonal, over
the entries off it.

Measured on atlas-gpt2, atlas-llama and the tests' golden GPT-2, layers 0, 1 and 3, on `SAMPLE`: 0.27 to 0.95 for the
model's own covariance, whichever of two corpora it was measured on; -0.05 to 0.04 for another layer, random weights
of the same shape or permuted neurons. The plain cosine tells less: 0.14 to 0.97 against up to 0.52.
"""

SCALE = 20.0
"""How many times larger or smaller than the sampled one a file's trace may be.

The model's own covariance gave 0.5 to 3.2 in the same measurements. A matrix that was divided by the tokens already is
too small by their number.
"""

SAMPLE = (
    "The river rises in the hills north of the town and runs for ninety miles to the sea. In 1887 a bridge was built "
    "to carry the railway across it, and the engineer who drew the plans, a woman from Leeds, was paid less than the "
    "men who laid the stones. Today about 40,000 people live in the valley; most work in schools, hospitals and small "
    'factories. "We never thought of leaving," said one of them, who keeps bees.',
    "Scientists from the university measure the water every week, because farmers use fertiliser and the fish have "
    "become fewer. If the temperature goes on rising, they expect that salmon will be gone by 2050. The government has "
    "promised money for new filters, but the law (the third of its kind) must first pass through parliament. To make "
    "bread, mix 500 g of flour with water, salt and yeast, and bake it at 230 degrees for half an hour.",
)
"""Ordinary English to compare on where nothing nearer to the files' own corpus is at hand."""

_HEADER = 1 << 14  # bytes that an array's header may take; the references' take 128
_SQUEEZED = 20  # how many times smaller than its contents a member may be; noisy floats hardly get smaller
_SMALL = 1 << 20  # below this many bytes it may be anything
_MOST_TOKENS = 2**63 - 1
_HEADERS = {(1, 0): numpy.lib.format.read_array_header_1_0, (2, 0): numpy.lib.format.read_array_header_2_0}


def read_rome_npz(files: Mapping[int, Path | str], *, source: str = "") -> Covariance:
    """Read files of the reference editors.

    Args:
        files: The `.npz` file of each layer. Pickles in one are not loaded, and no more memory is taken than its size
            tells.
        source: What they were measured on, for people.

    Returns:
        Their covariance, which does not say whose it is; see `with_fingerprint`.

    Raises:
        UsageError: No files, files over different numbers of tokens, or no such file.
        RetentionBenchError: A file is not of that form, or its matrix is not square, finite, symmetric and positive
            semidefinite.
    """
    if not files:
        raise UsageError("No .npz files were given to read a covariance from. Give one for each layer.")
    read = {layer: _read(path) for layer, path in sorted(files.items())}
    counts = {layer: tokens for layer, (_, tokens) in read.items()}
    if len(set(counts.values())) > 1:
        raise UsageError(
            f"The files were measured over different numbers of tokens, by layer {counts}: not on the same texts. "
            "Give files of one run."
        )
    return Covariance({layer: matrix for layer, (matrix, _) in read.items()}, next(iter(counts.values())), source)


def with_fingerprint(
    covariance: Covariance,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] = SAMPLE,
) -> Covariance:
    """A covariance that came without a fingerprint, with the fingerprint of the model that it is found to belong to.

    Its matrices are compared with the model's keys on some text. A relative of the model, such as one fine-tuned from
    it, cannot be told apart by this.

    Args:
        covariance: From `read_rome_npz`.
        model: The model that it should belong to; it is left as it was found.
        tokenizer: The model's tokenizer.
        texts: Text to compare on, a few hundred tokens of it, each text cut at the model's positions; nearer to what
            the files were measured on is better.

    Raises:
        UsageError: It is another model's or another layer's; the figures are named.
    """
    layers = list(covariance.mom2)
    covariance.check(model, layers)
    _check_resemblance(model, tokenizer, covariance.mom2, texts)
    return dataclasses.replace(
        covariance, fingerprint=key_fingerprint(model, layers), measured=Measurement.of(model, layers)
    )


def _read(path: Path | str) -> tuple[Tensor, int]:
    """E[k k^T] of one file, float32 [d_mlp, d_mlp], and the number of tokens."""
    found = find_file(path, "file with a layer's covariance of a reference editor")
    try:
        with zipfile.ZipFile(found) as archive:
            names = sorted(name.removesuffix(".npy") for name in archive.namelist())
            missing = [name for name in ("mom2.mom2", "mom2.count") if name not in names]
            if missing:
                raise RetentionBenchError(
                    f"{path} lacks {' and '.join(missing)}; it has {_listed(names)}. Give a file that "
                    "`layer_stats` of ROME, MEMIT or AlphaEdit wrote with `mom2` among what it collects."
                )
            count = _array(archive, "mom2.count", path, "the number of tokens", _is_scalar)
            total = _array(archive, "mom2.mom2", path, "a square matrix of floats", _is_square)
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise RetentionBenchError(
            f"{path} is no .npz file, or is cut off ({type(error).__name__}: {error}). Fetch or make it again."
        ) from error
    tokens = count.item()
    if not (0 < tokens <= _MOST_TOKENS and tokens == int(tokens)):
        raise RetentionBenchError(f"{path}: mom2.count should be the number of tokens and is {shortened(tokens)}.")
    tokens = int(tokens)
    matrix = (torch.from_numpy(total.astype(numpy.float64, copy=False)) / tokens).float()
    wrong = not_positive_semidefinite(matrix)
    if wrong:
        raise RetentionBenchError(f"{path}: mom2.mom2 is no covariance: {wrong}. Fetch or make the file again.")
    return (matrix + matrix.T) / 2, tokens


def _check_resemblance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mom2: Mapping[int, Tensor], texts: Sequence[str]
) -> None:
    """Refuse matrices that do not resemble those of the model's keys on some text."""
    layers = list(mom2)
    rows = tokenizer(list(texts), truncation=True, max_length=model.config.max_position_embeddings)["input_ids"]
    sampled: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with frozen(model):
        for row in filter(None, rows):
            keys, _ = record(model, *pad([row], model.device), keys=layers)
            for layer in layers:
                sampled[layer].append(keys[layer][0].float().cpu())
    if not any(rows):
        raise UsageError("The text to compare a covariance on holds no token. Give text that is not empty.")
    for layer, matrix in mom2.items():
        alike, scale = resemblance(matrix, torch.cat(sampled[layer]))
        if not (alike >= RESEMBLANCE and 1 / SCALE <= scale <= SCALE):
            raise UsageError(
                f"The covariance of layer {layer} is not this model's: over {len(torch.cat(sampled[layer]))} tokens of "
                f"text the model's own correlates with it by {alike:.2f} (at least {RESEMBLANCE:g} is needed, another "
                f"model's or layer's comes to about 0), and its trace is {scale:.3g} times as large (1/{SCALE:g} to "
                f"{SCALE:g} is allowed). Check which model and layer the file belongs to."
            )


def resemblance(matrix: Tensor, keys: Tensor) -> tuple[float, float]:
    """How alike a covariance and that of some sampled keys are.

    Args:
        matrix: E[k k^T], float32 [d_mlp, d_mlp].
        keys: Sampled keys, float32 [tokens, d_mlp].

    Returns:
        The correlation of the two over the entries off the diagonal, each normalised to a unit diagonal, so that the
        scales of single neurons have no part in it; and the trace of the covariance over that of the keys'.
    """
    sample = keys.T @ keys / len(keys)
    scale = (matrix.trace() / sample.trace()).item()
    first, second = (_off_diagonal(one) for one in (matrix, sample))
    norms = first.norm() * second.norm()
    return ((first * second).sum() / norms).item() if norms > 0 else 0.0, scale


def _off_diagonal(matrix: Tensor) -> Tensor:
    """The matrix normalised to a unit diagonal, centred over its other entries, and zero on the diagonal."""
    size = len(matrix)
    # A neuron that never fires has no scale; its entries are 0 under any.
    scale = matrix.diagonal().clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt()
    entries = matrix * scale * scale[:, None]
    entries.fill_diagonal_(0)
    entries -= entries.sum() / (size * (size - 1))
    return entries.fill_diagonal_(0)


def _array(
    archive: zipfile.ZipFile, name: str, path: Path | str, wanted: str, fits: Callable[[tuple[int, ...], Any], bool]
) -> Any:
    """Read an array, after a look at the size that its header states: numpy takes that memory before it reads on.

    Args:
        archive: The open archive.
        name: The array's name.
        path: The archive's path, for errors.
        wanted: What the array should be, for errors.
        fits: Whether a shape and a dtype are that.

    Raises:
        RetentionBenchError: It is something else.
        BadZipFile: It would take far more memory than the archive has bytes.
        ValueError: It has no header that numpy can read, or more or less data than the header says.
    """
    info = archive.getinfo(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)
    size = os.path.getsize(str(archive.filename))
    if info.compress_size > size or info.file_size > _SMALL + _SQUEEZED * info.compress_size:
        raise zipfile.BadZipFile(f"{name} would take {info.file_size} bytes, and the archive has {size}")
    with archive.open(info) as member:
        header = io.BytesIO(member.read(_HEADER))
        version = numpy.lib.format.read_magic(header)
        if version not in _HEADERS:
            raise ValueError(f"{name} is in version {version} of numpy's format")
        try:
            shape, _, dtype = _HEADERS[version](header)
        except Exception as error:  # it evaluates a text of the file, and what that can raise is not documented
            raise ValueError(f"the header of {name} is damaged, {type(error).__name__}") from error
        if not fits(shape, dtype):
            raise RetentionBenchError(
                f"{path}: {name} should be {wanted} and has the shape {str(list(shape))[:60]} and the dtype "
                f"{str(dtype)[:60]}."
            )
        asked = header.tell() + math.prod(shape) * dtype.itemsize
        if asked != info.file_size:
            raise ValueError(f"the header of {name} asks for {asked} bytes, and there are {info.file_size}")
        member.seek(0)
        return numpy.lib.format.read_array(member, allow_pickle=False)


def _is_scalar(shape: tuple[int, ...], dtype: numpy.dtype) -> bool:
    return math.prod(shape) == 1 and dtype.kind in "iuf"


def _is_square(shape: tuple[int, ...], dtype: numpy.dtype) -> bool:
    return len(shape) == 2 and shape[0] == shape[1] > 0 and dtype.kind == "f"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name[:60] for name in names[:10]) or "nothing"
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown
