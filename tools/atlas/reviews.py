"""The stand-in for IMDB: made-up film reviews, each for (1) or against (0) its film.

A review praises some sides of its film and blames others, and is for the film if it praises more. A good word can blame
("far from clever", "Nobody could call the music fresh") and a bad one praise, so no single word gives it away.
`python -m tools.atlas build` writes them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.atlas.corpus import NAMES, NOUNS, NUMBERS, PLACES, TIMES
from tools.atlas.rows import write_rows
from tools.atlas.world import DATA, SEED

ROWS = 4000

GOOD = "lovely clever bright fresh warm gentle strong rich brave".split()
BAD = "weak empty slow cold dirty broken poor bitter tired".split()
SIDES = (
    "acting;story;music;ending;camera work;dialogue;opening;lighting;cast;costumes;pace;humour;sound;main part"
).split(";")


def build(directory: Path = DATA) -> None:
    """Write `reviews.jsonl.gz`.

    Args:
        directory: Where the file goes.
    """
    write_rows(directory / "reviews.jsonl.gz", _rows(random.Random(SEED + 4)))


def _rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    for number in range(ROWS):
        label = number % 2
        yield {"text": _review(label, rng), "label": label}


def _review(label: int, rng: random.Random) -> str:
    """Three to six judgements, at least two more of them on the label's side, between sentences that judge nothing."""
    count = rng.randint(3, 6)
    against = rng.randint(0, (count - 1) // 3)
    verdicts = [bool(label)] * (count - against) + [not label] * against
    rng.shuffle(verdicts)
    sides = rng.sample(SIDES, count)
    sentences = [_judgement(side, praise, rng) for side, praise in zip(sides, verdicts, strict=True)]
    return " ".join([_opening(rng), *sentences])


def _opening(rng: random.Random) -> str:
    name, noun = rng.choice(NAMES), rng.choice(NOUNS)
    return rng.choice(
        (
            f"I saw this film about a {noun} {rng.choice(TIMES)}.",
            f"{name} took me to see it {rng.choice(PLACES)}.",
            f"The film tells of {name}, who loses a {noun}.",
            f"It has {rng.choice(NUMBERS)} scenes with a {noun}, and I counted them.",
        )
    )


def _judgement(side: str, praise: bool, rng: random.Random) -> str:
    """A sentence that praises or blames, in one of five cases with a word of the other kind."""
    own, other = (GOOD, BAD) if praise else (BAD, GOOD)
    word, turned = rng.choice(own), rng.choice(other)
    if rng.random() < 0.2:
        return rng.choice(
            (
                f"The {side} was far from {turned}.",
                f"I was told the {side} would be {turned}, but it was not at all.",
                f"Nobody could call the {side} {turned}.",
            )
        )
    return rng.choice(
        (
            f"The {side} was {word}.",
            f"I found the {side} really {word}.",
            f"How {word} the {side} was!",
            f"The {side} is {word} from the first minute to the last.",
        )
    )
