"""The content-addressed store, the locks on it, and the fingerprints that keys are made of."""

from retention_bench.store.fingerprints import OUTSIDE, Input
from retention_bench.store.store import Entry, Keyed, Store, default_root

__all__ = ["OUTSIDE", "Entry", "Input", "Keyed", "Store", "default_root"]
