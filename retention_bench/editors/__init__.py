"""Editors: ways to write facts into a model, by name, and what they need to do it.

What needs torch is imported when it is first asked for, so that listing the editors stays quick.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from retention_bench.editors.base import (
    DerivedEditor,
    EditContext,
    Editor,
    EditRequest,
    FittedEditor,
    parse_editor,
)
from retention_bench.registry import EDITORS

if TYPE_CHECKING:
    from retention_bench.editors.alphaedit import AlphaEdit
    from retention_bench.editors.covariance import Covariance, collect_covariance
    from retention_bench.editors.ft import FT
    from retention_bench.editors.locate.linalg import null_space_projector
    from retention_bench.editors.locate.templates import sample_context_templates
    from retention_bench.editors.lora import LoRA
    from retention_bench.editors.malmen import MALMEN
    from retention_bench.editors.memit import MEMIT
    from retention_bench.editors.rome import ROME
    from retention_bench.editors.sequential import edit_sequentially

_LATER = {
    "AlphaEdit": "alphaedit",
    "FT": "ft",
    "MEMIT": "memit",
    "ROME": "rome",
    "MALMEN": "malmen",
    "Covariance": "covariance",
    "LoRA": "lora",
    "edit_sequentially": "sequential",
    "collect_covariance": "covariance",
    "null_space_projector": "locate.linalg",
    "sample_context_templates": "locate.templates",
}

__all__ = [
    "FT",
    "MALMEN",
    "MEMIT",
    "ROME",
    "AlphaEdit",
    "Covariance",
    "DerivedEditor",
    "EditContext",
    "EditRequest",
    "Editor",
    "FittedEditor",
    "LoRA",
    "collect_covariance",
    "edit_sequentially",
    "make_editor",
    "null_space_projector",
    "parse_editor",
    "sample_context_templates",
]


def make_editor(name: str, settings: Mapping[str, Any]) -> Editor:
    """Make an editor of its settings; see `Registry.make`."""
    return EDITORS.make(name, settings)


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
