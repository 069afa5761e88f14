"""Read a fact pool: our own JSONL, or editing benchmarks' records in the forms they are passed round in."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retention_bench.data import check_characters, parse_json, read_text, shortened
from retention_bench.errors import RetentionBenchError
from retention_bench.facts.fact import Fact, FactSet
from retention_bench.facts.counterfact_formats import FORMS, NO_TRUE, OWN, Draft, Form, find_form
from retention_bench.facts.relations import Asked, known_templates, name_relations, templates

MALFORMED = "not a record of this form"
NO_SUBJECT = "the subject does not stand in the prompt"
NO_RELATION = "nothing tells the relation"
USED_ID = "its id was used before"
REPEATED = "it repeats an earlier one"


@dataclasses.dataclass(frozen=True)
class RowCounts:
    """How many rows of a source became facts. Where a record holds several facts, as MQuAKE's do, each is a row.

    Attributes:
        source: The file or Hub data set.
        form: The form of its records, see `FORMS`.
        read: Rows read.
        dropped: Rows that are no facts, by reason.
        relations: Relations of the facts.
        recovered: Facts whose relation the source does not name.
        first: By reason the first such row, and what is wrong with it.
    """

    source: str
    form: str
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
        text = f"{self.source} ({self.form} form): {self.read:,} rows read, {self.read - self.kept:,} dropped"
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
    source: Path | str, revision: str | None = None, config: str | None = None, *, need_relation: bool = False
) -> Pool:
    """Read the facts of a source, and count the rows.

    The form is told from the fields of the first record that can be read in one. A malformed record in somebody else's
    form is dropped and counted; our own form is ours, and a mistake in it an error. Where records don't name the
    relation it is recovered from the prompts, see `name_relations`. A record without an id gets its place in the
    source, from 0, as CounterFact's `case_id` counts.

    Args:
        source: A file with a JSON record a line, or a JSON list of records, in UTF-8, also as `.gz`; or the id of a Hub
            data set, of which the split `train` is read. Records are a `Fact`'s or any of `FORMS`.
        revision: The Hub revision.
        config: The Hub data set's configuration.
        need_relation: Drop facts whose relation nothing tells, as a split by relation must; else the prompt, with `{}`
            for the subject, names it.

    Raises:
        UsageError: A local file does not exist.
        RetentionBenchError: A record of our own form is malformed (the file and the record are named), the records have
            none of the forms, the file is not UTF-8 or not JSON, the Hub data set cannot be read, or no fact is left.
    """
    name = str(source)
    local = isinstance(source, Path) or not _looks_like_hub_id(name)
    place, rows = _local(source) if local else ("record", _hub(name, revision, config))
    return _Reader(name, place, list(rows), need_relation).pool()


def _looks_like_hub_id(source: str) -> bool:
    plain = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    return plain and not source.endswith((".json", ".jsonl", ".gz")) and not Path(source).exists()


Row = tuple[int, Any]
"""A record with its number from 1; a `RetentionBenchError` in its place says why there is none."""


def _local(source: Path | str) -> tuple[str, Iterator[Row]]:
    """What a row of a file is called, and the rows."""
    text = read_text(source, "facts file")
    if text.lstrip()[:1] == "[":
        records = parse_json(text, f"{source}", halves=True, once=True)
        return "record", ((number, _whole(record)) for number, record in enumerate(records, start=1))
    lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    return "line", ((number, _parsed(line)) for number, line in lines)


def _parsed(line: str) -> Any:
    try:
        return parse_json(line, "it", once=True)
    except RetentionBenchError as error:
        return error


def _whole(record: Any) -> Any:
    try:
        check_characters(record, "it")
    except RetentionBenchError as error:
        return error
    return record


def _what(error: RetentionBenchError) -> str:
    """What is wrong, to stand behind a place."""
    return str(error).removeprefix("it: ").removesuffix(".")


def _reads(form: Form, record: Any) -> bool:
    try:
        return bool(form.read(record))
    except RetentionBenchError:
        return False


def _hub(source: str, revision: str | None, config: str | None) -> Iterator[Row]:
    import datasets
    from huggingface_hub.utils import httpx

    try:
        records = datasets.load_dataset(source, config, split="train", revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, httpx.HTTPError) as error:
        at = f" at revision {revision}" if revision else ""
        raise RetentionBenchError(
            f"The Hub data set {source!r}{at} cannot be read: {' '.join(str(error).split())} Correct the `source`, "
            "`config` and `revision`, or give a local .json or .jsonl file."
        ) from error
    return iter(enumerate(records, start=1))


def _names(drafts: Sequence[tuple[Draft, str]]) -> Mapping[str, str | None]:
    """The relation of each template, where some of the drafts do not name theirs; else nothing.

    A relation that is named in one row and recovered in another must not stand under two names, as it could then be on
    both sides of the split: so what the rows name is known of their templates.
    """
    if all(draft.relation for draft, _ in drafts):
        return {}
    known = {template: set(ids) for template, ids in known_templates().items()}
    for draft, template in drafts:
        if draft.relation:
            known.setdefault(template, set()).add(draft.relation)
    asked = [
        Asked(template, tuple(filter(None, (draft.target_true, draft.target_new))), draft.neighborhood)
        for draft, template in drafts
    ]
    return name_relations(asked, {template: sorted(ids) for template, ids in known.items()})


class _Reader:
    """Makes facts of a source's rows, and counts those that are none."""

    def __init__(self, source: str, place: str, rows: list[Row], need_relation: bool) -> None:
        self.source, self.place, self.rows, self.need_relation = source, place, rows, need_relation
        self.dropped: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def pool(self) -> Pool:
        form = self._form()
        if form is OWN:
            return self._own()
        drafts = self._drafts(form)
        read = len(drafts) + self.dropped.total()
        facts, recovered = self._facts(form, drafts)
        rows = self._count(form, read, facts, recovered)
        if not facts:
            raise RetentionBenchError(f"No fact is left: {rows}. Give a source whose rows are facts with a subject.")
        return Pool(FactSet.of(facts), rows)

    def _form(self) -> Form:
        """The form of the first record that can be read in one; failing that, of the first that has one's fields."""
        broken: Form | None = None
        for _, record in self.rows:
            # Our own with a mistake in it: reading it knows best what to say.
            ours = isinstance(record, Mapping) and "target_true" in record
            form = find_form(record) or (OWN if ours else None)
            if form is OWN or (form is not None and _reads(form, record)):
                return form
            broken = broken or form
        if broken is not None:
            return broken
        if not self.rows:
            raise RetentionBenchError(f"{self.source} holds no facts. A facts file has a JSON object a line.")
        number, record = self.rows[0]
        if isinstance(record, RetentionBenchError):
            raise self._error(number, f"{_what(record)}. A facts file has a JSON object a line")
        fields = shortened(record)
        if isinstance(record, Mapping):
            named = ", ".join(key if key.isprintable() else repr(key) for key in sorted(record))
            fields = f"the fields {named or 'none'}"
            fields = fields if len(fields) <= 300 else f"{fields[:300]}..."
        known = "; ".join(f"{form.name}: {', '.join(form.fields)}" for form in FORMS)
        raise self._error(number, f"no form of facts has {fields}. The forms, and the fields that tell them: {known}")

    def _error(self, number: int, what: str) -> RetentionBenchError:
        return RetentionBenchError(f"{self.source}, {self.place} {number}: {what}.")

    def _own(self) -> Pool:
        def rows() -> Iterator[tuple[str, Any]]:
            for number, record in self.rows:
                if isinstance(record, RetentionBenchError):
                    raise self._error(number, f"not a fact: {_what(record)}")
                yield f"{self.source}, {self.place} {number}", record

        facts = FactSet.from_rows(rows(), self.source)
        return Pool(facts, self._count(OWN, len(facts), facts, 0))

    def _drafts(self, form: Form) -> list[tuple[int, str, Draft]]:
        """The facts of all records in one form, with the record's number and an id."""
        drafts = []
        for index, (number, record) in enumerate(self.rows):
            try:
                if isinstance(record, RetentionBenchError):
                    raise record
                found = form.read(record)
            except RetentionBenchError as error:
                self._drop(number, MALFORMED, _what(error))
                continue
            for part, draft in enumerate(found):
                own = f"{index}-{part}" if form.several else str(index)
                drafts.append((number, draft.id or own, draft))
        return drafts

    def _drop(self, number: int, reason: str, what: str = "") -> None:
        self.dropped[reason] += 1
        self.first.setdefault(reason, f"{self.place} {number}{f': {what[:200]}' if what else ''}")

    def _facts(self, form: Form, drafts: list[tuple[int, str, Draft]]) -> tuple[list[Fact], int]:
        """Drafts that are facts, and how many of them have a recovered relation."""
        cuts = templates([(draft.prompt, draft.subject) for _, _, draft in drafts])
        names = _names([(draft, cut[0]) for (_, _, draft), cut in zip(drafts, cuts, strict=True) if cut])
        facts: list[Fact] = []
        used: set[str] = set()
        told: set[tuple[object, ...]] = set()
        recovered = 0
        for (number, name, draft), cut in zip(drafts, cuts, strict=True):
            relation = (names.get(cut[0]) if cut else None) or draft.relation
            if cut is None:
                self._drop(number, NO_SUBJECT)
            elif draft.target_true is None:
                self._drop(number, NO_TRUE)
            elif relation is None and self.need_relation:
                self._drop(number, NO_RELATION)
            elif name in used:
                self._drop(number, USED_ID, shortened(name))
            elif form.several and (cut, draft.target_true, draft.target_new) in told:
                self._drop(number, REPEATED)  # MQuAKE's questions of several steps share rewrites
            else:
                try:
                    fact = Fact(
                        id=name,
                        subject=cut[1],
                        relation=relation or cut[0],
                        prompt=cut[0],
                        target_true=draft.target_true,
                        target_new=draft.target_new,
                        paraphrases=draft.paraphrases,
                        neighborhood=draft.neighborhood,
                    )
                except ValueError as error:
                    self._drop(number, MALFORMED, str(error))
                    continue
                used.add(name)
                told.add((cut, draft.target_true, draft.target_new))
                facts.append(fact)
                recovered += draft.relation is None
        return facts, recovered

    def _count(self, form: Form, read: int, facts: Iterable[Fact], recovered: int) -> RowCounts:
        relations = len({fact.relation for fact in facts})
        return RowCounts(self.source, form.name, read, dict(self.dropped), relations, recovered, dict(self.first))
