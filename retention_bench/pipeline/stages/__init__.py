"""The stages of a cell, one file each: what its key is made of, and how it is computed."""

from retention_bench.pipeline.stage import Stage
from retention_bench.pipeline.stages.covariance import Covariance, CovarianceFile
from retention_bench.pipeline.stages.edit import Edit
from retention_bench.pipeline.stages.facts import Facts
from retention_bench.pipeline.stages.finetune import Finetune
from retention_bench.pipeline.stages.fit import Fit
from retention_bench.pipeline.stages.knowledge import Knowledge
from retention_bench.pipeline.stages.paraphrases import Paraphrases
from retention_bench.pipeline.stages.results import Experiment, Gather
from retention_bench.pipeline.stages.score import Score
from retention_bench.pipeline.stages.step_matched import step_matched
from retention_bench.pipeline.stages.unknown import Unknown

STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        Knowledge,
        Facts,
        Paraphrases,
        Covariance,
        CovarianceFile,
        Fit,
        Unknown,
        Edit,
        Finetune,
        Score,
        Gather,
    )
}
"""All stages by name."""

__all__ = [
    "STAGES",
    "Covariance",
    "CovarianceFile",
    "Edit",
    "Experiment",
    "Facts",
    "Finetune",
    "Fit",
    "Gather",
    "Knowledge",
    "Paraphrases",
    "Score",
    "Unknown",
    "step_matched",
]
