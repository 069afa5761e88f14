"""The pipeline: suites, and cells with their stages."""

from retention_bench.pipeline.cell import Cell, plan
from retention_bench.pipeline.data_check import check_data
from retention_bench.pipeline.estimate import Estimate, estimate
from retention_bench.pipeline.run import evaluate
from retention_bench.pipeline.stage import Bench
from retention_bench.pipeline.suite import Suite, load_suite, suite_names

__all__ = [
    "Bench",
    "Cell",
    "Estimate",
    "Suite",
    "check_data",
    "estimate",
    "evaluate",
    "load_suite",
    "plan",
    "suite_names",
]
