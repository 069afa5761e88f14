"""Read a fact pool: our own JSONL, or CounterFact in any of the forms it is passed round in, local or from the Hub."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts.fact import Fact, FactSet
from retention_bench.facts.forms import FORMS, Draft, Form, find_form
from retention_bench.facts.relations import Asked, name_relations, templates

NO_SUBJECT = "the subject does not stand in the prompt"
NO_RELATION = "nothing tells the relation"


@dataclasses.dataclass(frozen=True)
class RowCounts:
    """How many rows of a source became facts.

    Attributes:
        source: The file or Hub data set.
        form: The form of its records, see `FORMS`.
        read: Rows read.
        dropped: Rows that are well formed and yet no facts, by reason.
        relations: Relations of the facts.
        recovered: Facts whose relation the source does not name.
    """

    source: str
    form: str
    read: int
    dropped: Mapping[str, int]
    relations: int
    recovered: int

    @property
    def kept(self) -> int:
        """Rows that became facts."""
        return self.read - sum(self.dropped.values())

    def to_json(self) -> dict[str, Any]:
        """The counts as plain JSON values, without the source, which may be a path of this machine."""
        values = dataclasses.asdict(self) | {"dropped": dict(self.dropped)}
        del values["source"]
        return values

    def __str__(self) -> str:
        text = f"{self.source} ({self.form} form): {self.read:,} rows read, {self.read - self.kept:,} dropped"
        if self.dropped:
            text += f" ({'; '.join(f'{count:,}: {reason}' for reason, count in self.dropped.items())})"
        if self.recovered:
            text += f", {self.relations} relations recovered from the prompts"
        return text


@dataclasses.dataclass(frozen=True)
class Pool:
    """The facts of a source, and the count of its rows."""

    facts: FactSet
    rows: RowCounts


def read_pool(source: str, revision: str | None = None, config: str | None = None) -> FactSet:
    """Read the facts that a suite draws from; `load_pool` without the counts."""
    return load_pool(source, revision, config).facts


def load_pool(source: str, revision: str | None = None, config: str | None = None) -> Pool:
    """Read the facts that a suite draws from, and count the rows.

    The form of the records is told from the first one's fields. Where they don't name the relation it is recovered from
    the prompts, see `name_relations`. A record without an id gets its place in the source, from 0, as CounterFact's
    `case_id` counts.

    Args:
        source: A `.jsonl` file with a record a line; a `.json` file with a list of records; or the id of a Hub data
            set, of which the split `train` is read. Records are a `Fact`'s or any of `FORMS`.
        revision: The Hub revision.
        config: The Hub data set's configuration.

    Raises:
        UsageError: A local file does not exist.
        RetentionBenchError: A record is malformed (the file and the record are named), the records have none of the
            forms, the Hub data set cannot be read, or no fact is left.
    """
    if source.endswith(".json"):
        place, records = "record", _json(source)
    elif source.endswith(".jsonl") or not _looks_like_hub_id(source):
        if _first_form(source) is None:
            # Our own form, or one with a mistake in it: `FactSet.read` knows best what to say.
            facts = FactSet.read(source)
            return Pool(facts, _count(source, "our own", len(facts), Counter(), facts, recovered=0))
        place, records = "line", _jsonl(source)
    else:
        place, records = "record", _hub(source, revision, config)
    return _assemble(source, place, records)


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/"))


def _first_form(source: str) -> Form | None:
    """The form of a JSONL file's first record where it is somebody else's, else None."""
    path = Path(source)
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        form = find_form(json.loads(first))
    except ValueError:
        return None
    return None if form is None or form.name == "our own" else form


def _json(source: str) -> Iterator[tuple[int, Any]]:
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"No facts file at {source}. Give the path of a .json file with a list of records.")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are no UTF-8
        raise RetentionBenchError(f"{source} is not JSON: {error}.") from error
    if not isinstance(records, list):
        raise RetentionBenchError(f"{source} must hold a list of records, and holds {type(records).__name__}.")
    return iter(enumerate(records, start=1))


def _jsonl(source: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(Path(source).read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:  # also of bytes that are no UTF-8
                raise RetentionBenchError(f"{source}, line {number}: not JSON: {error}.") from error


def _hub(source: str, revision: str | None, config: str | None) -> Iterator[tuple[int, Any]]:
    import datasets
    from huggingface_hub.utils import httpx

    try:
        records = datasets.load_dataset(source, config, split="train", revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, httpx.HTTPError) as error:
        at = f" at revision {revision}" if revision else ""
        raise RetentionBenchError(
            f"The Hub data set {source!r}{at} cannot be read: {error} Correct the `source`, `config` and `revision`, "
            "or give a local .json or .jsonl file."
        ) from error
    return iter(enumerate(records, start=1))


def _assemble(source: str, place: str, records: Iterable[tuple[int, Any]]) -> Pool:
    """Records into facts, those that are none counted."""
    form, drafts = _drafts(source, place, records)
    cuts = templates([(draft.prompt, draft.subject) for _, draft in drafts])
    unnamed = [
        Asked(cut[0], tuple(filter(None, (draft.target_true, draft.target_new))), draft.neighborhood)
        for (_, draft), cut in zip(drafts, cuts, strict=True)
        if cut and draft.relation is None
    ]
    names = name_relations(unnamed)
    dropped: Counter[str] = Counter()
    facts: list[Fact] = []
    used: dict[str, int] = {}
    recovered = 0
    for index, ((number, draft), cut) in enumerate(zip(drafts, cuts, strict=True)):
        relation = draft.relation or (names[cut[0]] if cut else None)
        if cut is None:
            dropped[NO_SUBJECT] += 1
        elif relation is None:
            dropped[NO_RELATION] += 1
        else:
            try:
                fact = Fact(
                    id=str(index) if draft.id is None else draft.id,
                    subject=cut[1],
                    relation=relation,
                    prompt=cut[0],
                    target_true=draft.target_true,
                    target_new=draft.target_new,
                    paraphrases=draft.paraphrases,
                    neighborhood=draft.neighborhood,
                )
                if fact.id in used:
                    raise ValueError(f"id {fact.id!r} was used before, in {place} {used[fact.id]}")
            except ValueError as error:
                raise _malformed(source, place, number, form, str(error)) from error
            used[fact.id] = number
            facts.append(fact)
            recovered += draft.relation is None
    rows = _count(source, form.name, len(drafts), dropped, facts, recovered=recovered)
    if not facts:
        raise RetentionBenchError(f"No fact is left: {rows}. Give a source whose rows are facts with a subject.")
    return Pool(FactSet.of(facts), rows)


def _drafts(source: str, place: str, records: Iterable[tuple[int, Any]]) -> tuple[Form, list[tuple[int, Draft]]]:
    """All records read in the first one's form."""
    form: Form | None = None
    drafts = []
    for number, record in records:
        form = form or find_form(record)
        if form is None:
            fields = (
                f"the fields {', '.join(sorted(map(str, record)))}" if isinstance(record, Mapping) else repr(record)
            )
            known = "; ".join(f"{form.name}: {', '.join(sorted(form.fields))}" for form in FORMS)
            raise RetentionBenchError(
                f"{source}, {place} {number}: no form of CounterFact has {fields}. The forms, and the fields that tell "
                f"them: {known}."
            )
        try:
            if not isinstance(record, Mapping):
                raise ValueError(f"it must be a JSON object, got {type(record).__name__}")
            drafts.append((number, form.read(record)))
        except (KeyError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise _malformed(source, place, number, form, what) from error
    if form is None:
        raise RetentionBenchError(f"{source} holds no facts.")
    return form, drafts


def _malformed(source: str, place: str, number: int, form: Form, what: str) -> RetentionBenchError:
    return RetentionBenchError(f"{source}, {place} {number}: not a record of {form.name} form: {what}.")


def _count(
    source: str, form: str, read: int, dropped: Mapping[str, int], facts: FactSet | Sequence[Fact], *, recovered: int
) -> RowCounts:
    relations = len({fact.relation for fact in facts})
    return RowCounts(source, form, read, dict(dropped), relations, recovered)
