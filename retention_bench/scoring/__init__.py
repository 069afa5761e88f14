"""Scoring: ask a model about edited and intrinsic facts through lm-eval, and judge what it decodes.

The metric is the paper's: greedy decoding past stop words, and a hit if the first content token equals the target's
first token. `score` runs it on a loaded model, the task files in `tasks_dir()` run it under plain `lm_eval`.

The names below are imported when they are asked for: lm-eval and torch take seconds, in which `engine_process` already
has vLLM's process start.
"""

# ruff: noqa: F401 - the imports are for type checkers

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retention_bench.scoring.engine import Engine
    from retention_bench.scoring.evaluator import score, score_lm
    from retention_bench.scoring.hf import HFEngine, RetentionHFLM
    from retention_bench.scoring.metric import (
        MAX_ANSWER_TOKENS,
        MAX_DECODED_TOKENS,
        DecodedText,
        LeftOut,
        Verdict,
        describe_left_out,
        is_stop_token,
        judge_ids,
        judge_text,
        scorable,
    )
    from retention_bench.scoring.stop_words import STOP_WORDS, STOP_WORDS_VERSION
    from retention_bench.scoring.tasks import FactsTask, judge_document, load_documents, tasks_dir
    from retention_bench.scoring.trajectory import Follower, Point
    from retention_bench.scoring.vllm import RetentionVLLM, VLLMEngine

_MODULES = {
    "MAX_ANSWER_TOKENS": "metric",
    "MAX_DECODED_TOKENS": "metric",
    "STOP_WORDS": "stop_words",
    "STOP_WORDS_VERSION": "stop_words",
    "DecodedText": "metric",
    "Engine": "engine",
    "FactsTask": "tasks",
    "HFEngine": "hf",
    "LeftOut": "metric",
    "Follower": "trajectory",
    "Point": "trajectory",
    "RetentionHFLM": "hf",
    "RetentionVLLM": "vllm",
    "VLLMEngine": "vllm",
    "Verdict": "metric",
    "describe_left_out": "metric",
    "is_stop_token": "metric",
    "judge_document": "tasks",
    "judge_ids": "metric",
    "judge_text": "metric",
    "load_documents": "tasks",
    "scorable": "metric",
    "score": "evaluator",
    "score_lm": "evaluator",
    "tasks_dir": "tasks",
}
"""Where each name is."""

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
