"""Scoring checkpoints that are there already, many on one live engine, with a gate against a fresh model."""

from retention_bench.scoring.checkpoints.batch import Options, score_checkpoints

__all__ = ["Options", "score_checkpoints"]
