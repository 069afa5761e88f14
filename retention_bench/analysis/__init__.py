"""Analysis: rates with intervals, and what to say about the difference between two of them."""

from retention_bench.analysis.comparison import Comparison, about_fact, compare, rank
from retention_bench.analysis.intervals import Gap, Rate, clustered, gap, rate, retention
from retention_bench.analysis.paired import Difference, difference, holm, mcnemar, mcnemar_by_fact
from retention_bench.analysis.power import detectable, detectable_paired
from retention_bench.analysis.ranks import Rank, rank_intervals

__all__ = [
    "Comparison",
    "Difference",
    "Gap",
    "Rank",
    "Rate",
    "about_fact",
    "clustered",
    "compare",
    "detectable",
    "detectable_paired",
    "difference",
    "gap",
    "holm",
    "mcnemar",
    "mcnemar_by_fact",
    "rank",
    "rank_intervals",
    "rate",
    "retention",
]
