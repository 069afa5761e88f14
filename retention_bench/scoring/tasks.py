"""What the lm-eval tasks in `tasks/` ask and how they judge; the YAML files there only point here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
from lm_eval.api.task import ConfigurableTask

from retention_bench.errors import RetentionBenchError, UsageError, unknown_name
from retention_bench.facts import FactSet, load_pool
from retention_bench.results.kinds import KINDS
from retention_bench.scoring.forms import plain_chat
from retention_bench.scoring.judge import OUTCOMES, Judge, objects_of
from retention_bench.scoring.metric import describe_left_out, scorable_as_text

# lm-eval cannot run a task without documents. An empty kind gets this one, which no metric is computed for. Facts never
# have an empty id.
_PLACEHOLDER = {
    "kind": "",
    "fact_id": "",
    "relation": "",
    "prompt": "Nothing to ask.",
    "target": "",
    "target_true": "",
    "target_new": "",
}


def tasks_dir() -> Path:
    """The folder with the lm-eval task files, for `TaskManager(include_path=...)`.

    It is `retention_bench/tasks` in an installed wheel and `tasks` beside the package in a checkout.

    Raises:
        RetentionBenchError: Neither is there: the installation is not complete.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "tasks", package.parent / "tasks"):
        if (folder / "retention.yaml").is_file():
            return folder
    raise RetentionBenchError(
        f"The lm-eval task files are in neither {package / 'tasks'} nor {package.parent / 'tasks'}. "
        "Install retention-bench again, or run it from a complete checkout."
    )


def documents(facts: FactSet, kind: str) -> list[dict[str, str]]:
    """The questions of one kind, as the documents of its lm-eval task.

    Args:
        facts: Edited facts have a `target_new`, intrinsic ones do not.
        kind: One of `KINDS`.

    Returns:
        Rows of kind, fact_id, relation, prompt, target, target_true and target_new (empty where there is none), in the
        order of the facts; none if there are no such questions.

    Raises:
        UsageError: There is no such kind.
    """
    if kind not in KINDS:
        raise unknown_name("kind of question", kind, KINDS)
    return [
        {
            "kind": kind,
            "fact_id": fact.id,
            "relation": fact.relation,
            "prompt": prompt,
            "target": target,
            "target_true": fact.target_true,
            "target_new": fact.target_new or "",
        }
        for fact, prompt, target in KINDS[kind].questions(facts)
    ]


def load_documents(
    kind: str, facts: str | None = None, judge: Literal["text", "ids"] = "text", **_: Any
) -> dict[str, datasets.Dataset]:
    """Load a task's documents: the `custom_dataset` of the lm-eval tasks.

    Args:
        kind: The kind of question, from the task's `dataset_kwargs`.
        facts: Path of the facts file, from `--metadata '{"facts": "FACTS.jsonl"}'`, in any form that `load_pool` reads.
        judge: What decides. Where it is `"text"`, as under plain `lm_eval`, facts that it could not tell are left out,
            with a warning; who judges ids has asked `scorable`.

    Returns:
        The documents under the split "test"; a kind without questions holds one that is not scored. Under "objects" the
        names of each relation's objects, of all facts in the file.

    Raises:
        UsageError: No facts file was given, or it does not exist.
        RetentionBenchError: The file is malformed.
    """
    if facts is None:
        raise UsageError(
            "The retention tasks ask what a facts file says, and none was given. "
            """Add --metadata '{"facts": "FACTS.jsonl"}' with the path of your facts file."""
        )
    pool = load_pool(facts)
    asked = pool.facts
    if judge == "text":
        if pool.rows.dropped:
            warnings.warn(f"{pool.rows}.", stacklevel=2)
        asked, left_out = scorable_as_text(asked)
        if left_out:
            warnings.warn(f"{describe_left_out(left_out)}.", stacklevel=2)
    rows = documents(asked, kind)
    objects = [{"relation": relation, "names": names} for relation, names in objects_of(pool.facts).items()]
    return {
        "test": datasets.Dataset.from_list(rows or [_PLACEHOLDER]),
        "objects": datasets.Dataset.from_list(objects),
    }


class FactsTask(ConfigurableTask):
    """A task that asks facts.

    Its requests are never taken from lm-eval's cache of requests: `--cache_requests` finds them by the task's name, so
    that it would ask the facts of another file. In a chat, where lm-eval is not told to apply the tokenizer's template,
    the question is put as `plain_chat`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Make the task that a file describes; `class` names this one and is no setting of it."""
        super().__init__(config={name: value for name, value in config.items() if name != "class"})
        self._judge = Judge({row["relation"]: row["names"] for row in self.dataset["objects"]})

    def build_all_requests(self, **settings: Any) -> None:
        """As lm-eval's, without the cache."""
        super().build_all_requests(**settings | {"cache_requests": False, "rewrite_requests_cache": False})

    def construct_requests(self, doc: dict[str, str], ctx: str, **settings: Any) -> Any:
        """As lm-eval's, with the plain form of a chat where no template is applied."""
        kind = KINDS.get(doc["kind"])
        if kind is not None and kind.form == "chat" and not settings.get("apply_chat_template"):
            ctx = plain_chat(ctx)
        return super().construct_requests(doc, ctx, **settings)

    def process_results(self, doc: Mapping[str, str], results: list[str]) -> dict[str, float]:
        """As `judge_document`, with the objects of the task's facts."""
        return judge_document(doc, results, self._judge)


def judge_document(document: Mapping[str, str], answers: list[str], judge: Judge | None = None) -> dict[str, float]:
    """Judge the answer to one document: the `process_results` of the lm-eval tasks.

    Returns:
        `retention`, `strict` and `whole`, each 1.0 or 0.0, and the same for every outcome; nothing for the placeholder
        of a kind without questions.
    """
    if not document["fact_id"]:
        return {}
    found = (judge or Judge({}))(document, answers[0])
    outcomes = {f"outcome_{outcome}": float(found.outcome == outcome) for outcome in OUTCOMES}
    return {
        "retention": float(found.hit),
        "strict": float(found.strict),
        "whole": float(found.whole),
        **outcomes,
    }
