"""Do the intervals hold what they promise? Coverage in simulation, and null tests on simulated and on real controls.

    python benchmarks/calibration.py                     # the whole grid, some minutes on one core
    python benchmarks/calibration.py --small             # a part of it, seconds
    python benchmarks/calibration.py --runs RUN [RUN …]  # only the null tests, on the controls of finished runs

Studies go through the functions that make a run's intervals (`retention_bench.analysis`), many at a time. Relation
effects are normal on the logit; the truth is the mean over all relations that facts could have been drawn from. A
paired difference has the same facts in two arms, which share half the variance of the relation effect and a fact effect
of 1 logit. A matched gap has other facts of the same relations, an unmatched one twice the facts in as many others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import optimize, stats

from retention_bench.analysis import Answer, detectable
from retention_bench.analysis.clusters import Side, layout
from retention_bench.analysis.estimates import interval
from retention_bench.analysis.intervals import effective, wilson
from retention_bench.analysis.ranks import apart

RELATIONS = (5, 8, 15, 30)
FACTS = (50, 100, 500)
EFFECTS = (0.0, 0.5, 1.0)
RATES = (0.5, 0.8, 0.9, 0.95, 0.98)
LARGEST = (1.0, 5.0)  # times the smallest relation
FACT_EFFECT = 1.0
Facts = Mapping[str, Sequence[tuple[float, float]]]
"""A control's: by relation, for every fact of it a hit (1 or 0) and a change of log-odds."""
LOW, HIGH = 0.93, 0.97  # what coverage is to be within

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(81)


@dataclass(frozen=True)
class Cell:
    """What came out at one point of a grid: the share of intervals that hold the truth, and their mean width."""

    name: str
    covered: float
    width: float


# Simulated studies


def study(facts: int, relations: int, largest: float = 1.0, *, models: int = 1, crossed: bool = False) -> list[Answer]:
    """The layout of a study: facts in relations, and in one of the models each or, `crossed`, in all of them."""
    ends = np.cumsum(np.linspace(1.0, largest, relations))
    sizes = np.diff(np.round(ends / ends[-1] * facts).astype(int), prepend=0)
    of_fact = np.repeat(np.arange(relations), sizes).tolist()
    asked = [(f, m) for f in range(facts) for m in (range(models) if crossed else (f % models,))]
    return [Answer(of_fact[f], 0.0, f, m) for f, m in asked]


def effects(rng: np.random.Generator, answers: Sequence[Answer], studies: int, **sds: float) -> np.ndarray:
    """The sum of normal effects on the logit of what the answers belong to, by field; (studies, answers)."""
    total = np.zeros((studies, len(answers)))
    for field, sd in sds.items():
        if sd:
            labels = [str((a.seed, a.model) if field == "model" else getattr(a, field)) for a in answers]
            _, numbers = np.unique(labels, return_inverse=True)
            total += sd * rng.standard_normal((studies, numbers.max() + 1))[:, numbers]
    return total


def hits(rng: np.random.Generator, logits: np.ndarray, rate: float, sd: float) -> np.ndarray:
    """Hits at a mean rate, given effects with the standard deviation `sd` in all; (studies, answers)."""

    def lacking(middle: float) -> float:
        return float(_WEIGHTS @ (1 / (1 + np.exp(-(middle + sd * _NODES)))) / _WEIGHTS.sum()) - rate

    middle = optimize.brentq(lacking, -30, 30)
    return (rng.random(logits.shape) < 1 / (1 + np.exp(-middle - logits))).astype(np.float64)


def held(name: str, ends: Sequence[np.ndarray], truth: float) -> Cell:
    """The share of intervals that hold the truth."""
    low, high = ends[0], ends[1]
    inside = (low <= truth + 1e-12) & (truth - 1e-12 <= high)
    return Cell(name, float(inside.mean()), float((high - low).mean()))


