"""What was measured: the schema, counting, reading it back, and comparing."""

from retention_bench.results.aggregate import Aggregates, Run, aggregate
from retention_bench.results.gates import MIN_EFFICACY
from retention_bench.results.schema import KINDS, SCHEMA_VERSION, STAGES, Kind, Rate, Results, Sample

__all__ = [
    "KINDS",
    "MIN_EFFICACY",
    "SCHEMA_VERSION",
    "STAGES",
    "Aggregates",
    "Kind",
    "Rate",
    "Results",
    "Run",
    "Sample",
    "aggregate",
]
