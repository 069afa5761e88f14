"""Token sequences in rows where a beginning that several have in common stands once, so that a model reads it once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

Prompt = tuple[int, ...]

MAX_ROW_TOKENS = 512
"""Tokens in a row, unless a single sequence is longer. A token's attention goes over its whole row."""


@dataclass
class Row:
    """Sequences as a tree of tokens, depth first; a token sees those that lead to it.

    Attributes:
        tokens: The ids.
        positions: The place of each token in its sequences, from 0.
        ends: For each token the index behind the last one that sees it.
        paths: For each sequence the indices of its tokens.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    paths: dict[Prompt, list[int]] = field(default_factory=dict)

    def visible(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Which tokens (second dimension) each token (first) sees; bool, (tokens, tokens)."""
        index = torch.arange(len(self.tokens), device=device)
        ends = torch.tensor(self.ends, device=device)
        return (index[None, :] <= index[:, None]) & (index[:, None] < ends[None, :])


def rows(sequences: Iterable[Prompt], most: int) -> Iterator[Row]:
    """Lay out sequences in rows.

    Args:
        sequences: Token ids, at least one each. Those that begin alike come into the same row as long as it has room.
        most: Sequences in a row.
    """
    row, path, last = Row(), list[int](), Prompt()
    for sequence in sorted(set(sequences)):
        common = _common(last, sequence)
        if row.paths and (len(row.paths) == most or len(row.tokens) + len(sequence) - common > MAX_ROW_TOKENS):
            yield _ended(row, path)
            row, path, common = Row(), [], 0
        for index in path[common:]:
            row.ends[index] = len(row.tokens)
        new = range(len(row.tokens), len(row.tokens) + len(sequence) - common)
        path = [*path[:common], *new]
        row.tokens += sequence[common:]
        row.positions += range(common, len(sequence))
        row.ends += [0] * len(new)  # known when another sequence leaves the path
        row.paths[sequence] = path
        last = sequence
    if row.paths:
        yield _ended(row, path)


def _ended(row: Row, path: list[int]) -> Row:
    for index in path:
        row.ends[index] = len(row.tokens)
    return row


def _common(a: Prompt, b: Prompt) -> int:
    """How many tokens two sequences have in common at the beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
