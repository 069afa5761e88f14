"""Linear algebra with the covariance of the keys: whether a matrix can be one, systems with it, its null space."""

from __future__ import annotations

import torch
from torch import Tensor

from retention_bench.errors import RetentionBenchError, UsageError

_ROUNDING = 1e-4  # of the largest entry or the norm: float32 sums over tens of millions of tokens
_ROWS = 1024  # compared with as many columns at once: a whole transposed matrix is slow to read


def not_positive_semidefinite(matrix: Tensor) -> str | None:
    """Why a matrix cannot be a covariance E[k k^T], or None where it can, but for rounding.

    Takes about a second for keys of size 6,000 and ten for 14,000 on one core. A covariance over fewer tokens than
    dimensions is singular, and passes.

    Args:
        matrix: Float32.
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        return f"it has the shape {list(matrix.shape)} and is not square"
    if not matrix.isfinite().all():
        return "it has entries that are not finite"
    largest = matrix.abs().max()
    if largest == 0:
        return "it is zero"
    lowest = matrix.diagonal().min() / largest
    if lowest < -_ROUNDING:
        return f"a mean square on its diagonal is negative (by {-lowest:.2g} of its largest entry)"
    starts = range(0, len(matrix), _ROWS)
    skew = max((matrix[i : i + _ROWS] - matrix[:, i : i + _ROWS].T).abs().max().item() for i in starts) / largest
    if not skew <= _ROUNDING:  # the difference of two large entries may overflow
        return f"it is not symmetric (by {skew:.2g} of its largest entry)"
    shifted = matrix / largest
    shifted.diagonal().add_(_ROUNDING * torch.linalg.vector_norm(shifted))
    if torch.linalg.cholesky_ex(shifted).info:
        return f"it has an eigenvalue below -{_ROUNDING:g} of its norm, where none should be negative"
    return None


def cholesky(matrix: Tensor, layer: int) -> Tensor:
    """The Cholesky factor of a positive definite matrix made of a layer's covariance, for `torch.cholesky_solve`.

    Args:
        matrix: Symmetric [d_mlp, d_mlp], float64.
        layer: The layer, for the error.

    Returns:
        The lower factor [d_mlp, d_mlp].

    Raises:
        RetentionBenchError: The matrix is singular to working precision.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        values = torch.linalg.eigvalsh(matrix)
        raise RetentionBenchError(
            f"The covariance of layer {layer} is singular: eigenvalues from {values[0]:.2g} to {values[-1]:.2g}, "
            f"{int((values <= 0).sum())} of {len(values)} not above 0. Collect it on more text: the tokens must be "
            f"several times as many as the {len(values)} dimensions of a key."
        )
    return factor


def null_space_projector(covariance: Tensor, threshold: float) -> Tensor:
    """The projector onto the directions of key space that text hardly uses (AlphaEdit, section 3.2, equation 7).

    Args:
        covariance: E[k k^T], symmetric [d_mlp, d_mlp].
        threshold: Eigenvectors whose eigenvalue is below this, an absolute value, span the space.

    Returns:
        P = U U^T in float64 [d_mlp, d_mlp], on the covariance's device.

    Raises:
        UsageError: No eigenvalue is below the threshold.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    unused = vectors[:, values < threshold]
    if not unused.shape[1]:
        raise UsageError(
            f"nullspace_threshold is {threshold:g}, and no direction of the keys is below it (the smallest is "
            f"{values[0]:.3g}). Raise the threshold."
        )
    return unused @ unused.T
