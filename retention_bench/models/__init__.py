"""Models: loading, where a family keeps its parts, partial forward passes, and what an edit adds to the weights."""

from retention_bench.models.adapter import adapted
from retention_bench.models.checkpoint import Checkpoint, Layout
from retention_bench.models.delta import LowRank, WeightDelta, restoring
from retention_bench.models.families import (
    Family,
    block,
    family,
    is_in_out,
    key_size,
    mlp,
    num_layers,
    projection,
    projection_name,
)
from retention_bench.models.files import check_place, kind_of, read_header, read_tensors, replacing, write_tensors
from retention_bench.models.forward import frozen, last_hidden, log_probabilities, pad, record
from retention_bench.models.loading import empty_model, load_config, load_model, load_tokenizer, local_folder
from retention_bench.models.reference import Named, Reference, fetch, parse_reference, read_manifest, read_references
from retention_bench.models.suffixes import Site, Suffixes

__all__ = [
    "Checkpoint",
    "Family",
    "Layout",
    "LowRank",
    "Named",
    "Reference",
    "Site",
    "Suffixes",
    "WeightDelta",
    "adapted",
    "block",
    "check_place",
    "empty_model",
    "family",
    "fetch",
    "frozen",
    "is_in_out",
    "key_size",
    "kind_of",
    "last_hidden",
    "load_config",
    "load_model",
    "load_tokenizer",
    "local_folder",
    "log_probabilities",
    "mlp",
    "num_layers",
    "pad",
    "parse_reference",
    "projection",
    "projection_name",
    "read_header",
    "read_manifest",
    "read_references",
    "read_tensors",
    "record",
    "replacing",
    "restoring",
    "write_tensors",
]
