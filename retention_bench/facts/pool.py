"""Read a fact pool: our own JSONL, or editing benchmarks' records in the formats they are passed round in."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retention_bench.data import Row, RowError, Source, shortened
from retention_bench.display import cut
from retention_bench.errors import RetentionBenchError, unknown_name
from retention_bench.facts.counterfact_formats import FORMATS, NO_TRUE, OWN, RawFact, RecordFormat, find_format
from retention_bench.facts.fact import Fact, FactSet
from retention_bench.facts.relations import Asked, known_templates, name_relations, templates

MALFORMED = "not a record of this format"
NO_SUBJECT = "the subject does not stand in the prompt"
NO_RELATION = "nothing tells the relation"
USED_ID = "its id was used before"
REPEATED = "it repeats an earlier one"


@dataclasses.dataclass(frozen=True)
class RowCounts:
    """How many rows of a source became facts. Where a record holds several facts, as MQuAKE's do, each is a row.

    Attributes:
        source: The file or Hub data set.
        format: The format of its records, see `FORMATS`.
        read: Rows read.
        dropped: Rows that are no facts, by reason.
        relations: Relations of the facts.
        recovered: Facts whose relation the source does not name.
        first: By reason the first such row, and what is wrong with it.
    """

    source: str
    format: str
    read: int
    dropped: Mapping[str, int]
    relations: int
    recovered: int
    first: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Rows that became facts."""
        return self.read - sum(self.dropped.values())

    def to_json(self) -> dict[str, Any]:
        """The counts as plain JSON values, without the source, which may be a path of this machine."""
        values = dataclasses.asdict(self) | {"dropped": dict(self.dropped)}
        del values["source"], values["first"]
        return values

    def __str__(self) -> str:
        text = f"{self.source} ({self.format} format): {self.read:,} rows read, {self.read - self.kept:,} dropped"
        if self.dropped:
            text += f" ({'; '.join(self._dropped(reason) for reason in self.dropped)})"
        if self.recovered:
            text += f", {self.relations} relations recovered from the prompts"
        return text

    def _dropped(self, reason: str) -> str:
        where = f" (the first: {self.first[reason]})" if reason in self.first else ""
        return f"{self.dropped[reason]:,}: {reason}{where}"


@dataclasses.dataclass(frozen=True)
class Pool:
    """The facts of a source, and the count of its rows."""

    facts: FactSet
    rows: RowCounts


def read_pool(source: str, revision: str | None = None, config: str | None = None) -> FactSet:
    """Read the facts of a source; `load_pool` without the counts."""
    return load_pool(source, revision, config).facts


def load_pool(
    source: Path | str,
    revision: str | None = None,
    config: str | None = None,
    *,
    need_relation: bool = False,
    keywords: Iterable[str] = (),
) -> Pool:
    """Read the facts of a source, and count the rows.

    The format is told from the fields of the first record that can be read in one. A malformed record in another
    benchmark's format is dropped and counted; in our own format it is an error. Where records don't name the relation
    it is recovered from the prompts, see `name_relations`. A record without an id gets its place in the source, from 0,
    as CounterFact's `case_id` counts.

    Args:
        source: A data file (see `Source`), or the id of a Hub data set, of which the split `train` is read. Records are
            a `Fact`'s or any of `FORMATS`.
        revision: The Hub revision, which a Hub data set must have.
        config: The Hub data set's configuration.
        need_relation: Drop facts whose relation nothing tells, as a split by relation must; else the prompt, with `{}`
            for the subject, names it.
        keywords: The relations that a suite gives keywords for; each must be the relation of a fact.

    Raises:
        UsageError: A local file does not exist or is of no known kind, a Hub data set has no revision, or no fact has a
            relation of `keywords`.
        RetentionBenchError: A record of our own format is malformed (the file and the row are named), the records have
            none of the formats, the file is not UTF-8 or not JSON, the Hub data set cannot be read, or no fact is left.
    """
    given = Source(str(source), revision, config, what="facts file")
    pool = _Reader(given, list(given.rows(faults=True, unique_keys=True)), need_relation).pool()
    relations = {part for fact in pool.facts for part in (fact.relation, *fact.relation.split("+"))}
    for relation in keywords:
        if relation not in relations:
            raise unknown_name("relation in facts.keywords:", relation, relations)
    return pool


def _reads(given: RecordFormat, record: Mapping[str, Any]) -> bool:
    try:
        return bool(given.read(record))
    except ValueError:
        return False


def _names(raw: Sequence[tuple[RawFact, str]]) -> Mapping[str, str | None]:
    """The relation of each template, where some of the facts do not name theirs; else nothing.

    A relation that is named in one row and recovered in another must not stand under two names, as it could then be on
    both sides of the split: so what the rows name is known of their templates.
    """
    if all(given.relation for given, _ in raw):
        return {}
    known = {template: set(ids) for template, ids in known_templates().items()}
    for given, template in raw:
        if given.relation:
            known.setdefault(template, set()).add(given.relation)
    asked = [
        Asked(template, tuple(filter(None, (given.target_true, given.target_new))), given.neighborhood)
        for given, template in raw
    ]
    return name_relations(asked, {template: sorted(ids) for template, ids in known.items()})


