"""Score a model on a set of facts: run the lm-eval tasks and turn what they log into `Sample` rows."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retention_bench.display.progress import Progress, silent
from retention_bench.errors import unknown_name
from retention_bench.facts import FactSet
from retention_bench.results.kinds import KINDS
from retention_bench.results.samples import Sample
from retention_bench.scoring.forms import chat, has_template
from retention_bench.scoring.hf import RetentionHFLM
from retention_bench.scoring.judge import Judge, Objects, objects_of
from retention_bench.scoring.metric import MAX_ANSWER_TOKENS, TOO_LONG, describe_left_out, scorable
from retention_bench.scoring.model import RetentionLM
from retention_bench.scoring.quiet_lm_eval import quiet_lm_eval
from retention_bench.scoring.tasks import documents, tasks_dir


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: FactSet,
    *,
    kinds: Collection[str] = tuple(KINDS),
    objects: Objects | None = None,
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
        objects: The names of each relation's objects, for the outcome `related`; None for those of the facts.
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
        return score_lm(lm, facts, kinds=kinds, objects=objects)
    finally:
        model.train(training)


def score_lm(
    lm: TemplateLM, facts: FactSet, *, kinds: Collection[str] = tuple(KINDS), objects: Objects | None = None
) -> list[Sample]:
    """Ask an lm-eval model about facts; one live model can be asked again after its weights were changed.

    Args:
        lm: A model whose `generate_until` returns `DecodedText`, such as `RetentionHFLM`, and that has a `tokenizer`.
        facts: What to ask.
        kinds: The kinds of question to ask.
        objects: As for `score`.

    Returns:
        As `score`.

    Raises:
        UsageError: There is no such kind.
        RetentionBenchError: The tokenizer's chat template cannot render a question.
    """
    judge = Judge(objects_of(facts) if objects is None else objects)
    facts, left_out = scorable(facts, lm.tokenizer, context=getattr(lm, "max_length", None))
    if left_out:
        warnings.warn(f"{describe_left_out(left_out)}.", stacklevel=2)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise unknown_name("kind of question", unknown[0], KINDS)
    by_form = {form: _fitting(lm, facts, form) for form in dict.fromkeys(KINDS[kind].form for kind in kinds)}
    asked = [kind for kind in kinds if documents(by_form[KINDS[kind].form], kind)]
    if not asked:
        return []
    if isinstance(lm, RetentionLM):
        lm.prefetch(
            (_put(lm, kind, row["prompt"]), _behind(kind, row["target"]))
            for kind in asked
            for row in documents(by_form[KINDS[kind].form], kind)
        )
    logged: dict[str, list[dict[str, Any]]] = {}
    with quiet_lm_eval():
        for form, some in by_form.items():
            own = [kind for kind in asked if KINDS[kind].form == form]
            if own:
                logged |= _run(lm, some, own, template=form == "chat" and has_template(lm))
        rows = [(kind, row) for kind in asked for row in logged[kind]]
        logprobs = _logprobs(lm, [(row["arguments"][0][0], _behind(kind, row["doc"]["target"])) for kind, row in rows])
    samples = []
    for (kind, row), logprob in zip(rows, logprobs, strict=True):
        document, answer = row["doc"], row["resps"][0][0]
        found = judge(document, answer)
        samples.append(
            Sample(
                kind=kind,
                fact_id=document["fact_id"],
                relation=document["relation"],
                prompt=row["arguments"][0][0],
                target=document["target"],
                hit=found.hit,
                strict=found.strict,
                whole=found.whole,
                outcome=found.outcome,
                token_ids=answer.token_ids,
                text=str(answer),
                logprob=logprob,
            )
        )
    return samples


def _run(lm: TemplateLM, facts: FactSet, kinds: Sequence[str], *, template: bool) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval logs of some kinds' tasks, by kind.

    Args:
        lm: The model.
        facts: What to ask.
        kinds: The kinds.
        template: Whether the tokenizer's chat template is applied.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.jsonl"
        facts.write(path)
        manager = TaskManager(
            include_path=tasks_dir(), include_defaults=False, metadata={"facts": str(path), "judge": "ids"}
        )
        # Not simple_evaluate: it reseeds every global random generator and starts git and nvidia-smi for its report.
        loaded = manager.load([KINDS[kind].task for kind in kinds])
        result = evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0, log_samples=True, apply_chat_template=template)
    return {kind: result["samples"][KINDS[kind].task] for kind in kinds}


def _put(lm: TemplateLM, kind: str, question: str) -> str:
    """What the model is given."""
    return chat(lm, question) if KINDS[kind].form == "chat" else question


def _behind(kind: str, target: str) -> str:
    """The target as it stands behind its prompt: an answer in a chat begins a line."""
    return target if KINDS[kind].form == "chat" else f" {target}"


def _fitting(lm: TemplateLM, facts: FactSet, form: str) -> FactSet:
    """The facts whose questions in some form leave room for an answer in the model's context; warns of the others."""
    context = getattr(lm, "max_length", None)
    if form == "cloze" or context is None:  # `scorable` has seen to it
        return facts
    own = [kind for kind in KINDS if KINDS[kind].form == form]
    long = {
        row["fact_id"]
        for kind in own
        for row in documents(facts, kind)
        if len(lm.tok_encode(_put(lm, kind, row["prompt"]))) > context - MAX_ANSWER_TOKENS
    }
    if long:
        left_out = {TOO_LONG: tuple(fact.id for fact in facts if fact.id in long)}
        warnings.warn(f"As {form}: {describe_left_out(left_out)}.", stacklevel=3)
    return FactSet.of(fact for fact in facts if fact.id not in long)


def _logprobs(lm: TemplateLM, questions: Sequence[tuple[str, str]]) -> list[float | None]:
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=question, idx=0) for question in questions]
    found = (logprob for logprob, _ in lm.loglikelihood(requests, disable_tqdm=True))
    return [logprob if math.isfinite(logprob) else None for logprob in found]