def rate_ends(side: Side, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`clustered`'s interval, for many studies."""
    return wilson(side.mean(values), effective(side, values))


def as_it_was(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gap's interval before: facts are resampled as if they were independent; for many studies."""
    parts = [(side.mean(axis=1), side.var(axis=1, ddof=1) / side.shape[1], side.shape[1] - 1) for side in (one, other)]
    half = np.sqrt(sum(variance * stats.t.ppf(0.975, df) ** 2 for _, variance, df in parts))
    return parts[1][0] - parts[0][0] - half, parts[1][0] - parts[0][0] + half


def quantities(
    rng: np.random.Generator, facts: int, relations: int, largest: float, sd: float, rate: float, studies: int
) -> dict[str, Cell]:
    """One point of the grid: the coverage of every kind of interval."""
    name = f"{facts} facts, {relations} relations, sizes 1 to {largest:g}, SD {sd:g}, rate {rate:g}"
    answers = study(facts, relations, largest)
    others = [a._replace(relation=a.relation + relations) for a in study(2 * facts, relations, largest)]
    own, whole = sd / np.sqrt(2), float(np.hypot(sd, FACT_EFFECT))
    lower = max(rate - 0.1, 0.5)
    (side,) = layout([answers])
    first, second = layout([answers, others])
    single = hits(rng, effects(rng, answers, studies, relation=sd), rate, sd)
    far = hits(rng, effects(rng, others, studies, relation=sd), lower, sd)
    common = effects(rng, answers, studies, relation=own)
    of_fact = effects(rng, answers, studies, fact=FACT_EFFECT)

    def arm(mean: float) -> np.ndarray:
        return hits(rng, common + of_fact + effects(rng, answers, studies, relation=own), mean, whole)

    control, edited = arm(rate), arm(lower)
    near = hits(rng, common + effects(rng, answers, studies, relation=own), lower, sd)
    alike = hits(rng, common + effects(rng, answers, studies, relation=own), rate, sd)
    change = sd * effects(rng, answers, studies, relation=1.0) + rng.standard_normal(single.shape)
    return {
        "rate": held(name, rate_ends(side, single), rate),
        "paired difference": held(name, interval([(side, control - edited, 1.0)], bounded=True), rate - lower),
        "gap, unmatched": held(name, interval([(first, single, -1.0), (second, far, 1.0)], bounded=True), lower - rate),
        "gap, matched": held(name, interval([(side, alike, -1.0), (side, near, 1.0)], bounded=True), lower - rate),
        "log-odds": held(name, interval([(side, change, 1.0)], bounded=False), 0.0),
        "gap, as it was": held(name, as_it_was(single, far), lower - rate),
    }


def seeded(*parts: object) -> np.random.Generator:
    """Chance that is the same in every run, and another at every point of a grid."""
    return np.random.default_rng(zlib.crc32(repr(parts).encode()))


def over_models(facts: int, relations: int, models: int, crossed: bool, sd: float, rate: float, studies: int) -> Cell:
    """The coverage of a rate whose answers come from several models, which have an effect of their own (SD in logits).

    Few models (`analysis.MODELS`) can't tell how far models differ; for them the models' effect is 0.
    """
    rng = seeded("models", facts, relations, models, crossed, sd, rate)
    answers = study(facts, relations, models=models, crossed=crossed)
    (side,) = layout([answers])
    logits = effects(rng, answers, studies, relation=0.5, fact=FACT_EFFECT, model=sd)
    values = hits(rng, logits, rate, float(np.hypot.reduce([0.5, FACT_EFFECT, sd])))
    return held(f"{models} models, rate {rate:g}", rate_ends(side, values), rate)


def over_seeds(relations: int, seeds: int, sd: float, rate: float, studies: int) -> Cell:
    """The coverage of a paired difference over seeds, each with 50 facts of its own, half of them drawn again."""
    rng = seeded("seeds", relations, seeds, sd, rate)
    one = study(50, relations)
    answers = [a._replace(fact=(a.fact, s if a.fact % 2 else 0), seed=s) for s in range(seeds) for a in one]
    (side,) = layout([answers])
    common = effects(rng, answers, studies, relation=0.5, fact=FACT_EFFECT)
    whole = float(np.hypot.reduce([0.5, FACT_EFFECT, sd]))
    control, edited = (
        hits(rng, common + effects(rng, answers, studies, seed=sd), mean, whole) for mean in (rate, rate - 0.1)
    )
    ends = interval([(side, control - edited, 1.0)], bounded=True)
    return held(f"{seeds} seeds, rate {rate:g}", ends, 0.1)


def editors(
    facts: int, relations: int, sd: float, effect: float, studies: int, others: int = 1
) -> tuple[Side, list[np.ndarray]]:
    """The hits of an editor that keeps 85 % and of others that keep less by an effect, on the same facts."""
    rng = seeded("power", facts, relations, sd, effect)
    answers = study(facts, relations)
    (side,) = layout([answers])
    own, whole = sd / np.sqrt(2), float(np.hypot(sd, FACT_EFFECT))
    common = effects(rng, answers, studies, relation=own, fact=FACT_EFFECT)
    rates = (0.85, *[0.85 - effect] * others)
    return side, [hits(rng, common + effects(rng, answers, studies, relation=own), rate, whole) for rate in rates]


def told_apart(facts: int, relations: int, sd: float, effect: float, studies: int) -> tuple[float, float]:
    """Two editors that differ by an effect: the share of studies that tell them apart, and the mean printed effect."""
    side, (better, worse) = editors(facts, relations, sd, effect, studies)
    low, high, errors, dfs = interval([(side, better - worse, 1.0)], bounded=True)
    printed = [detectable(e, df) for e, df in zip(errors[:200], dfs[:200], strict=True)]
    return float(np.mean((low > 0) | (high < 0))), float(np.mean(printed))


def detectable_of(facts: int, relations: int, sd: float) -> float:
    """The difference of two editors that is as large as what studies of it print as detectable."""
    effect = 0.1
    for _ in range(4):
        _, effect = told_apart(facts, relations, sd, effect, 200)
    return effect


def places(facts: int, relations: int, sd: float, effect: float, entries: int, studies: int) -> float:
    """The share of studies in which an editor's place is surely another than that of an editor worse by an effect.

    With an effect of 0 all editors are equal, and the share is of studies that tell the first from any of the others.
    """
    side, values = editors(facts, relations, sd, effect, studies, entries - 1)
    found = apart([side] * entries, values)[0]
    return float(np.mean(found[1] > 0 if effect else found.any(axis=0)))


# Null tests


def null_test(facts: Facts, splits: int, seed: int = 0) -> dict[str, float]:
    """How often an interval excludes 0 though nothing differs: of random splits into sides of disjoint relations.

    Args:
        facts: Of the control.
        splits: How many.
        seed: Of the splits.

    Returns:
        By kind of interval. `paired` has facts of a relation put into pairs at random in the place of splits.
    """
    rng = np.random.default_rng(seed)
    relations = list(facts)
    excluded: dict[str, list[bool]] = defaultdict(list)

    def note(name: str, found: Sequence[np.ndarray] | None) -> None:
        excluded[name].append(found is not None and bool(found[0][0] > 0 or found[1][0] < 0))

    for _ in range(splits):
        order = rng.permutation(relations).tolist()
        parts = order[: len(order) // 2], order[len(order) // 2 :]
        sides = [[(g, fact) for g in part for fact in facts[g]] for part in parts]
        laid = layout([[Answer(g, 0.0) for g, _ in side] for side in sides])
        values = [np.array([fact for _, fact in side]).T[:, None] for side in sides]
        for name, which, bounded in (("gap", 0, True), ("gap in log-odds", 1, False)):
            signed = [(side, v[which], sign) for side, v, sign in zip(laid, values, (-1.0, 1.0), strict=True)]
            note(name, interval(signed, bounded=bounded))
        note("gap, as it was", as_it_was(values[0][0], values[1][0]))
        pairs = [
            (g, facts[g][i][0] - facts[g][j][0], facts[g][i][1] - facts[g][j][1])
            for g in relations
            for order in (rng.permutation(len(facts[g])).tolist(),)
            for i, j in zip(order[::2], order[1::2], strict=False)
        ]
        (side,) = layout([[Answer(g, 0.0) for g, _, _ in pairs]])
        differences = np.array([pair[1:] for pair in pairs]).T[:, None]
        note("paired", interval([(side, differences[0], 1.0)], bounded=True))
        note("paired in log-odds", interval([(side, differences[1], 1.0)], bounded=False))
    return {name: float(np.mean(found)) for name, found in excluded.items()}


def simulated_control(
    relations: int, each: int, sd: float, rng: np.random.Generator
) -> dict[str, list[tuple[float, float]]]:
    """The facts of a control that answers 90 % of them, and loses -1 in log-odds."""
    answers = study(relations * each, relations)
    effect = effects(rng, answers, 1, relation=sd)
    right = hits(rng, effect, 0.9, sd)[0]
    facts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for answer, hit, shift in zip(answers, right, effect[0], strict=True):
        facts[str(answer.relation)].append((float(hit), float(shift + rng.standard_normal() - 1)))
    return facts


def control_of(run: Path) -> dict[str, list[tuple[float, float]]]:
    """The facts that a finished run's unedited control was asked for: all that the base model answered."""
    relations = {}
    for row in map(json.loads, (run / "facts.jsonl").read_text().splitlines()):
        relations[row["id"]] = row["relation"]
    found: dict[str, dict[tuple[str, str], dict]] = {"base": {}, "control_finetune": {}}
    for row in map(json.loads, (run / "samples.jsonl").read_text().splitlines()):
        if row["stage"] in found and row["kind"] in ("intrinsic", "intrinsic_matched", "edited_true"):
            found[row["stage"]][row["kind"], row["fact_id"]] = row
    facts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for key, before in found["base"].items():
        after = found["control_finetune"][key]
        if before["hit"]:
            change = _logit(after["logprob"]) - _logit(before["logprob"])
            facts[relations[key[1]]].append((float(after["hit"]), change))
    return {relation: own for relation, own in facts.items() if len(own) > 1}


def _logit(logprob: float) -> float:
    return logprob - float(np.log(-np.expm1(min(logprob, -1e-12))))


# Tables


def table(head: str, rows: Iterable[Sequence[object]]) -> None:
    """Print a table of Markdown."""
    columns = head.split(" | ")
    print(f"\n| {head} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def summary(cells: Sequence[Cell]) -> list[object]:
    """Lowest, mean and highest coverage, mean width, and how many cells are below and above what is aimed at."""
    covered = [100 * cell.covered for cell in cells]
    low, high = (sum(c < 100 * LOW for c in covered), sum(c > 100 * HIGH for c in covered))
    return [
        f"{min(covered):.1f} / {np.mean(covered):.1f} / {max(covered):.1f}",
        f"{100 * np.mean([c.width for c in cells]):.0f}",
        f"{low or '-'}",
        f"{high or '-'}",
        len(cells),
    ]


COLUMNS = "lowest / mean / highest coverage, % | mean width, points | below 93 % | wide, above 97 % | cells"


def coverage(studies: int, small: bool) -> list[Cell]:
    """Print coverage over the grid; return the cells below what is aimed at."""
    found: dict[tuple[str, int, float], list[Cell]] = defaultdict(list)
    grid = itertools.product(
        (5, 15) if small else RELATIONS,
        (50,) if small else FACTS,
        LARGEST,
        (0.0, 1.0) if small else EFFECTS,
        (0.5, 0.95) if small else RATES,
    )
    for relations, facts, largest, sd, rate in grid:
        rng = seeded(relations, facts, largest, sd, rate)
        for name, cell in quantities(rng, facts, relations, largest, sd, rate, studies).items():
            found[name, relations, sd].append(cell)
    rows = sorted(
        found.items(), key=lambda item: (list(dict.fromkeys(n for n, _, _ in found)).index(item[0][0]), item[0])
    )
    table(
        f"interval | relations | SD | {COLUMNS}",
        ([name, relations, f"{sd:g}", *summary(cells)] for (name, relations, sd), cells in rows),
    )
    return _narrow((name, cells) for (name, _, _), cells in rows if name != "gap, as it was")


def _narrow(groups: Iterable[tuple[str, Sequence[Cell]]]) -> list[Cell]:
    """Print the cells below what is aimed at."""
    narrow = [(name, cell) for name, cells in groups for cell in cells if cell.covered < LOW]
    for name, cell in narrow:
        print(f"\nnarrower than promised: {name}, {cell.name}: {100 * cell.covered:.1f} %")
    return [cell for _, cell in narrow]


def hierarchies(studies: int, small: bool) -> list[Cell]:
    """Print coverage with several models and several seeds; return the cells below what is aimed at."""
    rates = (0.5, 0.95) if small else RATES
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for (models, sds), crossed in itertools.product(
        ((2, (0.0,)), (10, (0.5,))) if small else ((1, (0.0,)), (2, (0.0,)), (10, (0.0, 0.5)), (50, (0.0, 0.5))),
        (False, True),
    ):
        for sd, relations in itertools.product(sds, (8,) if small else (8, 30)):
            asked = "all facts" if crossed else "its own facts"
            groups["models", models, f"{sd:g}", asked, relations] = [
                over_models(50, relations, models, crossed, sd, rate, studies) for rate in rates
            ]
    for seeds, sd, relations in itertools.product(
        (3,) if small else (2, 3, 5, 10), (0.0, 0.3), (8,) if small else (8, 30)
    ):
        groups["seeds", seeds, f"{sd:g}", "50 facts, half the same", relations] = [
            over_seeds(relations, seeds, sd, rate, studies) for rate in rates if rate >= 0.8
        ]
    table(
        f"of | how many | their SD | each asked | relations | {COLUMNS}",
        ([*key, *summary(cells)] for key, cells in groups.items()),
    )
    return _narrow((f"{key[0]}, {key[3]}, {key[4]} relations", cells) for key, cells in groups.items())


def nulls(controls: Mapping[str, Callable[[], Iterable[Facts]]], splits: int) -> None:
    """Print the null tests of controls; those of one name share the splits, and their shares are averaged."""

    def row(name: str, some: Sequence[Facts]) -> list[object]:
        found = [null_test(facts, max(1, splits // len(some)), seed) for seed, facts in enumerate(some)]
        shares = [100 * float(np.mean([one[kind] for one in found])) for kind in NULLS]
        return [name, sum(map(len, some[0].values())), len(some[0]), *(f"{share:.1f}" for share in shares)]

    head = f"control | facts | relations | {' | '.join(NULLS)}"
    table(head, (row(name, list(make())) for name, make in controls.items()))


def powers(studies: int) -> None:
    """Print how often editors that differ are told apart, and their places."""
    table(
        "facts | relations | SD | editors apart by, points | minimum detectable effect printed, points | told apart, %",
        (
            [n, g, sd, f"{100 * effect:.1f}", f"{100 * printed:.1f}", f"{100 * found:.1f}"]
            for n, g, sd in [(50, 8, 0.5), (100, 10, 0.5), (200, 20, 1.0), (300, 30, 0.5), (500, 30, 1.0)]
            for effect in (0.1, detectable_of(n, g, sd))
            for found, printed in [told_apart(n, g, sd, effect, studies)]
        ),
    )
    table(
        "facts | relations | SD | editors | places told apart where all are equal, % | where the first is better by "
        "the minimum detectable effect, %",
        (
            [n, g, sd, entries, *(f"{100 * places(n, g, sd, by, entries, studies):.1f}" for by in (0.0, effect))]
            for n, g, sd in [(50, 5, 0.7), (50, 8, 0.7), (50, 10, 0.7), (60, 15, 0.7), (90, 30, 0.7), (500, 30, 1.0)]
            for effect in (detectable_of(n, g, sd),)
            for entries in (2, 5)
        ),
    )


NULLS = ("gap, as it was", "gap", "gap in log-odds", "paired", "paired in log-odds")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a part of the grid, in seconds")
    parser.add_argument("--runs", nargs="+", type=Path, help="run folders, for null tests on their controls alone")
    parser.add_argument("--splits", type=int, default=4000, help="of every null test; 4,000 are sure to 0.7 points")
    options = parser.parse_args()
    if options.runs:
        nulls({str(run): (lambda run=run: [control_of(run)]) for run in options.runs}, options.splits)
        return
    studies = 300 if options.small else 2000
    simulated = {
        f"simulated, {n} relations, SD {sd:g}": lambda n=n, sd=sd: [
            simulated_control(n, 20, sd, seeded("null", n, sd, i)) for i in range(options.splits)
        ]
        for n, sd in itertools.product((10, 30), (0.5, 1.0))
    }
    nulls(simulated, options.splits)
    coverage(studies, options.small)
    hierarchies(studies, options.small)
    powers(200 if options.small else 2000)


if __name__ == "__main__":
    main()
