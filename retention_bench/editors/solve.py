"""Linear systems with the keys' second moment."""

from __future__ import annotations

import torch
from torch import Tensor

from retention_bench.errors import RetentionBenchError


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
