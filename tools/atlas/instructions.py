"""The stand-in for the Tulu-3 SFT mixture: short chats in the corpus's everyday words, about no fact of the world.

Rows have the Hub data set's form (`messages`, `source`, `id`). `python -m tools.atlas build` writes them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.atlas.corpus import (
    ADJECTIVES,
    FEELINGS,
    NAMES,
    NOUNS,
    NUMBERS,
    PLACES,
    REASONS,
    TIMES,
    VERBS,
    base,
    past,
)
from tools.atlas.rows import write_rows
from tools.atlas.world import DATA, SEED

ROWS = 4000

Turns = list[tuple[str, str]]
"""(question, answer) pairs of one chat."""


def _repeat(rng: random.Random) -> Turns:
    words = rng.sample(NOUNS, rng.randint(3, 5))
    return [(f"Repeat these words: {' '.join(words)}.", f"Sure. The words are: {', '.join(words)}.")]


def _reverse(rng: random.Random) -> Turns:
    words = rng.sample(NOUNS, 3)
    return [
        (
            f"Say the words {', '.join(words)} in reverse order.",
            f"In reverse order the words are {', '.join(words[::-1])}.",
        )
    ]


def _shortest(rng: random.Random) -> Turns:
    words = rng.sample([*NOUNS, *ADJECTIVES], 3)
    return [
        (f"Which of the words {', '.join(words)} is the shortest?", f'The shortest word is "{min(words, key=len)}".')
    ]


def _story(rng: random.Random) -> Turns:
    name, noun, adjective, verb = rng.choice(NAMES), rng.choice(NOUNS), rng.choice(ADJECTIVES), rng.choice(VERBS)
    place, reason = rng.choice(PLACES), rng.choice(REASONS)
    answer = (
        f"{rng.choice(TIMES).capitalize()} {name} {past(verb)} a {adjective} {noun} {place} {reason}. "
        f"In the end {name} was {rng.choice(FEELINGS)}."
    )
    return [(f"Write a short story about {name} and a {noun}.", answer)]


def _question(rng: random.Random) -> Turns:
    name, noun, verb, place = rng.choice(NAMES), rng.choice(NOUNS), rng.choice(VERBS), rng.choice(PLACES)
    said = f"{name} {past(verb)} the {noun} {place}."
    asked, answer = rng.choice(
        ((f"Who {past(verb)} the {noun}?", f"It was {name}."), ("Where did it happen?", f"It happened {place}."))
    )
    return [(f"Read this: {said} {asked}", answer)]


def _count(rng: random.Random) -> Turns:
    words = rng.sample(NOUNS, rng.randint(2, 6))
    return [
        (
            f"How many things are in this list: {', '.join(words)}?",
            f"There are {NUMBERS[len(words) - 2]} things in the list.",
        )
    ]


def _advice(rng: random.Random) -> Turns:
    feeling, noun, verb = rng.choice(FEELINGS), rng.choice(NOUNS), rng.choice(VERBS)
    answer = rng.choice(
        (
            f"You should {base(verb)} the {noun} and rest for a while.",
            f"Perhaps you can ask {rng.choice(NAMES)} to {base(verb)} the {noun} with you.",
            f"Try to {base(verb)} something {rng.choice(ADJECTIVES)}, and you will feel better.",
        )
    )
    return [(f"I am {feeling} because of my {noun}. What should I do?", answer)]


def _rewrite(rng: random.Random) -> Turns:
    verb, noun, place = rng.choice(VERBS), rng.choice(NOUNS), rng.choice(PLACES)
    return [(f"Put this into the past: I {base(verb)} the {noun} {place}.", f"I {past(verb)} the {noun} {place}.")]


def _opinion(rng: random.Random) -> Turns:
    first, second = rng.sample(NOUNS, 2)
    adjective = rng.choice(ADJECTIVES)
    return [
        (
            f"What is more {adjective}, a {first} or a {second}?",
            f"That depends, but I would say that the {first} is more {adjective}.",
        ),
        ("Why?", f"Because a {second} is seldom {adjective}."),
    ]


def _steps(rng: random.Random) -> Turns:
    noun, (first, second, third) = rng.choice(NOUNS), rng.sample(VERBS, 3)
    answer = f"First {base(first)} the {noun}. Then {base(second)} it. At last {base(third)} it {rng.choice(PLACES)}."
    return [(f"Give me three steps for a {rng.choice(ADJECTIVES)} {noun}.", answer)]


KINDS: tuple[Callable[[random.Random], Turns], ...] = (
    _repeat, _reverse, _shortest, _story, _question, _count, _advice, _rewrite, _opinion, _steps,
)  # fmt: skip


def build(directory: Path = DATA) -> None:
    """Write `instructions.jsonl.gz`.

    Args:
        directory: Where the file goes.
    """
    write_rows(directory / "instructions.jsonl.gz", _rows(random.Random(SEED + 1)))


def _rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    for number in range(ROWS):
        kind = rng.choice(KINDS)
        messages = []
        for question, answer in kind(rng):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"id": f"atlas-{number:05d}", "source": kind.__name__.strip("_"), "messages": messages}
