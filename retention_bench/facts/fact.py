"""`Fact`, one (subject, relation, object) triple, and `FactSet`, an ordered set of them kept as JSONL."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retention_bench.data import read_jsonl, shortened
from retention_bench.errors import RetentionBenchError, unknown_name

MAX_TEXT = 100_000
"""Characters that a text of a fact has at most; none is near it but by mistake."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """One (subject, relation, object) triple in CounterFact's format.

    Attributes:
        id: Unique within a `FactSet`.
        subject: The subject s, as it stands in the prompt.
        relation: A name for the relation r; the disjoint split works on it.
        prompt: The prompt p = (s, r); contains `{}` once, where the subject goes, and ends right before the object.
        target_true: The original object o^c, without leading space.
        target_new: The counterfactual object o*, without leading space; None for a fact that is not to be edited.
        paraphrases: Other prompts for the same triple, subject filled in.
        neighborhood: Prompts about other subjects whose object is also `target_true`.
        matched: Whether a fact that is not to be edited has a relation that edited facts have too.
    """

    id: str
    subject: str
    relation: str
    prompt: str
    target_true: str
    target_new: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()
    matched: bool = False

    def __post_init__(self) -> None:
        for name in ("id", "subject", "relation", "prompt", "target_true"):
            _check_text(name, getattr(self, name))
        if self.prompt.count("{}") != 1:
            raise ValueError(f"prompt must contain '{{}}' exactly once, got {shortened(self.prompt)}")
        if self.target_new is not None:
            _check_text("target_new", self.target_new, or_null=True)
        if not isinstance(self.matched, bool):
            raise ValueError(f"matched must be true or false, got {shortened(self.matched)}")
        if self.matched and self.target_new is not None:
            raise ValueError("matched is for facts that are not edited, and this one has a target_new")
        for name in ("paraphrases", "neighborhood"):
            texts = getattr(self, name)
            # Where a fact has none, datasets and pandas write null.
            texts = () if texts is None else texts
            if not isinstance(texts, list | tuple):
                raise ValueError(f"{name} must be a list of texts, got {shortened(texts)}")
            for text in texts:
                _check_text(f"{name} must be a list of texts; each", text)
            object.__setattr__(self, name, tuple(texts))
        # The one space between prompt and object belongs to the object's first token, so it is never stored.
        for name in ("target_true", "target_new"):
            value = getattr(self, name)
            object.__setattr__(self, name, value.strip() if value else value)
        object.__setattr__(self, "prompt", self.prompt.rstrip())

    @property
    def question(self) -> str:
        """The prompt with the subject filled in; a model answers it with " " + object."""
        return self.prompt.replace("{}", self.subject)

    @property
    def target(self) -> str:
        """The object a model should answer with: `target_new` where the fact is edited, else `target_true`."""
        return self.target_true if self.target_new is None else self.target_new

    def to_json(self) -> dict[str, Any]:
        """The fact as a dict of plain JSON values."""
        row = dataclasses.asdict(self) | {
            "paraphrases": list(self.paraphrases),
            "neighborhood": list(self.neighborhood),
        }
        if not self.matched:
            del row["matched"]
        return row

    @classmethod
    def from_json(cls, row: Any) -> Fact:
        """Read a fact from a parsed JSON row.

        Raises:
            ValueError: The row is not an object, lacks a field, has one too many, or a field has no proper value.
        """
        if not isinstance(row, dict):
            raise ValueError(f"a fact must be a JSON object, got {type(row).__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in row:
            if name not in fields:
                raise ValueError(str(unknown_name("field", name[:80], fields)).removesuffix("."))
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in row]
        if missing:
            raise ValueError(f"missing field {missing[0]!r}; a fact needs {', '.join(fields)}")
        return cls(**row)


def _check_text(name: str, value: Any, *, or_null: bool = False) -> None:
    """Refuse what is no text, blank, half a character, or longer than any prompt."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be {'null or ' * or_null}a text that is not empty, got {shortened(value)}")
    if len(value) > MAX_TEXT:
        raise ValueError(f"{name} must have {MAX_TEXT:,} characters at most, got {len(value):,}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character (a lone surrogate), got {shortened(value)}") from error


@dataclasses.dataclass(frozen=True)
class FactSet:
    """An ordered set of facts with unique ids.

    A fact with a `target_new` is an edited one, a fact without is intrinsic, so one file holds all roles.
    """

    facts: tuple[Fact, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", tuple(self.facts))
        seen: set[str] = set()
        for fact in self.facts:
            if fact.id in seen:
                raise ValueError(f"fact id {fact.id!r} occurs twice")
            seen.add(fact.id)

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)

    @property
    def edited(self) -> FactSet:
        """The facts with a counterfactual object."""
        return FactSet(tuple(f for f in self.facts if f.target_new is not None))

    @property
    def intrinsic(self) -> FactSet:
        """The facts without a counterfactual object, but for the matched ones."""
        return FactSet(tuple(f for f in self.facts if f.target_new is None and not f.matched))

    @property
    def intrinsic_matched(self) -> FactSet:
        """The facts without a counterfactual object whose relations edited facts have too."""
        return FactSet(tuple(f for f in self.facts if f.target_new is None and f.matched))

    @property
    def sha256(self) -> str:
        """Hash of the facts' canonical JSONL, the same whatever file they came from."""
        return hashlib.sha256(self._jsonl().encode()).hexdigest()

    def _jsonl(self) -> str:
        return "".join(json.dumps(f.to_json(), ensure_ascii=False, sort_keys=True) + "\n" for f in self.facts)

    def write(self, path: Path) -> None:
        """Write the facts as JSONL: to a temporary name first, then renamed, so no reader sees half a file."""
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        partial.write_text(self._jsonl(), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path | str) -> FactSet:
        """Read facts from JSONL in UTF-8, a fact a line; blank lines are passed over.

        Raises:
            UsageError: The file does not exist.
            RetentionBenchError: A row is malformed (file and line are named) or there are no facts.
        """
        rows = read_jsonl(path, "facts file")
        return cls.from_rows(((f"{path}, line {number}", row) for number, row in rows), f"{path}")

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[str, Any]], source: str) -> FactSet:
        """Read facts from parsed JSON rows.

        Args:
            rows: Each with the place where it stands, for the error.
            source: Where they come from, for the error.

        Raises:
            RetentionBenchError: As `read`.
        """
        facts: list[Fact] = []
        seen: dict[str, str] = {}
        for place, row in rows:
            try:
                fact = Fact.from_json(row)
                if fact.id in seen:
                    raise ValueError(f"id {shortened(fact.id)} was used before, in {seen[fact.id]}")
            except ValueError as error:
                raise RetentionBenchError(f"{place}: not a fact: {error}.") from error
            seen[fact.id] = place
            facts.append(fact)
        if not facts:
            raise RetentionBenchError(f"{source} holds no facts. A facts file has a JSON object a line.")
        return cls(tuple(facts))

    @classmethod
    def of(cls, facts: Iterable[Fact]) -> FactSet:
        """Collect facts into a set."""
        return cls(tuple(facts))
