"""Analysis: rates and differences with intervals that are clustered by relation, tests between sides, and ranks."""

from retention_bench.analysis.clusters import MODELS, Answer
from retention_bench.analysis.comparison import Comparison, about_fact, compare, rank
from retention_bench.analysis.estimates import Estimate, gap, mean
from retention_bench.analysis.intervals import Rate, clustered, rate
from retention_bench.analysis.logodds import is_clipped, logit
from retention_bench.analysis.paired import holm, mcnemar, sign_flips
from retention_bench.analysis.power import detectable
from retention_bench.analysis.ranks import Rank, rank_intervals
from retention_bench.analysis.survival import survival

__all__ = [
    "MODELS",
    "Answer",
    "Comparison",
    "Estimate",
    "Rank",
    "Rate",
    "about_fact",
    "clustered",
    "compare",
    "detectable",
    "gap",
    "holm",
    "is_clipped",
    "logit",
    "mcnemar",
    "mean",
    "rank",
    "rank_intervals",
    "rate",
    "sign_flips",
    "survival",
]
