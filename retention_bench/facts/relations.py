"""The relation of a fact that its file does not name, recovered from the words of its prompt.

A prompt without its subject is a template: "The mother tongue of Danielle Darrieux is" becomes "The mother tongue of {}
is". One relation is asked in several templates, and the disjoint split needs them under one name: a relation that stood
under two could stand on both of its sides. So templates are tied together wherever something says that they may ask the
same, and what is tied is one relation:

- a fact's neighborhood prompts are about other subjects with the same relation and object (Meng et al. 2022), so their
  templates ask what the fact's own does;
- `relations.json` names the Wikidata relations of templates that CounterFact is made of;
- a group of templates with too few neighborhood prompts to show that it is whole is tied to every group
  that shares its objects.

A tie too many only makes a relation coarser: relations that share a template ("{} is in" asks for P131 and
for P276) cannot be told apart by their prompts and become one, "P131+P276".
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

OVERLAP = 0.3
"""Share of the smaller one's objects, true and new, that ties two groups of templates, if it is two objects at least.

By this alone, without neighborhood prompts and ids, the 213 templates of the 10,000 facts in counterfact_edit.json fall
into nine groups, and one into none; of the 24 relations that those prompts show none lies in two of them. At 0.4 one
does.
"""

PLACES = 20
"""Places of a subject in its prompt that are looked at, the last ones; real prompts have one or two."""

LONGEST_NAME = 1000
"""Characters of a subject that is looked for in another case too, which takes time for each in the prompt."""

ENOUGH = 20
"""Neighborhood prompts within a group that make it stand for itself, without a look at its objects."""


class Asked(NamedTuple):
    """What is known of a fact without a relation.

    Attributes:
        template: Its prompt with `{}` for the subject.
        objects: Its objects, true and new.
        neighborhood: Prompts about other subjects, filled in, that ask for the same relation.
    """

    template: str
    objects: tuple[str, ...]
    neighborhood: tuple[str, ...]


@functools.cache
def known_templates() -> Mapping[str, tuple[str, ...]]:
    """Wikidata relations by template, as the facts in the ROME authors' known_1000.json name them."""
    text = importlib.resources.files("retention_bench.facts").joinpath("relations.json").read_text(encoding="utf-8")
    return {template: tuple(ids) for template, ids in json.loads(text)["templates"].items()}


def templates(prompts: Sequence[tuple[str, str]]) -> list[tuple[str, str] | None]:
    """Find the subjects in prompts and take them out.

    A subject stands in its prompt as whole words, in its own case or, failing that, in another. Where it stands more
    than once, one place is the template's and the others are words of it ("In In Rainbows, ..."): the one that leaves
    the template most prompts share, and the last one of those that are alike.

    Args:
        prompts: (prompt, subject) of each fact. A prompt that has `{}` is a template already.

    Returns:
        For each the template and the subject as the prompt spells it, or None where it doesn't stand there.
    """
    choices = [_choices(prompt, subject) for prompt, subject in prompts]
    common = Counter(found[0][0] for found in choices if len(found) == 1)
    return [max(reversed(found), key=lambda cut: common[cut[0]]) if found else None for found in choices]


def name_relations(
    asked: Sequence[Asked], known: Mapping[str, Sequence[str]] | None = None
) -> Mapping[str, str | None]:
    """Name the relation of every template.

    Args:
        asked: The facts.
        known: Relations by template; None for those of `relations.json`.

    Returns:
        By template the ids of its group's relations ("P103", "P131+P276"), or, where none is known, the group's most
        common template; None for a template that stands in one fact and is tied to no other.
    """
    if not asked:
        return {}
    from scipy.cluster.hierarchy import DisjointSet

    known = known_templates() if known is None else known
    counts = Counter(fact.template for fact in asked)
    groups = DisjointSet(sorted(counts))
    ties = list(_same_relation(asked))
    for first, second in ties:
        groups.merge(first, second)
    by_id: dict[str, str] = {}
    for template in sorted(counts):
        for relation in known.get(template, ()):
            groups.merge(template, by_id.setdefault(relation, template))
    tied = Counter(groups[first] for first, _ in ties)
    open_ended = [group for group in groups.subsets() if tied[groups[min(group)]] < ENOUGH]
    for first, second in _overlapping(open_ended, groups.subsets(), asked):
        groups.merge(first, second)
    names: dict[str, str | None] = {}
    for group in groups.subsets():
        ids = sorted({i for template in group for i in known.get(template, ())}, key=lambda i: (len(i), i))
        common = min(group, key=lambda template: (-counts[template], template))
        alone = sum(counts[template] for template in group) == 1
        names |= dict.fromkeys(group, "+".join(ids) or (None if alone else common))
    return names


