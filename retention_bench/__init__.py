"""retention-bench: which edits of a language model's knowledge survive fine-tuning.

    import retention_bench as rb
    results = rb.evaluate(editor="alphaedit", finetune="tulu3")
    print(results.retention.edited)

Everything here is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from retention_bench.version import __version__

if TYPE_CHECKING:
    from retention_bench.api import compare, evaluate, evaluate_seeds, list_editors, list_finetunes, list_suites, score
    from retention_bench.errors import RetentionBenchError, UsageError
    from retention_bench.facts import Fact, FactSet
    from retention_bench.pipeline.suite import Suite, load_suite
    from retention_bench.results import Rate, Results, Sample

_PLACES = {
    "Fact": "facts",
    "FactSet": "facts",
    "Rate": "results",
    "Results": "results",
    "RetentionBenchError": "errors",
    "Sample": "results",
    "Suite": "pipeline.suite",
    "UsageError": "errors",
    "compare": "api",
    "evaluate": "api",
    "evaluate_seeds": "api",
    "list_editors": "api",
    "list_finetunes": "api",
    "list_suites": "api",
    "load_suite": "pipeline.suite",
    "score": "api",
}

__all__ = [
    "Fact",
    "FactSet",
    "Rate",
    "Results",
    "RetentionBenchError",
    "Sample",
    "Suite",
    "UsageError",
    "__version__",
    "compare",
    "evaluate",
    "evaluate_seeds",
    "list_editors",
    "list_finetunes",
    "list_suites",
    "load_suite",
    "score",
]


if not TYPE_CHECKING:  # or a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
