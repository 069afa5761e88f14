"""The least-squares problem by which MALMEN aggregates many facts into one shift of a weight, and its gradient.

The values of the keys K, with a row for each answer token, are to change by D. The shift S, which maps a key k to the
change k S, is the ridge regression (Tan et al. 2024, where a fact is a column)

    S = (K'K + e^lamda I)^-1 K'D

There is no backward pass through the solve. From the gradient G of a loss with respect to S,

    dD = K (K'K + e^lamda I)^-1 G,        dlamda = -e^lamda sum(((K'K + e^lamda I)^-1 G) * S)

With fewer rows than d_in, the smaller system (K K' + e^lamda I)^-1 gives the same, and S as two factors.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from retention_bench.models import LowRank


@dataclasses.dataclass(frozen=True, eq=False)
class NormalEquation:
    """One layer's least-squares problem, in float64.

    Attributes:
        keys: K [rows, d_in].
        changes: D [rows, d_out].
        ridge: e^lamda.
        factor: The Cholesky factor of the smaller of K K' + ridge I and K'K + ridge I.
    """

    keys: Tensor
    changes: Tensor
    ridge: float
    factor: Tensor

    @classmethod
    def of(cls, keys: Tensor, changes: Tensor, lamda: Tensor) -> NormalEquation:
        """Set up the problem from K, D and lamda."""
        keys, ridge = keys.double(), float(lamda.detach().double().exp())
        system = keys @ keys.T if len(keys) < keys.shape[1] else keys.T @ keys
        system = system + ridge * torch.eye(len(system), dtype=system.dtype, device=system.device)
        return cls(keys, changes.detach().double(), ridge, torch.linalg.cholesky(system))

    @property
    def _few_rows(self) -> bool:
        return len(self.keys) < self.keys.shape[1]

    def shift(self) -> Tensor | LowRank:
        """S [d_in, d_out]; as two factors where they are smaller."""
        if not self._few_rows:
            return torch.cholesky_solve(self.keys.T @ self.changes, self.factor)
        shift = LowRank(self.keys.T, torch.cholesky_solve(self.changes, self.factor))
        return shift if len(self.keys) < self.changes.shape[1] else shift.left @ shift.right

    def gradients(self, shift_gradient: Tensor) -> tuple[Tensor, float]:
        """The gradients of D and lamda, from that of S.

        Args:
            shift_gradient: G [d_in, d_out].

        Returns:
            dD, float32 [rows, d_out], and dlamda.
        """
        G = shift_gradient.double()
        if self._few_rows:
            dD = torch.cholesky_solve(self.keys @ G, self.factor)
            inner = (dD * torch.cholesky_solve(self.changes, self.factor)).sum()
        else:
            M = torch.cholesky_solve(G, self.factor)
            dD = self.keys @ M
            inner = (M * torch.cholesky_solve(self.keys.T @ self.changes, self.factor)).sum()
        return dD.float(), -self.ridge * inner.item()