def _choices(prompt: str, subject: str) -> list[tuple[str, str]]:
    """The templates a prompt can have, in the order of the subject's places, and the subject as it stands there."""
    if prompt.count("{}") == 1:
        return [(prompt, subject)]
    places = _places(prompt, subject)[-PLACES:]
    return [(f"{prompt[:start]}{{}}{prompt[end:]}", prompt[start:end]) for start, end in places]


def _places(prompt: str, subject: str) -> list[tuple[int, int]]:
    """Where a subject stands as whole words; its limits count only where it ends in a letter or digit itself."""

    def whole(start: int, end: int) -> bool:
        before = start > 0 and subject[0].isalnum() and prompt[start - 1].isalnum()
        after = end < len(prompt) and subject[-1].isalnum() and prompt[end].isalnum()
        return not (before or after)

    exact, start = [], prompt.find(subject)
    while start >= 0:
        exact.append((start, start + len(subject)))
        start = prompt.find(subject, start + 1)
    found = [place for place in exact if whole(*place)]
    if found:
        return found
    if len(subject) > LONGEST_NAME:
        return []
    anycase = (match.span() for match in re.finditer(re.escape(subject), prompt, re.IGNORECASE))
    return [place for place in anycase if whole(*place)]


def _same_relation(asked: Iterable[Asked]) -> Iterator[tuple[str, str]]:
    """A fact's template and that of each of its neighborhood prompts: the longest template that fits the prompt."""
    asked = list(asked)
    endings: dict[str, set[str]] = defaultdict(set)
    for template in {fact.template for fact in asked}:
        before, _, after = template.partition("{}")
        endings[before].add(after)
    # Lengths alone say where a prompt can be cut, so that a long one takes no longer than a short one.
    begins = sorted({len(before) for before in endings})
    ends = {before: sorted({len(after) for after in afters}, reverse=True) for before, afters in endings.items()}
    for fact in asked:
        for prompt in fact.neighborhood:
            fitting = [
                f"{prompt[:start]}{{}}{prompt[len(prompt) - length :]}"
                for start in begins
                if prompt[:start] in endings
                for length in ends[prompt[:start]]
                if start < len(prompt) - length and prompt[len(prompt) - length :] in endings[prompt[:start]]
            ]
            if fitting:
                yield fact.template, max(fitting, key=len)


def _overlapping(
    some: Sequence[set[str]], groups: Sequence[set[str]], asked: Iterable[Asked]
) -> Iterator[tuple[str, str]]:
    """A template of each of some groups, and of every other group that shares enough objects with it."""
    number = {template: index for index, group in enumerate(groups) for template in group}
    objects: dict[int, set[str]] = defaultdict(set)
    for fact in asked:
        objects[number[fact.template]].update(name.casefold() for name in fact.objects)
    users: dict[str, list[int]] = defaultdict(list)
    for index, names in objects.items():
        for name in names:
            users[name].append(index)
    for group in some:
        index = number[min(group)]
        shared = Counter(other for name in objects[index] for other in users[name] if other != index)
        for other, count in shared.items():
            if count >= max(2, OVERLAP * min(len(objects[index]), len(objects[other]))):
                yield min(group), min(groups[other])
