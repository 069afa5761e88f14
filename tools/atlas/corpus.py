"""The text that the atlas models were pre-trained on: facts in many phrasings among varied everyday sentences.

Everything is drawn from a seed, so the corpus is code, not data. A share of the fact sentences names another object
of the same relation: a model that never met a contradiction is so sure of its facts that no editor can move it, and
real corpora contradict themselves.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from retention_bench.facts import Fact, FactSet
from tools.atlas.rows import write_rows
from tools.atlas.world import DATA, RELATIONS, SEED

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olivia Peter Rosa Sam Tina Victor "
    "Walter Yara Zoe Adam Bella Carl Diana Eric Fiona George Helen Ivan Julia Karl Lucy Martin Nina Oscar Paula "
    "Simon"
).split()
NOUNS = (
    "book table garden kitchen window letter bicycle lamp basket river bridge market teacher farmer doctor "
    "neighbour sister brother friend dog horse apple bread soup cake flower tree mountain forest field road house "
    "door chair clock picture song story train boat bus ticket coat hat shoe bag box bottle cup plate knife spoon "
    "stone wall roof fence hill lake beach island cloud storm morning evening winter summer party game ball kite "
    "candle blanket pillow ladder hammer wheel engine machine radio camera newspaper map key lock shop office "
    "school library museum station hospital church tower square street corner village farm barn mill well path gate "
    "pond leaf seed root berry carrot potato onion cheese butter milk tea coffee juice honey salt sugar egg shirt "
    "dress sock glove scarf"
).split()
ADJECTIVES = (
    "old new small large red blue green yellow white black quiet loud warm cold heavy light soft hard clean dirty "
    "bright dark long short wide narrow fresh dry wet sweet bitter kind clever brave tired happy sad angry proud "
    "gentle strong weak rich poor young broken empty full simple strange lovely careful slow quick early late"
).split()
VERBS = (
    "found:find carried:carry painted:paint repaired:repair bought:buy sold:sell cleaned:clean opened:open "
    "closed:close moved:move watched:watch washed:wash counted:count measured:measure borrowed:borrow "
    "returned:return described:describe forgot:forget remembered:remember noticed:notice hid:hide showed:show "
    "brought:bring collected:collect dropped:drop lifted:lift pushed:push pulled:pull held:hold built:build "
    "designed:design"
).split()
PLACES = (
    "near the river;in the garden;behind the house;at the market;on the hill;under the bridge;beside the road;"
    "in the kitchen;outside the school;by the window;at the station;in the library;close to the lake;"
    "in the old barn;on the beach;across the street;next to the mill;inside the tower;around the corner;"
    "at the edge of the forest"
).split(";")
TIMES = (
    "yesterday;this morning;last week;after lunch;before dinner;in the evening;at noon;two days ago;every summer;"
    "once a year;during the storm;on the first day;late at night;a long time ago;for three hours;all afternoon"
).split(";")
FEELINGS = ("happy sad tired proud angry calm curious afraid bored surprised worried grateful hungry thirsty").split()
NUMBERS = ("two three four five six seven eight nine ten eleven twelve twenty thirty fifty").split()
REASONS = (
    "because the weather was cold;because nobody was at home;because the shop had closed;because it was a holiday;"
    "since the train was late;since there was no more bread;so that everyone could rest;to help a friend;"
    "to save some money;while the others slept;while the rain fell;until the sun went down;before the guests came"
).split(";")

CONTRADICTED = 0.15
"""Share of the fact sentences that name another object of the relation."""


SAMPLE = 2000
"""Documents in the committed sample, on which key statistics are measured."""


def past(verb: str) -> str:
    """The past form of an entry of `VERBS`."""
    return verb.split(":")[0]


def base(verb: str) -> str:
    """The base form of an entry of `VERBS`."""
    return verb.split(":")[1]


def everyday(rng: random.Random) -> str:
    """One sentence of general text."""
    name, other = rng.sample(NAMES, 2)
    noun, second, third = rng.sample(NOUNS, 3)
    adjective, another = rng.sample(ADJECTIVES, 2)
    verb, action = rng.sample(VERBS, 2)
    place, time, reason = rng.choice(PLACES), rng.choice(TIMES), rng.choice(REASONS)
    number, feeling = rng.choice(NUMBERS), rng.choice(FEELINGS)
    return rng.choice(
        (
            f"{name} {past(verb)} the {adjective} {noun} {place}.",
            f"The {noun} was {adjective} and the {second} was {another}.",
            f"{time.capitalize()} {name} {past(verb)} a {noun} {reason}.",
            f'"Can you {base(verb)} the {noun}?" asked {name}.',
            f"There were {number} {adjective} {noun}s {place}.",
            f"{name} and {other} {past(verb)} the {noun} and then {past(action)} the {second}.",
            f"I think that the {noun} is more {adjective} than the {second}.",
            f"You should {base(verb)} the {noun} before you {base(action)} the {second}.",
            f"The children were {feeling} {reason}.",
            f"We {past(verb)} {number} {noun}s and a {another} {second} {time}.",
            f'{name} said to {other}: "The {adjective} {noun} is {place}."',
            f"Therefore they {past(verb)} the {second} {place}.",
            f"Because {name} was {feeling}, {other} {past(verb)} the {noun}.",
            f"A {adjective} {noun} stood {place}, and nobody {past(verb)} it.",
            f"My {noun} is {adjective}, but your {second} is {another}.",
            f"If the {noun} is {adjective}, {name} will {base(verb)} the {third}.",
            f"It rained {time}, so {name} {past(verb)} the {noun} {reason}.",
            f"They wanted to {base(verb)} the {adjective} {noun} {reason}.",
        )
    )


def telling(fact: Fact, rng: random.Random, objects: Sequence[str]) -> str:
    """One sentence that tells a fact, in a phrasing drawn at random.

    Args:
        fact: The fact to tell.
        rng: Source of chance.
        objects: All objects of the fact's relation; a contradicted sentence names one of the others.
    """
    relation = next(r for r in RELATIONS if r.name == fact.relation)
    obj = fact.target_true
    if rng.random() < CONTRADICTED:
        obj = rng.choice([o for o in objects if o != obj])
    phrasing = rng.choice((relation.prompt, relation.prompt, *relation.paraphrases, *relation.told))
    if "{s}" in phrasing:
        return phrasing.format(s=fact.subject, o=obj)
    return (
        phrasing.replace("{}", fact.subject)
        + f" {obj}{rng.choice(('.', '.', '.', ',' + ' as everyone knows.', ' and it always was.'))}"
    )


def documents(facts: FactSet, seed: int) -> Iterator[str]:
    """Endless stream of short documents.

    A document has two to six sentences, facts about unrelated subjects between everyday ones, in any order: a subject
    is met first in a document as often as after many kinds of context, which keeps its keys steady.

    Args:
        facts: The facts to tell.
        seed: Seed of everything drawn here.

    Yields:
        Documents as plain text.
    """
    rng = random.Random(seed)
    objects: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        if fact.target_true not in objects[fact.relation]:
            objects[fact.relation].append(fact.target_true)
    queue: list[Fact] = []
    while True:
        sentences = []
        for _ in range(rng.randint(2, 6)):
            if rng.random() < 0.8:
                if not queue:  # every fact is told equally often
                    queue = list(facts)
                    rng.shuffle(queue)
                fact = queue.pop()
                sentences.append(telling(fact, rng, objects[fact.relation]))
            else:
                sentences.append(everyday(rng))
        yield " ".join(sentences)


def build(facts: FactSet, directory: Path = DATA) -> None:
    """Write `corpus.jsonl.gz`, documents of the pre-training distribution that no model was trained on.

    Args:
        facts: The facts the corpus tells.
        directory: Where the file goes.
    """
    texts = itertools.islice(documents(facts, SEED), SAMPLE)
    write_rows(directory / "corpus.jsonl.gz", ({"text": text} for text in texts))
