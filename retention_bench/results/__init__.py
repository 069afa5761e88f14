"""What was measured: the schema, counting, reading it back, and comparing."""

from retention_bench.results.aggregate import Aggregates, Run, aggregate
from retention_bench.results.gates import MIN_EFFICACY
from retention_bench.results.kinds import KINDS, STAGES, Kind
from retention_bench.results.measure_types import Rate
from retention_bench.results.samples import Sample
from retention_bench.results.schema import SCHEMA_VERSION, Results

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
