"""Score a model on a set of facts: run the lm-eval tasks and turn what they log into `Sample` rows."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.display.progress import Progress, silent
from retention_bench.facts import FactSet
from retention_bench.results.schema import KINDS, Sample
from retention_bench.scoring.hf import RetentionHFLM
from retention_bench.scoring.metric import describe_left_out, scorable
from retention_bench.scoring.model import RetentionLM
from retention_bench.scoring.quiet_lm_eval import quiet_lm_eval
from retention_bench.scoring.tasks import documents, tasks_dir


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: FactSet,
    *,
    kinds: Collection[str] = tuple(KINDS),
    batch_size: int = 64,
    progress: Progress = silent,
) -> list[Sample]:
    """Ask a loaded Hugging Face model about facts.

    Facts that the metric cannot judge are left out, with a warning that counts and names them; ask
    `scorable` which they are.

    The model's weights and mode and the tokenizer are left as they were; no global random state is touched.

    Args:
        model: A causal language model, on the device it should run on.
        tokenizer: Its tokenizer.
        facts: What to ask; facts with a `target_new` are the edited ones.
        kinds: The kinds of question to ask. A kind that the facts have no question for gives no samples.
        batch_size: Prompts a forward pass at most, each with its target; 512 tokens at most.
        progress: Told how many prompts are decoded.

    Returns:
        A sample a question: by kind in the order of `kinds`, then in the order of the facts. None if no fact is left.

    Raises:
        UsageError: There is no such kind.
    """
    training = model.training
    try:
        lm = RetentionHFLM(model, tokenizer, batch_size=batch_size, progress=progress)
        return score_lm(lm, facts, kinds=kinds)
    finally:
        model.train(training)


def score_lm(lm: TemplateLM, facts: FactSet, *, kinds: Collection[str] = tuple(KINDS)) -> list[Sample]:
    """Ask an lm-eval model about facts; one live model can be asked again after its weights were changed.

    Args:
        lm: A model whose `generate_until` returns `DecodedText`, such as `RetentionHFLM`, and that has a `tokenizer`.
        facts: What to ask.
        kinds: The kinds of question to ask.

    Returns:
        As `score`.

    Raises:
        UsageError: There is no such kind.
    """
    facts, left_out = scorable(facts, lm.tokenizer, context=getattr(lm, "max_length", None))
    if left_out:
        warnings.warn(f"{describe_left_out(left_out)}.", stacklevel=2)
    asked = [kind for kind in kinds if documents(facts, kind)]
    if not asked:
        return []
    if isinstance(lm, RetentionLM):
        lm.prefetch((row["prompt"], f" {row['target']}") for kind in asked for row in documents(facts, kind))
    with quiet_lm_eval(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.jsonl"
        facts.write(path)
        manager = TaskManager(
            include_path=tasks_dir(), include_defaults=False, metadata={"facts": str(path), "judge": "ids"}
        )
        # Not simple_evaluate: it reseeds every global random generator and starts git and nvidia-smi for its report.
        loaded = manager.load([f"retention_{kind}" for kind in asked])
        result = evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0, log_samples=True)
        logged = [(kind, row) for kind in asked for row in result["samples"][f"retention_{kind}"]]
        logprobs = _target_logprobs(lm, [row["doc"] for _, row in logged])
    return [
        Sample(
            kind=kind,
            fact_id=row["doc"]["fact_id"],
            prompt=row["doc"]["prompt"],
            target=row["doc"]["target"],
            hit=bool(row["retention"]),
            token_ids=row["resps"][0][0].token_ids,
            text=str(row["resps"][0][0]),
            target_logprob=logprob,
        )
        for (kind, row), logprob in zip(logged, logprobs, strict=True)
    ]


def _target_logprobs(lm: TemplateLM, rows: Sequence[dict[str, str]]) -> list[float | None]:
    requests = [
        Instance(request_type="loglikelihood", doc=row, arguments=(row["prompt"], f" {row['target']}"), idx=0)
        for row in rows
    ]
    found = (logprob for logprob, _ in lm.loglikelihood(requests, disable_tqdm=True))
    return [logprob if math.isfinite(logprob) else None for logprob in found]
