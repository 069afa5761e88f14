"""Are half-life, curve, hazard ratio and log-rank test right where the hazards are known?

    python benchmarks/survival_simulation.py [--runs 300] [--facts 50] [--relations 5 8 15 30] [--frailty 0 0.5 1]
        [--shape 1] [--every 2]

Each row simulates studies: ten edited models that stop at different steps, looks every few steps and at the stop,
relations of unequal sizes and with hazards of their own. Times to loss are Weibull: with shape 1 the hazard is
constant, with 0.5 it falls (much is lost at once), with 4 it rises (nearly all is lost at about the same dose). The
half-life of edited facts is at step 10: at a look where these are every two steps, between two where they are every
six. Its mean is printed too, as between looks the rate of loss counts as constant. The curve's and the half-life's
truth is that of all relations together, integrated over the frailty; the hazard ratio's is what the estimate comes to
with 20,000 facts of 2,000 relations, as a ratio over relations of unequal hazards is closer to 1 than that within each
(2 here).
"""

import argparse
import functools
import itertools

import numpy as np
from scipy import optimize

from retention_bench.analysis.courses import Course
from retention_bench.analysis.hazards import contrast
from retention_bench.analysis.survival import curve

HALF_LIFE = 1000.0
"""In tokens, without frailty."""
TOKENS = 100.0
"""Tokens of a step."""


def simulate(
    rng: np.random.Generator,
    *,
    facts: int = 100,
    relations: int = 15,
    models: int = 10,
    half_life: float = 1000,
    ratio: float = 2,
    frailty: float = 0.5,
    shape: float = 1,
    every: int = 2,
    last: int = 24,
    unequal: bool = True,
) -> list[tuple[Course, Course]]:
    """Pairs of courses, edited and control, in which time to loss is Weibull.

    Args:
        rng: Where chance comes from.
        facts: About how many facts.
        relations: How many relations.
        models: How many edited models; each stops between a third of `last` and `last`, the control at `last`.
        half_life: Of edited facts without frailty, in tokens.
        ratio: Hazard of edited facts over the control's.
        frailty: SD of the relations' log-hazards; half of its variance is shared by the arms.
        shape: 1 for a constant hazard; above 1 it rises, below 1 it falls.
        every: Steps between two looks. The control is looked at also where an edited model stops.
        last: The most steps.
        unequal: Give relations unequal sizes, 1 : 2 : 3 and so on.
    """
    parts = np.arange(1, relations + 1) if unequal else np.ones(relations)
    sizes = np.maximum(1, np.round(facts * parts / parts.sum())).astype(int)
    relation = np.repeat(np.arange(relations), sizes)
    count = len(relation)
    common, *own = rng.normal(size=(3, relations)) * frailty / np.sqrt(2)
    model = rng.permutation(np.arange(count) % models)
    stops = rng.integers(last // 3, last + 1, models)
    arms = []
    for arm, hazard in enumerate((np.log(2), np.log(2) / ratio)):
        until = rng.exponential(1, count) / (hazard * np.exp((common + own[arm])[relation]))
        lost = half_life * until ** (1 / shape)
        followed = []
        for i in range(count):
            stop = last if arm else int(stops[model[i]])
            steps = tuple(sorted({*range(0, stop + 1, every), stop, *(stops.tolist() if arm else ())}))
            doses = tuple(TOKENS * step for step in steps)
            held = tuple(bool(lost[i] > dose) for dose in doses)
            followed.append(Course(f"f{i}", f"r{relation[i]}", None if arm else int(model[i]), steps, doses, held))
        arms.append(followed)
    return list(zip(*arms, strict=True))


def surviving(dose: float, frailty: float, shape: float = 1) -> float:
    """The share of edited facts that survive a dose, over all relations."""
    at, weight = np.polynomial.hermite_e.hermegauss(60)
    hazard = np.log(2) * (dose / HALF_LIFE) ** shape
    return float((weight * np.exp(-hazard * np.exp(frailty * at))).sum() / weight.sum())


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--facts", type=int, nargs="+", default=[50])
    parser.add_argument("--relations", type=int, nargs="+", default=[5, 8, 15, 30])
    parser.add_argument("--frailty", type=float, nargs="+", default=[0, 0.5, 1])
    parser.add_argument("--shape", type=float, nargs="+", default=[1], help="of the Weibull times to loss")
    parser.add_argument("--every", type=int, nargs="+", default=[2], help="steps between looks")
    given = parser.parse_args()
    columns = "facts | relations | frailty SD | shape | looks every | half-life | its mean | at 200 | at 1,000"
    print(f"| {columns} | hazard ratio | log-rank rejects |")
    print("|---" * 11 + "|")
    for row in itertools.product(given.facts, given.relations, given.frailty, given.shape, given.every):
        print(_row(given.runs, *row), flush=True)


@functools.cache
def _ratio(frailty: float, shape: float, every: int) -> float:
    """What the hazard ratio's estimate comes to."""
    large = {"facts": 20_000, "relations": 2_000, "models": 40, "unequal": False}
    design = {"frailty": frailty, "shape": shape, "every": every}
    found = (contrast(simulate(np.random.default_rng(seed), **large, **design)) for seed in range(3))
    return float(np.exp(np.mean([np.log(one.hazard_ratio) for one in found])))


def _row(runs: int, facts: int, relations: int, frailty: float, shape: float, every: int) -> str:
    half = optimize.brentq(lambda dose: surviving(dose, frailty, shape) - 0.5, 1, 1e6)
    ratio = _ratio(frailty, shape, every)
    design = {"frailty": frailty, "shape": shape, "every": every}
    rng = np.random.default_rng(5)
    lives, means, ratios, rejected, shares = [], [], [], [], {200: [], 1000: []}
    for _ in range(runs):
        pairs = simulate(rng, facts=facts, relations=relations, **design)
        found = curve([pair[0] for pair in pairs])
        life = found.half_life
        lives.append(life.low <= half and (life.high is None or half <= life.high))
        if life.dose is not None:
            means.append(life.dose)
        for dose, covered in shares.items():
            if dose <= found.doses[-1]:
                at = max(i for i, own in enumerate(found.doses) if own <= dose)
                truth = surviving(found.doses[at], frailty, shape)
                covered.append(found.low[at] - 1e-9 <= truth <= found.high[at] + 1e-9)
        if (interval := contrast(pairs).ci95) is not None:
            ratios.append(interval[0] <= ratio <= interval[1])
        null = simulate(rng, facts=facts, relations=relations, ratio=1, **design)
        rejected.append(contrast(null).log_rank_p <= 0.05)
    percents = [f"{100 * np.mean(found):.1f} %" for found in (lives, *shares.values(), ratios, rejected)]
    percents.insert(1, f"{np.mean(means):,.0f} (true: {half:,.0f})")
    return f"| {facts} | {relations} | {frailty:g} | {shape:g} | {every} | {' | '.join(percents)} |"


if __name__ == "__main__":
    main()
