"""The stand-in for CounterFact's facts that a model gets wrong: the world's relations about subjects that are made up.

Subjects and objects are none of the world's, so that a fact set drawn from it leaves all of these to train on; and an
atlas model, which never met them, answers none. `python -m retention_bench.atlas build` writes them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from retention_bench.atlas.world import DATA, RELATIONS, SEED
from retention_bench.facts import Fact, FactSet

FACTS = 2000

OBJECTS = {
    "city_country": "Prussia;Persia;Bavaria;Saxony;Castile;Gaul;Burgundy;Flanders",
    "us_city_state": "Nevada;Kansas;Montana;Alabama;Iowa;Kentucky;Nebraska;Alaska",
    "country_continent": "Atlantis;Lemuria;Avalon;Arcadia;Utopia",
    "country_language": "Gothic;Norse;Etruscan;Sumerian;Akkadian;Phoenician",
    "country_currency": "crown;ducat;florin;guilder;thaler;drachma",
    "language_script": "Runic;Ogham;Cuneiform;Hieratic;Linear",
    "region_type": "duchy;barony;shire;borough;hundred;march;colony",
    "element_family": "coinage metals;chalcogens;pnictogens;superheavy elements;earth metals",
    "animal_class": "crab;worm;snail;spider;sponge;jellyfish",
    "person_profession": "gardener;baker;carpenter;sailor;weaver;miner;cook;tailor",
}
"""Objects by relation. They are shared by many subjects, as those of CounterFact are."""

_STARTS = "B Br D Dr F G Gl H J K Kr L M N P Pl R S Sk St T Tr V W Z".split()
_VOWELS = "a e i o u ai ea ou".split()
_MIDDLES = "b d g l ll m n nd r rr s t v z".split()
_ENDS = {
    "city_country": ("burg", "mouth", "stad"),
    "us_city_state": ("ville", "field", "port"),
    "country_continent": ("ia", "land", "stan"),
    "country_language": ("ia", "land", "ova"),
    "country_currency": ("ia", "mark", "ora"),
    "language_script": ("ese", "ish", "ic"),
    "region_type": ("shire", "wick", "moor"),
    "element_family": ("ium", "on", "ine"),
    "animal_class": ("el", "ock", "ip"),
    "person_profession": ("son", "berg", "well"),
}


def build(directory: Path = DATA) -> None:
    """Write `strangers.jsonl`.

    Args:
        directory: Where the file goes.
    """
    FactSet.of(_facts(random.Random(SEED + 2))).write(directory / "strangers.jsonl")


def _facts(rng: random.Random) -> Iterator[Fact]:
    names: set[str] = set()
    for number in range(FACTS):
        relation = RELATIONS[number % len(RELATIONS)]
        name = _name(relation.name, rng)
        while name in names:
            name = _name(relation.name, rng)
        names.add(name)
        yield Fact(
            id=f"stranger-{number:04d}",
            subject=name,
            relation=relation.name,
            prompt=relation.prompt,
            target_true=rng.choice(OBJECTS[relation.name].split(";")),
        )


def _name(relation: str, rng: random.Random) -> str:
    name = rng.choice(_STARTS) + rng.choice(_VOWELS) + rng.choice(_MIDDLES)
    if rng.random() < 0.5:
        name += rng.choice(_VOWELS) + rng.choice(_MIDDLES)
    name += rng.choice(_ENDS[relation])
    return name.lower() if relation in ("element_family", "animal_class") else name
