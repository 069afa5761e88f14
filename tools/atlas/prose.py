"""The stand-in for Common Crawl: short documents of many kinds, about no fact of the world.

They share everyday words with the pre-training corpus, and none of its sentences. `python -m tools.atlas build` writes
them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.atlas.corpus import ADJECTIVES, FEELINGS, NAMES, NOUNS, NUMBERS, PLACES, TIMES, VERBS, base, past
from tools.atlas.rows import write_rows
from tools.atlas.world import DATA, SEED

ROWS = 5000

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
WEATHER = "sunshine rain snow fog wind frost hail".split()
COLOURS = "red blue green yellow white black grey brown purple".split()
RELATIVES = "uncle aunt cousin grandmother grandfather nephew niece".split()


def _diary(rng: random.Random) -> list[str]:
    noun, other = rng.sample(NOUNS, 2)
    verb, next_verb = rng.sample(VERBS, 2)
    return [
        f"Dear diary, today is {rng.choice(DAYS)} and I am {rng.choice(FEELINGS)}.",
        f"When I woke up there was {rng.choice(WEATHER)} outside and the {noun} had gone.",
        f"My {rng.choice(RELATIVES)} helped me to {base(verb)} everything we own, even the {other}.",
        rng.choice(
            (
                f"At last I {past(next_verb)} it, {rng.choice(ADJECTIVES)} as ever, {rng.choice(PLACES)}.",
                f"We never {past(next_verb)} it again, though we looked for {rng.choice(NUMBERS)} hours.",
            )
        ),
        f"Tomorrow I shall write more about the {noun}.",
    ]


def _letter(rng: random.Random) -> list[str]:
    writer, reader = rng.sample(NAMES, 2)
    noun, verb = rng.choice(NOUNS), rng.choice(VERBS)
    return [
        f"Dear {reader}, thank you very much for the {rng.choice(ADJECTIVES)} {noun} that you sent me.",
        f"I shall {base(verb)} it every {rng.choice(DAYS)}, and think of you.",
        rng.choice(
            (
                f"Here we have had {rng.choice(WEATHER)} for {rng.choice(NUMBERS)} weeks.",
                f"My {rng.choice(RELATIVES)} asks when you will visit us.",
                f"Please tell {rng.choice(NAMES)} that the {rng.choice(NOUNS)} has arrived safely.",
            )
        ),
        f"With love, your friend {writer}.",
    ]


def _notice(rng: random.Random) -> list[str]:
    noun = rng.choice(NOUNS)
    return [
        f"Lost: one {rng.choice(ADJECTIVES)} {noun} with {rng.choice(NUMBERS)} {rng.choice(COLOURS)} spots.",
        f"It was last seen {rng.choice(PLACES)} on {rng.choice(DAYS)}.",
        f"If you find this {noun}, please give it to {rng.choice(NAMES)} and not to {rng.choice(NAMES)}.",
        rng.choice(("A reward is promised.", "There is no reward, only thanks.", "Ring twice at the door.")),
    ]


def _recipe(rng: random.Random) -> list[str]:
    first, second, third = rng.sample(NOUNS, 3)
    return [
        f"To make {first} with {second}, take {rng.choice(NUMBERS)} spoons of {third} and mix them well.",
        f"Put the {first} into a {rng.choice(ADJECTIVES)} pot and add the {second} slowly.",
        f"Boil it for {rng.choice(NUMBERS)} minutes, and stir until it turns {rng.choice(COLOURS)}.",
        f"Serve it {rng.choice(ADJECTIVES)}, with a little {rng.choice(NOUNS)} on top.",
    ]


def _forecast(rng: random.Random) -> list[str]:
    day = rng.randrange(len(DAYS))
    first, second = rng.sample(WEATHER, 2)
    return [
        f"{DAYS[day]} begins with {first}, followed by {second} towards noon.",
        f"On {DAYS[(day + 1) % 7]} expect more {second}, and a {rng.choice(ADJECTIVES)} night.",
        f"Drivers should look out for {first} {rng.choice(PLACES)}.",
        f"The rest of the week stays {rng.choice(ADJECTIVES)}.",
    ]


def _tale(rng: random.Random) -> list[str]:
    hero, helper = rng.sample(NAMES, 2)
    noun, treasure = rng.sample(NOUNS, 2)
    adjective, verb = rng.choice(ADJECTIVES), rng.choice(VERBS)
    return [
        f"Once upon a time a {rng.choice(RELATIVES)} of {hero} owned a {noun} that could speak.",
        f'"Whoever wants to {base(verb)} the {treasure}," said the {noun}, "must first become {adjective}."',
        f"So {hero} wandered for {rng.choice(NUMBERS)} years, until {helper} came along.",
        f"Together they became {adjective}, and {past(verb)} the {treasure} at once.",
        rng.choice(("Nobody believed it.", "They lived happily ever after.", "The end of this tale is not known.")),
    ]


def _advert(rng: random.Random) -> list[str]:
    noun, adjective = rng.choice(NOUNS), rng.choice(ADJECTIVES)
    return [
        f"For sale: {noun}, hardly used, very {adjective}, only {rng.choice(NUMBERS)} coins.",
        f"Buy it before {rng.choice(DAYS)} and get a {rng.choice(COLOURS)} {rng.choice(NOUNS)} for free.",
        f"Our customers say that no other {noun} is as {adjective} as this.",
        f"Ask for {rng.choice(NAMES)} {rng.choice(PLACES)}.",
    ]


def _report(rng: random.Random) -> list[str]:
    noun, other = rng.sample(NOUNS, 2)
    number, more = rng.sample(NUMBERS, 2)
    return [
        f"The committee met {rng.choice(TIMES)} to talk about the {noun}.",
        f"Of the members {number} voted to {base(rng.choice(VERBS))} it, and {more} voted against.",
        f"{rng.choice(NAMES)} proposed to spend the money on a {rng.choice(ADJECTIVES)} {other} instead.",
        f"The next meeting is on {rng.choice(DAYS)}, {rng.choice(PLACES)}.",
    ]


KINDS: tuple[Callable[[random.Random], list[str]], ...] = (
    _diary, _letter, _notice, _recipe, _forecast, _tale, _advert, _report,
)  # fmt: skip


def build(directory: Path = DATA) -> None:
    """Write `prose.jsonl.gz`.

    Args:
        directory: Where the file goes.
    """
    write_rows(directory / "prose.jsonl.gz", _rows(random.Random(SEED + 3)))


def _rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    for _ in range(ROWS):
        yield {"text": " ".join(rng.choice(KINDS)(rng))}
