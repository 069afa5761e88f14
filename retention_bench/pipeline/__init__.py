"""The pipeline: suites, cells and their stages, the content-addressed store, the results."""

from retention_bench.pipeline.cell import Cell, Plan
from retention_bench.pipeline.data_check import check_data
from retention_bench.pipeline.estimate import Estimate, estimate
from retention_bench.pipeline.planning import plan
from retention_bench.pipeline.results import aggregate
from retention_bench.pipeline.run import evaluate
from retention_bench.pipeline.store import Store, default_root
from retention_bench.pipeline.suite import Suite, load_suite, suite_names

__all__ = [
    "Cell",
    "Estimate",
    "Plan",
    "Store",
    "Suite",
    "aggregate",
    "check_data",
    "default_root",
    "estimate",
    "evaluate",
    "load_suite",
    "plan",
    "suite_names",
]
