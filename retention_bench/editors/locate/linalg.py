"""The keys' second moment: whether a matrix can be one, and linear systems with it."""

from __future__ import annotations

import torch
from torch import Tensor

from retention_bench.errors import RetentionBenchError

_ROUNDING = 1e-4  # of the largest entry or the norm: float32 sums over tens of millions of tokens
_ROWS = 1024  # compared with as many columns at once: a whole transposed matrix is slow to read


def what_is_wrong(moment: Tensor) -> str | None:
    """Why a matrix is no second moment E[k k^T], or None where it is one, but for rounding.

    Takes about a second for keys of size 6,000 and ten for 14,000 on one core. A moment of fewer tokens than
    dimensions, which is singular, is one.

    Args:
        moment: Float32.
    """
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1] or not len(moment):
        return f"it has the shape {list(moment.shape)} and is not square"
    if not moment.isfinite().all():
        return "it has numbers that are not finite"
    largest = moment.abs().max()
    if largest == 0:
        return "it is zero"
    lowest = moment.diagonal().min() / largest
    if lowest < -_ROUNDING:
        return f"a mean square on its diagonal is negative (by {-lowest:.2g} of its largest entry)"
    starts = range(0, len(moment), _ROWS)
    skew = max((moment[i : i + _ROWS] - moment[:, i : i + _ROWS].T).abs().max().item() for i in starts) / largest
    if not skew <= _ROUNDING:  # two large numbers may overflow
        return f"it is not symmetric (by {skew:.2g} of its largest entry)"
    shifted = moment / largest
    shifted.diagonal().add_(_ROUNDING * torch.linalg.vector_norm(shifted))
    if torch.linalg.cholesky_ex(shifted).info:
        return f"it has an eigenvalue below -{_ROUNDING:g} of its norm, where none should be negative"
    return None


def cholesky(moment: Tensor, layer: int) -> Tensor:
    """The Cholesky factor of a positive definite matrix made of a layer's second moment, for `torch.cholesky_solve`.

    Args:
        moment: Symmetric [d_mlp, d_mlp], float64.
        layer: The layer, for the error.

    Returns:
        The lower factor [d_mlp, d_mlp].

    Raises:
        RetentionBenchError: The matrix is singular to working precision.
    """
    factor, failed = torch.linalg.cholesky_ex(moment)
    if failed:
        values = torch.linalg.eigvalsh(moment)
        raise RetentionBenchError(
            f"The key statistics of layer {layer} are singular: eigenvalues from {values[0]:.2g} to {values[-1]:.2g}, "
            f"{int((values <= 0).sum())} of {len(values)} not above 0. Collect them on more text: the tokens must be "
            f"several times as many as the {len(values)} dimensions of a key."
        )
    return factor
