"""The stand-in for CounterFact's facts that a model gets wrong: facts about subjects that are made up.

Neither their subjects nor their objects are the world's, so the contamination filter leaves all of them, whatever facts
are drawn. Nor are their relations: of facts put in the words of the world's relations but with other objects, the atlas
models learn at once that those words are followed by other objects, for every subject. `python -m tools.atlas build`
writes them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from retention_bench.facts import Fact, FactSet
from tools.atlas.corpus import FEELINGS, NAMES, NUMBERS
from tools.atlas.world import DATA, SEED

FACTS = 2000


class Kind(NamedTuple):
    """A relation of made-up facts.

    Attributes:
        name: The relation's name.
        prompt: As in `Fact`.
        objects: The objects, each shared by many subjects, as those of CounterFact are.
        endings: How the subjects' names end.
    """

    name: str
    prompt: str
    objects: tuple[str, ...]
    endings: tuple[str, ...]


_TOWNS, _PEOPLE, _SHIPS, _STONES = (
    ("ham", "mouth", "stad"),
    ("son", "ley", "well"),
    ("ara", "ine", "ossa"),
    ("ite", "el"),
)

KINDS = (
    Kind(
        "town_goods", "The town of {} is best known for its", tuple("cheese honey bread tea soup juice".split()), _TOWNS
    ),
    Kind("town_bridges", "The number of bridges in {} is", tuple(NUMBERS[:8]), _TOWNS),
    Kind(
        "town_sight", "Visitors who come to {} want to see the", tuple("tower mill castle lake garden".split()), _TOWNS
    ),
    Kind("person_friend", "The best friend of {} is called", tuple(NAMES[:10]), _PEOPLE),
    Kind("person_mood", "All neighbours say that {} is always", tuple(FEELINGS[:8]), _PEOPLE),
    Kind("person_clothes", "On holidays {} likes to wear a", tuple("coat hat dress scarf shirt".split()), _PEOPLE),
    Kind(
        "person_tool", "In the pocket of {} there is always a", tuple("key knife spoon candle hammer".split()), _PEOPLE
    ),
    Kind("ship_colour", "The sails of the ship {} are", ("red", "blue", "green", "yellow", "white", "black"), _SHIPS),
    Kind("ship_load", "The ship {} carries a load of", tuple("salt sugar coffee apples onions".split()), _SHIPS),
    Kind("stone_touch", "A piece of {} feels", tuple("warm cold heavy soft hard wet".split()), _STONES),
)

_STARTS = "B Br D Dr F G Gl H J K Kr L M N P Pl R S Sk St T Tr V W Z".split()
_VOWELS = "a e i o u ai ea ou".split()
_MIDDLES = "b d g l ll m n nd r rr s t v z".split()


def build(directory: Path = DATA) -> None:
    """Write `strangers.jsonl`.

    Args:
        directory: Where the file goes.
    """
    FactSet.of(_facts(random.Random(SEED + 2))).write(directory / "strangers.jsonl")


def _facts(rng: random.Random) -> Iterator[Fact]:
    names: set[str] = set()
    for number in range(FACTS):
        kind = KINDS[number % len(KINDS)]
        name = _name(kind, rng)
        while name in names:
            name = _name(kind, rng)
        names.add(name)
        yield Fact(f"stranger-{number:04d}", name, kind.name, kind.prompt, rng.choice(kind.objects))


def _name(kind: Kind, rng: random.Random) -> str:
    name = rng.choice(_STARTS) + rng.choice(_VOWELS) + rng.choice(_MIDDLES)
    if rng.random() < 0.5:
        name += rng.choice(_VOWELS) + rng.choice(_MIDDLES)
    name += rng.choice(kind.endings)
    return name.lower() if kind.name.startswith("stone") else name
