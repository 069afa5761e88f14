"""Analysis: rates with intervals, and what to say about the difference between two of them."""

from retention_bench.analysis.intervals import Gap, Rate, gap, rate, retention

__all__ = ["Gap", "Rate", "gap", "rate", "retention"]
