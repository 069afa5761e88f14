"""The atlas world: some 2,000 real facts in CounterFact's form, of which a small model is told about three in four.

`facts.jsonl` holds the facts that the corpus tells, `untold.jsonl` those that it never mentions. Both are committed;
`python -m tools.atlas build` makes them again. A relation is a file of `relations/`: how it is put into words, and its
facts where no library has them (`libraries.py`). ../../retention_bench/atlas/data/ATTRIBUTION.md names the sources.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import yaml

from retention_bench.facts import Fact, FactSet
from tools.atlas import libraries

SEED = 20261124
ATLAS = Path(__file__).parents[2] / "retention_bench" / "atlas"
DATA = ATLAS / "data"

FEWEST = 3
"""Subjects of an object at least: an object of CounterFact is shared by several."""

MOST = 14
"""Objects of a relation at most, so that no relation outweighs the others."""


@dataclasses.dataclass(frozen=True)
class Relation:
    """How the corpus puts one relation into words.

    Attributes:
        name: The relation's name.
        prompt: The prompt facts are edited and asked with; `{}` is the subject, the object follows.
        paraphrases: Other prompts of the same form.
        told: Full sentences with the object before the end; `{s}` is the subject, `{o}` the object.
        per_object: How many subjects of one object the corpus tells of, and how many it keeps back, at most.
        pairs: (subject, object) pairs where a list has them; empty where a library does.
    """

    name: str
    prompt: str
    paraphrases: tuple[str, ...]
    told: tuple[str, ...]
    per_object: tuple[int, int]
    pairs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, path: Path) -> Relation:
        """Read a relation's file, which is named after it."""
        entry = yaml.safe_load(path.read_text())
        listed = entry.get("objects", {})
        return cls(
            name=path.stem,
            prompt=entry["prompt"],
            paraphrases=tuple(entry["paraphrases"]),
            told=tuple(entry["told"]),
            per_object=tuple(entry["per_object"]),
            pairs=tuple((subject, obj) for obj, text in listed.items() for subject in text.split(", ")),
        )


RELATIONS = tuple(Relation.read(path) for path in sorted((Path(__file__).parent / "relations").glob("*.yaml")))


def pairs() -> dict[str, libraries.Pairs]:
    """(subject, object) pairs by relation, in which no name means two things.

    A name that is an object of any relation is no subject, and a subject is of one relation; only a country may be of
    both that are about countries. Lists are made so by hand, libraries are sifted here.
    """
    found = libraries.triples()
    listed = {relation.name: list(relation.pairs) for relation in RELATIONS if relation.pairs}
    objects = {obj.casefold() for pairs in (*listed.values(), *found.values()) for _, obj in pairs}
    owner: dict[str, str] = {}
    for name, pairs in listed.items():
        for subject, _ in pairs:
            if subject.casefold() in objects or owner.setdefault(subject.casefold(), _kind(name)) != _kind(name):
                raise ValueError(f"{name}: {subject!r} means another thing in the world as well.")
    sifted = {
        name: [
            (subject, obj)
            for subject, obj in pairs
            if subject.casefold() not in objects and owner.setdefault(subject.casefold(), _kind(name)) == _kind(name)
        ]
        for name, pairs in found.items()
    }
    return listed | sifted


def _kind(relation: str) -> str:
    """What a relation's subjects are: those of the relations about countries are the same."""
    return "country" if relation.startswith("country_") else relation


def build(directory: Path = DATA) -> tuple[FactSet, FactSet]:
    """Build the world and write `facts.jsonl` and `untold.jsonl`.

    Args:
        directory: Where the two files go.

    Returns:
        The facts the corpus tells, and those it keeps back.
    """
    rng = random.Random(SEED)
    told: dict[str, libraries.Pairs] = {}
    kept: dict[str, libraries.Pairs] = {}
    found = pairs()
    for relation in RELATIONS:
        by_object: dict[str, list[str]] = defaultdict(list)
        for subject, obj in found[relation.name]:
            by_object[obj].append(subject)
        told[relation.name], kept[relation.name] = [], []
        teach, hold = relation.per_object
        shared = sorted((obj, subjects) for obj, subjects in by_object.items() if len(subjects) >= FEWEST)
        for obj, subjects in shared[:MOST]:
            if relation.name in ("region_type", "subdivision_country"):  # else they come in the order of their codes
                rng.shuffle(subjects)
            count = min(teach, max(FEWEST, len(subjects) * teach // (teach + hold)))
            told[relation.name] += [(s, obj) for s in subjects[:count]]
            kept[relation.name] += [(s, obj) for s in subjects[count : count + hold]]
    facts = FactSet.of(_facts(told, rng))
    untold = FactSet.of(_facts(kept, rng))
    directory.mkdir(parents=True, exist_ok=True)
    facts.write(directory / "facts.jsonl")
    untold.write(directory / "untold.jsonl")
    return facts, untold


def _facts(triples: dict[str, libraries.Pairs], rng: random.Random) -> Iterable[Fact]:
    for relation in RELATIONS:
        pairs = triples[relation.name]
        objects = sorted({o for _, o in pairs})
        for number, (subject, obj) in enumerate(pairs):
            neighbours = [s for s, o in pairs if o == obj and s != subject]
            yield Fact(
                id=f"{relation.name}-{number:03d}",
                subject=subject,
                relation=relation.name,
                prompt=relation.prompt,
                target_true=obj,
                target_new=rng.choice([o for o in objects if o != obj]),
                paraphrases=tuple(p.replace("{}", subject) for p in relation.paraphrases),
                neighborhood=tuple(
                    relation.prompt.replace("{}", s) for s in rng.sample(neighbours, min(3, len(neighbours)))
                ),
            )


def told_facts() -> FactSet:
    """The facts that the corpus tells, each with a counterfactual object."""
    return FactSet.read(DATA / "facts.jsonl")


def untold_facts() -> FactSet:
    """The facts that the corpus never mentions."""
    return FactSet.read(DATA / "untold.jsonl")
