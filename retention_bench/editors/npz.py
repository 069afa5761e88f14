"""Covariance files of the reference editors, and whether one can be a model's.

ROME, MEMIT and AlphaEdit share `layer_stats`, which keeps one `.npz` a layer: `mom2.mom2`, the sum of k k^T
[d_mlp, d_mlp], and `mom2.count`, the number of tokens (`CombinedStat` and `SecondMoment` in their `runningstats.py`).
Nothing in the file names the model.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import frozen, pad, record

RESEMBLANCE = 0.1
"""The least correlation of a file's matrix with one sampled from the model, both normalised to a unit diagonal, over
the entries beside it.

Measured on atlas-gpt2, atlas-llama and the tests' golden GPT-2, layers 0, 1 and 3, on `SAMPLE`: 0.27 to 0.95 for the
model's own statistics, whichever of two corpora they were measured on; -0.05 to 0.04 for another layer, random weights
of the same shape or permuted neurons. The plain cosine tells less: 0.14 to 0.97 against up to 0.52.
"""

SCALE = 20.0
"""How many times larger or smaller than the sampled one a file's trace may be.

The model's own statistics gave 0.5 to 3.2 in the same measurements. A file whose matrix was divided by the tokens
already is off by their number.
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

_ROUNDING = 1e-4  # of the largest entry or the norm: float32 sums over tens of millions of tokens


def read_second_moment(path: Path | str) -> tuple[Tensor, int]:
    """Read one file of the references.

    Args:
        path: The `.npz` file. Pickles in it are not loaded.

    Returns:
        E[k k^T], float32 [d_mlp, d_mlp], and the number of tokens.

    Raises:
        RetentionBenchError: There is no such file, it is not of that form, or the matrix is not square, finite,
            symmetric and positive semidefinite.
    """
    if not Path(path).is_file():
        raise RetentionBenchError(
            f"There is no file {path}; it should hold a layer's covariance of a reference editor."
        )
    try:
        if not zipfile.is_zipfile(path):  # numpy would read a lone array, and has nothing to close then
            raise zipfile.BadZipFile("not an archive")
        with numpy.load(path, allow_pickle=False) as archive:
            names = sorted(archive.files)
            missing = [name for name in ("mom2.mom2", "mom2.count") if name not in names]
            if missing:
                raise RetentionBenchError(
                    f"{path} lacks {' and '.join(missing)}; it has {', '.join(names) or 'nothing'}. Give a file that "
                    "`layer_stats` of ROME, MEMIT or AlphaEdit wrote with `mom2` among what it collects."
                )
            total, count = archive["mom2.mom2"], archive["mom2.count"]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise RetentionBenchError(
            f"{path} is no .npz file, or is cut off ({type(error).__name__}: {error}). Fetch or make it again."
        ) from error
    if count.size != 1 or not count.item() > 0 or count.item() != int(count.item()):
        raise RetentionBenchError(f"{path}: mom2.count should be the number of tokens and is {count.tolist()}.")
    if total.ndim != 2 or total.shape[0] != total.shape[1] or not numpy.issubdtype(total.dtype, numpy.floating):
        raise RetentionBenchError(
            f"{path}: mom2.mom2 should be a square matrix of floats and has the shape {list(total.shape)} and the "
            f"dtype {total.dtype}."
        )
    tokens = int(count.item())
    moment = torch.from_numpy(total.astype(numpy.float64)) / tokens
    wrong = _what_is_wrong(moment)
    if wrong:
        raise RetentionBenchError(f"{path}: mom2.mom2 is no second moment: {wrong}. Fetch or make the file again.")
    return ((moment + moment.T) / 2).float(), tokens


def check_resemblance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, moments: Mapping[int, Tensor], texts: Sequence[str]
) -> None:
    """Refuse second moments that are not this model's, by comparing them with the model's keys on some text.

    Args:
        model: The model; it is left as it was found.
        tokenizer: Its tokenizer.
        moments: By layer E[k k^T] [d_mlp, d_mlp], of the model's sizes.
        texts: The text, a few hundred tokens in all; each is cut at the model's positions.

    Raises:
        UsageError: A layer's moment does not resemble the sampled one; the figures are named.
    """
    layers = list(moments)
    rows = tokenizer(list(texts), truncation=True, max_length=model.config.max_position_embeddings)["input_ids"]
    sampled: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with frozen(model):
        for row in filter(None, rows):
            keys, _ = record(model, *pad([row], model.device), keys=layers)
            for layer in layers:
                sampled[layer].append(keys[layer][0].float().cpu())
    if not any(rows):
        raise UsageError("The text to compare key statistics on holds no token. Give text that is not empty.")
    for layer, moment in moments.items():
        alike, scale = resemblance(moment, torch.cat(sampled[layer]))
        if not (alike >= RESEMBLANCE and 1 / SCALE <= scale <= SCALE):
            raise UsageError(
                f"The covariance of layer {layer} is not this model's: over {len(torch.cat(sampled[layer]))} tokens of "
                f"text the model's own correlates with it by {alike:.2f} (at least {RESEMBLANCE:g} is needed, another "
                f"model's or layer's comes to about 0), and its trace is {scale:.3g} times as large (1/{SCALE:g} to "
                f"{SCALE:g} is allowed). Check which model and layer the file belongs to."
            )


def resemblance(moment: Tensor, keys: Tensor) -> tuple[float, float]:
    """How alike a second moment and that of some keys are.

    Args:
        moment: E[k k^T], float32 [d_mlp, d_mlp].
        keys: Sampled keys, float32 [tokens, d_mlp].

    Returns:
        The correlation of the two, each normalised to a unit diagonal, over the entries beside it, which no common
        scale of neurons has a part in; and the trace of the moment over that of the keys'.
    """
    sample = keys.T @ keys / len(keys)
    scale = (moment.trace() / sample.trace()).item()
    first, second = (_beside_the_diagonal(matrix) for matrix in (moment, sample))
    norms = first.norm() * second.norm()
    return ((first * second).sum() / norms).item() if norms > 0 else 0.0, scale


def _beside_the_diagonal(moment: Tensor) -> Tensor:
    """The moment normalised to a unit diagonal, centred over its other entries, and zero on the diagonal."""
    size = len(moment)
    # A neuron that never fires has no scale, and zeros for entries.
    scale = moment.diagonal().clamp_min(torch.finfo(moment.dtype).tiny).rsqrt()
    entries = moment * scale * scale[:, None]
    entries.fill_diagonal_(0)
    entries -= entries.sum() / (size * (size - 1))
    return entries.fill_diagonal_(0)


def _what_is_wrong(moment: Tensor) -> str | None:
    """Why a float64 matrix is no second moment, or None."""
    if not moment.isfinite().all():
        return "it has numbers that are not finite"
    largest = moment.abs().max()
    if largest == 0:
        return "it is zero"
    skew = ((moment - moment.T).abs().max() / largest).item()
    if skew > _ROUNDING:
        return f"it is not symmetric (by {skew:.2g} of its largest entry)"
    shifted = (moment + moment.T) / 2
    shifted.diagonal().add_(_ROUNDING * moment.norm())
    if torch.linalg.cholesky_ex(shifted).info:
        return f"it has an eigenvalue below -{_ROUNDING:g} of its norm, where none should be negative"
    return None
