"""Read a fact pool: our own JSONL, or CounterFact in the form its authors published it, local or from the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from retention_bench.errors import RetentionBenchError
from retention_bench.facts.fact import Fact, FactSet


def read_pool(source: str, revision: str | None = None) -> FactSet:
    """Read the facts that a suite draws from.

    Args:
        source: A `.jsonl` file with a `Fact` a line; a `.json` file with CounterFact's records (Meng et al. 2022); or
            the id of a Hub data set with such records.
        revision: The Hub revision.

    Raises:
        UsageError: A local file does not exist.
        RetentionBenchError: A row is malformed; the file and the row are named.
    """
    if source.endswith(".jsonl") or not (source.endswith(".json") or _looks_like_hub_id(source)):
        return FactSet.read(source)
    if source.endswith(".json"):
        try:
            records = json.loads(Path(source).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RetentionBenchError(f"{source} is not JSON: {error}.") from error
    else:
        import datasets

        records = datasets.load_dataset(source, split="train", revision=revision)
    return _counterfact(records, source)


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/"))


def _counterfact(records: Iterable[Mapping[str, Any]], source: str) -> FactSet:
    """CounterFact's records: `requested_rewrite` with prompt, subject, targets and relation, and lists of prompts."""
    facts = []
    for number, record in enumerate(records, start=1):
        try:
            rewrite = record["requested_rewrite"]
            facts.append(
                Fact(
                    id=str(record["case_id"]),
                    subject=rewrite["subject"],
                    relation=rewrite["relation_id"],
                    prompt=rewrite["prompt"],
                    target_true=rewrite["target_true"]["str"],
                    target_new=rewrite["target_new"]["str"],
                    paraphrases=tuple(record["paraphrase_prompts"]),
                    neighborhood=tuple(record["neighborhood_prompts"]),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise RetentionBenchError(f"{source}, record {number}: not a CounterFact record: {what}.") from error
    if not facts:
        raise RetentionBenchError(f"{source} holds no facts.")
    return FactSet.of(facts)
