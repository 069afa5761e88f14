"""MALMEN: a hyper-network, trained first, turns gradients into an edit (Tan et al. 2024, arXiv 2311.04661)."""

from retention_bench.editors.malmen.malmen import MALMEN

__all__ = ["MALMEN"]