class _Reader:
    """Makes facts of a source's rows, and counts those that are none."""

    def __init__(self, source: Source, rows: list[Row], need_relation: bool) -> None:
        self.source, self.rows, self.need_relation = source, rows, need_relation
        self.dropped: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def pool(self) -> Pool:
        found = self._format()
        if found is OWN:
            return self._own()
        raw = self._raw_facts(found)
        read = len(raw) + self.dropped.total()
        facts, recovered = self._facts(found, raw)
        rows = self._count(found, read, facts, recovered)
        if not facts:
            raise RetentionBenchError(f"No fact is left: {rows}. Give a source whose rows are facts with a subject.")
        return Pool(FactSet.of(facts), rows)

    def _format(self) -> RecordFormat:
        """The format of the first record that can be read in one; failing that, of the first that has one's fields."""
        broken: RecordFormat | None = None
        for _, record in self.rows:
            if isinstance(record, RowError):
                continue
            # Our own with a mistake in it: reading it knows best what to say.
            found = find_format(record) or (OWN if "target_true" in record else None)
            if found is OWN or (found is not None and _reads(found, record)):
                return found
            broken = broken or found
        if broken is not None:
            return broken
        place, record = self.rows[0]
        if isinstance(record, RowError):
            what = f"{record.what}. Facts in JSON are an object a line, or a list of objects"
            raise RowError(self.source, place, what) from record
        named = ", ".join(key if key.isprintable() else repr(key) for key in sorted(record))
        fields = cut(f"the fields {named or 'none'}")
        known = "; ".join(f"{one.name}: {', '.join(one.fields)}" for one in FORMATS)
        what = f"no format of facts has {fields}. The formats, and the fields that tell them: {known}"
        raise RowError(self.source, place, what)

    def _own(self) -> Pool:
        def rows() -> Iterator[tuple[str, Any]]:
            for place, record in self.rows:
                if isinstance(record, RowError):
                    raise RowError(self.source, place, f"not a fact: {record.what}") from record
                yield f"{self.source}, {place}", record

        facts = FactSet.from_rows(rows(), str(self.source))
        return Pool(facts, self._count(OWN, len(facts), facts, 0))

    def _raw_facts(self, found: RecordFormat) -> list[tuple[str, str, RawFact]]:
        """The facts of all records in one format, with the record's place and an id."""
        raw = []
        for index, (place, record) in enumerate(self.rows):
            if isinstance(record, RowError):
                self._drop(place, MALFORMED, record.what)
                continue
            try:
                facts = found.read(record)
            except ValueError as error:
                self._drop(place, MALFORMED, str(error))
                continue
            for part, fact in enumerate(facts):
                own = f"{index}-{part}" if found.several else str(index)
                raw.append((place, fact.id or own, fact))
        return raw

    def _drop(self, place: str, reason: str, what: str = "") -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, f"{place}{f': {what[:200]}' if what else ''}")

    def _facts(self, found: RecordFormat, raw: list[tuple[str, str, RawFact]]) -> tuple[list[Fact], int]:
        """Raw facts that are facts, and how many of them have a recovered relation."""
        cuts = templates([(given.prompt, given.subject) for _, _, given in raw])
        names = _names([(given, parts[0]) for (_, _, given), parts in zip(raw, cuts, strict=True) if parts])
        facts: list[Fact] = []
        used: set[str] = set()
        told: set[tuple[object, ...]] = set()
        recovered = 0
        for (place, name, given), parts in zip(raw, cuts, strict=True):
            relation = (names.get(parts[0]) if parts else None) or given.relation
            if parts is None:
                self._drop(place, NO_SUBJECT)
            elif given.target_true is None:
                self._drop(place, NO_TRUE)
            elif relation is None and self.need_relation:
                self._drop(place, NO_RELATION)
            elif name in used:
                self._drop(place, USED_ID, shortened(name))
            elif found.several and (parts, given.target_true, given.target_new) in told:
                self._drop(place, REPEATED)  # MQuAKE's questions of several steps share rewrites
            else:
                try:
                    fact = Fact(
                        id=name,
                        subject=parts[1],
                        relation=relation or parts[0],
                        prompt=parts[0],
                        target_true=given.target_true,
                        target_new=given.target_new,
                        paraphrases=given.paraphrases,
                        neighborhood=given.neighborhood,
                    )
                except ValueError as error:
                    self._drop(place, MALFORMED, str(error))
                    continue
                used.add(name)
                told.add((parts, given.target_true, given.target_new))
                facts.append(fact)
                recovered += given.relation is None
        return facts, recovered

    def _count(self, found: RecordFormat, read: int, facts: Iterable[Fact], recovered: int) -> RowCounts:
        relations = len({fact.relation for fact in facts})
        return RowCounts(str(self.source), found.name, read, dict(self.dropped), relations, recovered, dict(self.first))
