"""The pipeline: suites, cells and their stages, the content-addressed store, the results."""

from retention_bench.pipeline.cell import Cell, Plan, plan
from retention_bench.pipeline.results import aggregate
from retention_bench.pipeline.run import evaluate
from retention_bench.pipeline.store import Store, default_root
from retention_bench.pipeline.suite import Suite, load_suite, suite_names

__all__ = [
    "Cell",
    "Plan",
    "Store",
    "Suite",
    "aggregate",
    "default_root",
    "evaluate",
    "load_suite",
    "plan",
    "suite_names",
]
