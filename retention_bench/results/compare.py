"""What was scored, read back: run folders of `evaluate` and the `scores.jsonl` of `score`, in whole or in part."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from retention_bench.analysis import about_fact, compare, mean, rank, rank_intervals
from retention_bench.data import checked, locate, read_json, read_jsonl
from retention_bench.errors import RetentionBenchError, UsageError, unknown_name
from retention_bench.facts import FactSet
from retention_bench.results.gates import counted, strictest
from retention_bench.results.kinds import KINDS, STAGES
from retention_bench.results.measures import Answers, Pair, paired_difference, pairs
from retention_bench.results.samples import Sample
from retention_bench.results.schema import Gate, check_version
from retention_bench.results.score_file import read_scores

_SETTING = "fine-tune's "
"""What the names of a fine-tune's settings begin with."""


@dataclass(frozen=True)
class Side:
    """Samples that are compared, or looked through, together.

    Attributes:
        name: How it is called: `RUN`, `RUN:STAGE` or `FILE:CHECKPOINT`.
        rows: The samples, with `stage` and `experiment` where they are of a run.
        facts: The run's facts; None for a checkpoint of a `scores.jsonl`, which has samples alone.
        pairs: The facts of the run's headline; None for what is no run as a whole.
        gates: The gates of the run that count at its stage.
        made: How it was made, as far as sides that are ranked together should not differ in it.
    """

    name: str
    rows: tuple[dict[str, Any], ...]
    facts: FactSet | None = None
    pairs: tuple[Pair, ...] | None = None
    gates: tuple[Gate, ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A checkpoint that could not be scored.

    Attributes:
        name: `FILE:CHECKPOINT`.
        task: The task it failed at; None for all.
        error: What `score` says about it.
    """

    name: str
    task: str | None
    error: str


def compared(names: Sequence[str], *, stage: str = "post_finetune", kinds: Collection[str] = KINDS) -> dict[str, Any]:
    """Compare runs or scored checkpoints, every two of them, fact by fact.

    Args:
        names: Run folders (`RUN`, or `RUN:STAGE`) and files that `score` wrote (`FILE`, for all checkpoints in it, or
            `FILE:CHECKPOINT`).
        stage: The stage of runs that are given without one.
        kinds: The kinds of question to compare.

    Returns:
        `{sides, failed, unequal, gated, headlines, comparisons, ranks}` as JSON values: the names of what is compared;
        the checkpoints left out because they could not be scored; by what runs differ in besides their editor (model,
        fine-tune, horizon, settings), the value of each; of every side that fails a gate of its stage, why no rank
        counts it; of every whole run its paired difference, and its rank by that where there are several; a comparison
        for every pair and kind (`analysis.Comparison`); and by kind the rank of every side that fails no gate, where
        there are more than two sides. Gates are held to the strictest limit among the sides.

    Raises:
        UsageError: There is nothing of that name, fewer than two sides, one of them twice, or two that share no
            question.
        RetentionBenchError: A file is malformed.
    """
    sides, failed = _read_all(names, stage)
    if len(sides) < 2:
        raise UsageError(
            f"There must be at least two to compare, and {' '.join(names)} is {len(sides) or 'none'}. Give two runs, "
            "two stages of a run (RUN:post_edit RUN:post_finetune), or two scored checkpoints (FILE:CHECKPOINT)."
        )
    rows = {side.name: side.rows for side in sides}
    kinds = list(dict.fromkeys(kinds))
    gated = {name: why for name, why in strictest({side.name: side.gates for side in sides}).items() if why}
    return {
        "sides": list(rows),
        "failed": [vars(f) for f in failed],
        "unequal": _unequal(sides),
        "gated": gated,
        "headlines": _headlines(sides, gated),
        "comparisons": [c.to_json() for c in compare(rows, kinds)],
        "ranks": {
            kind: {name: r.to_json() for name, r in ranks.items()}
            for kind, ranks in (rank(rows, kinds, gated) if len(rows) > 2 else {}).items()
        },
    }


def _unequal(sides: Sequence[Side]) -> dict[str, dict[str, Any]]:
    """What runs differ in besides their editor, with the value of each."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for side in sides for name in side.made):
        values = {side.name: side.made[name] for side in sides if name in side.made}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            found[name] = values
    if found.keys() & {"model", "finetune"}:  # these have settings of their own
        return {name: values for name, values in found.items() if not name.startswith(_SETTING)}
    return found


def _headlines(sides: Sequence[Side], gated: Collection[str]) -> dict[str, dict[str, Any]]:
    """The paired difference of every whole run, and its rank by that."""
    found = {side.name: paired_difference(side.pairs) for side in sides if side.pairs is not None}
    entries = {name: answers for name, answers in found.items() if answers and name not in gated}
    ranks = rank_intervals(entries, lowest_first=True) if len(entries) > 1 else {}
    return {
        name: {"difference": mean(answers).to_json(), "rank": ranks[name].to_json() if name in ranks else None}
        for name, answers in found.items()
    }


def inspected(fact: str, names: Sequence[str]) -> dict[str, Any]:
    """Everything that is known about one fact.

    Args:
        fact: Its id.
        names: As for `compared`; all stages of a run that is given without one.

    Returns:
        `{fact_id, failed, sides}` as JSON values; for each side `{name, fact, questions}`, the fact as in
        `facts.jsonl` or null, and its questions with all answers (`analysis.about_fact`).

    Raises:
        UsageError: There is nothing of that name, or no such fact in it.
        RetentionBenchError: A file is malformed.
    """
    sides, failed = _read_all(names, None)
    known = {row["fact_id"] for side in sides for row in side.rows}
    if fact not in known:
        raise unknown_name(f"fact in {' '.join(names)}:", fact, known)
    return {
        "fact_id": fact,
        "failed": [vars(f) for f in failed],
        "sides": [
            {
                "name": side.name,
                "fact": next((f.to_json() for f in side.facts or () if f.id == fact), None),
                "questions": about_fact(fact, side.rows, tuple(KINDS)),
            }
            for side in sides
        ],
    }


def read(name: str, stage: str | None) -> tuple[list[Side], list[Failed]]:
    """Read one run or one file of scores.

    Args:
        name: `RUN`, `RUN:STAGE`, `FILE` or `FILE:CHECKPOINT`.
        stage: The stage of a run that is given without one; None for all stages.

    Returns:
        The sides it stands for, and the checkpoints that could not be scored.

    Raises:
        UsageError: There is nothing of that name.
        RetentionBenchError: A file is malformed.
    """
    path, part = _split(name)
    if path.is_dir():
        return [_run(name, path, part or stage)], []
    return _scores(path, part)


def _read_all(names: Sequence[str], stage: str | None) -> tuple[list[Side], list[Failed]]:
    sides: list[Side] = []
    failed: list[Failed] = []
    for name in names:
        more, without = read(name, stage)
        sides, failed = sides + more, failed + without
    twice = [side.name for i, side in enumerate(sides) if side.name in {s.name for s in sides[:i]}]
    if twice:
        raise UsageError(f"{twice[0]} is given twice. Give each once; stages of one run differ as RUN:STAGE.")
    return sides, failed


def _split(name: str) -> tuple[Path, str | None]:
    """The path in a name, and what stands behind its colon; both may have colons of their own."""
    if (whole := locate(name)) is not None:
        return whole, None
    for place in (i for i, letter in reversed(list(enumerate(name))) if letter == ":"):
        if name[:place] and (part := locate(name[:place])) is not None:
            return part, name[place + 1 :]
    raise UsageError(
        f"There is no {name}. Give a folder that `evaluate` wrote (RUN or RUN:STAGE) or a file that `score` wrote "
        "(FILE or FILE:CHECKPOINT)."
    )


def _run(name: str, folder: Path, stage: str | None) -> Side:
    if stage is not None and stage not in STAGES:
        raise unknown_name(f"stage in {name}:", stage, STAGES)
    results, samples, facts = (folder / file for file in ("results.json", "samples.jsonl", "facts.jsonl"))
    if not results.is_file() or not samples.is_file():
        raise UsageError(
            f"{folder} holds no finished run: results.json and samples.jsonl must be there. Give the folder that "
            "`evaluate` wrote."
        )
    check_version(results)
    cell = read_json(results, _Cell)
    rows, known = [], []
    for number, row in read_jsonl(samples):
        sample = checked(Sample, row, f"{samples}, line {number}")
        if sample.stage is None:
            raise RetentionBenchError(f"{samples}, line {number}: a sample of a run has a stage. Run `evaluate` again.")
        known.append(sample)
        if stage in (None, row["stage"]):
            rows.append(row)
    if not rows:
        raise RetentionBenchError(f"{samples} holds no samples of {stage or 'any stage'}. Run `evaluate` again.")
    whole = stage in (None, "post_finetune")
    return Side(
        name,
        tuple(rows),
        FactSet.read(facts) if facts.is_file() else None,
        tuple(pairs(Answers(known))) if whole else None,
        tuple(counted(cell.gates, stage)),
        cell.made(stage),
    )


class _Settings(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    finetune_settings: dict[str, Any]


class _Cell(pydantic.BaseModel):
    """What a comparison needs of `results.json`."""

    model_config = pydantic.ConfigDict(strict=True)
    model: str
    finetune: str
    horizon: str
    freeze: str
    adapter: str
    gates: list[Gate]
    provenance: _Settings

    def made(self, stage: str | None) -> dict[str, Any]:
        """How the models of a stage were made: all but the edit."""
        if stage in ("base", "post_edit"):
            return {"model": self.model}
        own = {name: getattr(self, name) for name in ("model", "finetune", "horizon", "freeze", "adapter")}
        return own | {f"{_SETTING}{name}": value for name, value in self.provenance.finetune_settings.items()}


def _scores(path: Path, checkpoint: str | None) -> tuple[list[Side], list[Failed]]:
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}  # samples by checkpoint and task
    keys: dict[str, Any] = {}
    errors: dict[tuple[str, str | None], str] = {}
    for _, line in read_scores(path):
        if "error" in line:
            errors[line["checkpoint"], line.get("task")] = line["error"]
            continue
        if "metrics" in line:
            continue  # a task of lm-eval's own, which asks no facts
        name, key = line["checkpoint"], line["key"]
        if keys.setdefault(name, key) != key:
            found[name], keys[name] = {}, key  # it was scored anew, with other content
        found.setdefault(name, {})[line["task"]] = line["samples"]
    names = dict.fromkeys([*found, *(name for name, _ in errors)])
    if checkpoint is not None and checkpoint not in names:
        raise unknown_name(f"checkpoint in {path}:", checkpoint, names)
    if not names:
        raise RetentionBenchError(f"{path} holds no scores. Give a file that `score` wrote.")
    chosen = list(names) if checkpoint is None else [checkpoint]
    sides = [
        Side(f"{path}:{name}", tuple(row for samples in found[name].values() for row in samples))
        for name in chosen
        if name in found
    ]
    # A task that failed first and was scored later has both lines.
    failed = [
        Failed(f"{path}:{name}", task, error)
        for (name, task), error in errors.items()
        if name in chosen and (task not in found.get(name, {}) if task else name not in found)
    ]
    return sides, failed
