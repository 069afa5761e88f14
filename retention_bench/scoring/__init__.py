"""Scoring: ask a model about edited and intrinsic facts through lm-eval, and judge what it decodes.

The metric is the paper's: greedy decoding past stop words, and a hit if the first content token equals the target's
first token. `score` runs it on a loaded model, the task files in `tasks_dir()` run it under plain `lm_eval`.
"""

from retention_bench.scoring.engine import Engine
from retention_bench.scoring.hf import HFEngine, RetentionHFLM
from retention_bench.scoring.metric import (
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
from retention_bench.scoring.probe import Probe, Prober
from retention_bench.scoring.quiet_lm_eval import quiet_lm_eval
from retention_bench.scoring.score import Sample, score, score_lm
from retention_bench.scoring.stop_words import STOP_WORDS
from retention_bench.scoring.tasks import KINDS, FactsTask, Kind, judge_document, load_documents, tasks_dir
from retention_bench.scoring.vllm import RetentionVLLM, VLLMEngine

__all__ = [
    "KINDS",
    "MAX_DECODED_TOKENS",
    "STOP_WORDS",
    "DecodedText",
    "Engine",
    "FactsTask",
    "HFEngine",
    "Kind",
    "LeftOut",
    "Probe",
    "Prober",
    "RetentionHFLM",
    "RetentionVLLM",
    "Sample",
    "VLLMEngine",
    "Verdict",
    "describe_left_out",
    "is_stop_token",
    "judge_document",
    "judge_ids",
    "judge_text",
    "load_documents",
    "quiet_lm_eval",
    "scorable",
    "score",
    "score_lm",
    "tasks_dir",
]
