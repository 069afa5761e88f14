"""Running sums of k k^T over batches of keys."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from retention_bench.errors import RetentionBenchError

_BLOCKS = 8  # columns of a symmetric sum are added in this many blocks: 9/16 of the work, and of the memory
_NARROWEST = 128  # columns a block has at least; narrower ones make slow products


class Sums:
    """Running sums of k k^T for some layers.

    They are symmetric, so only the upper triangle is added up, in blocks of rows: block b of a layer holds rows
    b * width to (b + 1) * width, from the diagonal on.

    Args:
        blocks: By layer the blocks, with the shapes of `block_shapes`.
    """

    def __init__(self, blocks: dict[int, list[Tensor]]) -> None:
        self.blocks = blocks

    @classmethod
    def zero(cls, sizes: Mapping[int, int], dtype: torch.dtype, device: torch.device) -> Sums:
        """Sums of no keys, for layers with these sizes of keys."""
        return cls(
            {
                layer: [torch.zeros(shape, dtype=dtype, device=device) for shape in block_shapes(size)]
                for layer, size in sizes.items()
            }
        )

    def add(self, layer: int, keys: Tensor) -> None:
        """Add keys, float32 [tokens, d_mlp]."""
        for block in self.blocks[layer]:
            right = keys[:, keys.shape[1] - block.shape[1] :]
            block += right[:, : block.shape[0]].T @ right

    def check_finite(self, done: int) -> None:
        """Refuse keys that are not finite early, and not after hours. One such key makes its diagonal entry not finite.

        Args:
            done: Texts done, for the error.

        Raises:
            RetentionBenchError: A sum is not finite.
        """
        for layer, blocks in self.blocks.items():
            if not all(block.diagonal().isfinite().all() for block in blocks):
                raise RetentionBenchError(
                    f"The keys of layer {layer} are not all finite, in the first {done} texts. "
                    "Check the model's weights and dtype."
                )

    def means(self, tokens: int) -> dict[int, Tensor]:
        """By layer E[k k^T], the whole matrix over the number of tokens, float32 on the CPU."""
        found = {}
        for layer, blocks in self.blocks.items():
            matrix = torch.empty(blocks[0].shape[1], blocks[0].shape[1])
            for block in blocks:
                mean = (block / tokens).float().cpu()
                rows, columns = mean.shape
                first = len(matrix) - columns
                mean[:, :rows] = mean[:, :rows].triu() + mean[:, :rows].triu(1).T
                matrix[first : first + rows, first:] = mean
                matrix[first:, first : first + rows] = mean.T
            found[layer] = matrix
        return found


def block_shapes(size: int) -> list[tuple[int, int]]:
    """Rows and columns of the blocks of a symmetric matrix [size, size], from the diagonal on."""
    width = max(_NARROWEST, -(-size // _BLOCKS))
    return [(min(width, size - start), size - start) for start in range(0, size, width)]
