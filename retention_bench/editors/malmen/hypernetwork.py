"""MALMEN's hyper-network: turns keys and gradients into the values' changes (Tan et al. 2024; `nets.py`).

One network serves all projections of a shape. Each projection has its own row of the scales, shifts, learning rates and
ridges; `module` is the index of that row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class HyperNetwork:
    """A running normaliser and low-rank residual blocks over a key and its gradient, a vector of size d = d_in + d_out.

    Attributes:
        weights: Trained parameters, float32 leaves: for each block I `blocks.I.A` [d, rank], `blocks.I.B` [rank, d],
            `blocks.I.bias` [d], `blocks.I.scale.weight` and `blocks.I.shift.weight` [modules, d]; and `lr.weight`
            and `lamda.weight` [modules, 1]. The names are the authors'.
        normaliser: Running statistics of the rows that `observe` saw: `n`, their number, int64 [1]; `mean`, and `var`,
            the sum of squared deviations from it, float32 [d].
    """

    weights: Mapping[str, Tensor]
    normaliser: Mapping[str, Tensor]

    @classmethod
    def new(
        cls,
        d_in: int,
        d_out: int,
        modules: int,
        *,
        rank: int,
        n_blocks: int,
        lr: float,
        generator: torch.Generator,
        device: torch.device,
    ) -> HyperNetwork:
        """A network whose output is its normalised input.

        Args:
            d_in: Size of a key.
            d_out: Size of a value.
            modules: Projections it serves.
            rank: Rank of the blocks.
            n_blocks: Number of blocks.
            lr: Every module's initial learning rate.
            generator: On the CPU; A is drawn from it.
            device: Where the network goes.
        """
        size = d_in + d_out
        weights: dict[str, Tensor] = {}
        for block in range(n_blocks):
            weights |= {
                f"blocks.{block}.A": torch.randn(size, rank, generator=generator),
                f"blocks.{block}.B": torch.zeros(rank, size),
                f"blocks.{block}.bias": torch.zeros(size),
                f"blocks.{block}.scale.weight": torch.ones(modules, size),
                f"blocks.{block}.shift.weight": torch.zeros(modules, size),
            }
        weights |= {"lr.weight": torch.full((modules, 1), lr), "lamda.weight": torch.zeros(modules, 1)}
        normaliser = {"n": torch.zeros(1, dtype=torch.int64), "mean": torch.zeros(size), "var": torch.zeros(size)}
        return cls.of(weights | {f"normalizer.{name}": tensor for name, tensor in normaliser.items()}, device)

    @classmethod
    def of(cls, state: Mapping[str, Tensor], device: torch.device) -> HyperNetwork:
        """The network whose `state` this is, on a device."""
        weights, normaliser = {}, {}
        # Sorted: an optimiser knows weights by their position, and a file returns them in an order of its own.
        for name, tensor in sorted(state.items()):
            part, _, inner = name.partition(".")
            if part == "normalizer":
                normaliser[inner] = tensor.detach().to(device, copy=True)
            else:
                weights[name] = tensor.detach().to(device, copy=True).requires_grad_()
        return cls(weights, normaliser)

    def state(self) -> dict[str, Tensor]:
        """All its tensors, by name."""
        detached = {name: weight.detach() for name, weight in self.weights.items()}
        return detached | {f"normalizer.{name}": tensor for name, tensor in self.normaliser.items()}

    @torch.no_grad()
    def observe(self, keys: Tensor, gradients: Tensor) -> None:
        """Add rows to the normaliser.

        Args:
            keys: [rows, d_in], float32.
            gradients: [rows, d_out], float32.
        """
        rows = torch.cat([keys, gradients], 1)
        n, mean, var = (self.normaliser[name] for name in ("n", "mean", "var"))
        before, added = n.clone(), len(rows)
        n += added
        away = rows.mean(0) - mean
        mean += added / n * away
        # As the authors, who multiply the unbiased variance by the number of rows instead of one less: the deviations
        # come out a little large. The variance of a single row would be NaN.
        within = added * rows.var(0) if added > 1 else torch.zeros_like(var)
        var += within + before * added / n * away**2

    def pseudo(self, module: int, keys: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The pseudo keys and gradients k~, g~.

        Every block turns y into y + scale * max(0, y A B + bias) + shift.

        Args:
            module: The projection's index.
            keys: [rows, d_in], float32.
            gradients: [rows, d_out], float32.

        Returns:
            [rows, d_in] and [rows, d_out].
        """
        epsilon = torch.finfo(torch.float32).eps
        std = (self.normaliser["var"] / (self.normaliser["n"] - 1 + epsilon)).sqrt()
        y = (torch.cat([keys, gradients], 1) - self.normaliser["mean"]) / (std + epsilon)
        for block in range(sum(name.endswith(".A") for name in self.weights)):
            A, B, bias, scale, shift = (
                self.weights[f"blocks.{block}.{name}"] for name in ("A", "B", "bias", "scale.weight", "shift.weight")
            )
            # clamp_min, not relu: at B = 0 every entry is exactly 0, where relu's gradient is 0 and the block would
            # never begin to learn.
            y = y + scale[module] * (y @ A @ B + bias).clamp_min(0) + shift[module]
        return y[:, : keys.shape[1]], y[:, keys.shape[1] :]

    def value_changes(self, module: int, keys: Tensor, gradients: Tensor) -> Tensor:
        """The change of every value, D = -lr (k . k~) g~, [rows, d_out]; arguments as for `pseudo`."""
        pseudo_keys, pseudo_gradients = self.pseudo(module, keys, gradients)
        return -self.weights["lr.weight"][module] * (keys * pseudo_keys).sum(1, keepdim=True) * pseudo_gradients

    def lamda(self, module: int) -> Tensor:
        """The logarithm of a projection's ridge, [1]."""
        return self.weights["lamda.weight"][module]
