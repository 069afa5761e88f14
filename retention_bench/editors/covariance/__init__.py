"""The covariance C of a model's keys over ordinary text (ROME's `mom2`): its file, and how it is collected or imported.

AlphaEdit, MEMIT and ROME need it. It is collected once for a model, and belongs to that model alone.
"""

from retention_bench.editors.covariance.collect import collect_covariance
from retention_bench.editors.covariance.covariance import KINDS, Covariance, Measurement, Spectrum, check_file
from retention_bench.editors.covariance.fingerprint import TOLERANCE, key_fingerprint
from retention_bench.editors.covariance.merge import merged
from retention_bench.editors.covariance.rome_npz import SAMPLE, read_rome_npz, with_fingerprint

__all__ = [
    "KINDS",
    "SAMPLE",
    "TOLERANCE",
    "Covariance",
    "Measurement",
    "Spectrum",
    "check_file",
    "collect_covariance",
    "key_fingerprint",
    "merged",
    "read_rome_npz",
    "with_fingerprint",
]
