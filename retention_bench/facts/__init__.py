"""Facts: what is edited, what is asked."""

from retention_bench.facts.fact import Fact, FactSet

__all__ = ["Fact", "FactSet"]
