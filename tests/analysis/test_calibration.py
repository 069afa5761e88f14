"""The intervals hold what they promise: benchmarks/calibration.py, in small."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = str(Path(__file__).parents[2] / "benchmarks" / "calibration.py")
NEW = ("rate", "paired difference", "gap, unmatched", "gap, matched", "log-odds")


@pytest.fixture(scope="module")
def calibration() -> dict[str, Any]:
    # Its dataclasses need the module that they are defined in.
    name = "calibration_script"
    sys.modules[name] = type(sys)(name)
    return runpy.run_path(SCRIPT, run_name=name)


def null_shares(calibration: dict[str, Any], relations: int, sd: float, studies: int) -> dict[str, float]:
    controls = [
        calibration["simulated_control"](relations, 15, sd, np.random.default_rng([relations, i]))
        for i in range(studies)
    ]
    found = [calibration["null_test"](facts, 1, seed) for seed, facts in enumerate(controls)]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def test_where_nothing_differs_an_interval_excludes_0_in_3_to_7_percent(calibration) -> None:
    shares = null_shares(calibration, 24, 1.0, 600)
    foil = shares.pop("gap, as it was")
    assert {name: 0.03 <= share <= 0.07 for name, share in shares.items()} == dict.fromkeys(shares, True), shares
    assert foil > 0.15  # facts taken as independent


@pytest.mark.parametrize("rate", [0.5, 0.95])
@pytest.mark.parametrize("sd", [0.0, 1.0])
@pytest.mark.parametrize(("relations", "largest"), [(5, 1.0), (15, 5.0)])
def test_intervals_are_never_narrower_than_promised(calibration, relations, largest, sd, rate) -> None:
    rng = np.random.default_rng(1)
    found = calibration["quantities"](rng, 100, relations, largest, sd, rate, 600)
    assert {name: found[name].covered for name in NEW if found[name].covered < 0.93} == {}
    if sd:
        assert found["gap, as it was"].covered < 0.93
    elif relations == 15:
        assert found["gap, unmatched"].width < 1.4 * found["gap, as it was"].width  # nor needlessly wide


@pytest.mark.parametrize(("models", "crossed", "sd"), [(2, True, 0.0), (10, False, 0.5), (10, True, 0.5)])
def test_rates_of_several_models_are_covered(calibration, models, crossed, sd) -> None:
    assert calibration["over_models"](50, 15, models, crossed, sd, 0.8, 500).covered >= 0.93


@pytest.mark.parametrize(("seeds", "sd"), [(2, 0.3), (5, 0.0), (5, 0.3)])
def test_a_mean_over_seeds_is_covered(calibration, seeds, sd) -> None:
    assert 0.93 <= calibration["over_seeds"](12, seeds, sd, 0.9, 600).covered <= 0.99


@pytest.mark.parametrize(("facts", "relations"), [(300, 30), (200, 20)])
def test_editors_apart_by_the_detectable_effect_are_told_apart_in_80_percent(calibration, facts, relations) -> None:
    effect = calibration["detectable_of"](facts, relations, 0.5)
    assert 0.05 < effect < 0.2
    apart, printed = calibration["told_apart"](facts, relations, 0.5, effect, 1000)
    assert printed == pytest.approx(effect, rel=0.05)
    assert apart == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(("facts", "relations", "entries"), [(50, 5, 2), (60, 15, 4)])
def test_places_differ_where_editors_do_and_not_where_they_are_equal(calibration, facts, relations, entries) -> None:
    effect = calibration["detectable_of"](facts, relations, 0.7)
    assert calibration["places"](facts, relations, 0.7, 0.0, entries, 600) <= 0.055
    found = calibration["places"](facts, relations, 0.7, effect, entries, 600)
    assert found > 0.7 if entries == 2 else found > 0.45  # held against three others


def test_a_null_test_is_sure_to_a_point_by_default(calibration, monkeypatch, capsys) -> None:
    told = []
    calibration["main"].__globals__.update(
        nulls=lambda controls, splits: told.append(splits), control_of=lambda run: {"r": [(1.0, 0.0)]}
    )
    monkeypatch.setattr(sys, "argv", ["calibration.py", "--runs", "a"])
    calibration["main"]()
    assert 1.96 * (0.05 * 0.95 / told[0]) ** 0.5 < 0.01


def test_a_runs_control_is_what_the_base_answered(calibration, tmp_path) -> None:
    def row(stage: str, fact: str, hit: bool, kind: str = "intrinsic") -> str:
        logprob = -0.1 if hit else -4.0
        return json.dumps({"stage": stage, "kind": kind, "fact_id": fact, "hit": hit, "logprob": logprob})

    facts = [{"id": f"f{i}", "relation": f"r{i // 2}"} for i in range(6)]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    rows = [row("base", f"f{i}", i != 5) for i in range(6)] + [
        row("control_finetune", f"f{i}", i != 1) for i in range(6)
    ]
    rows += [row(stage, "f0", False, "edited") for stage in ("base", "post_edit", "control_finetune")]
    (tmp_path / "samples.jsonl").write_text("\n".join(rows))
    found = calibration["control_of"](tmp_path)
    assert {relation: [hit for hit, _ in own] for relation, own in found.items()} == {
        "r0": [1.0, 0.0],
        "r1": [1.0, 1.0],
    }
    assert found["r0"][1][1] < -5  # its log-odds fell
    assert found["r1"][0][1] == 0


@pytest.mark.slow
def test_the_small_grid_is_held(calibration, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["calibration.py", "--small", "--splits", "200"])
    calibration["main"]()
    printed = capsys.readouterr().out
    assert printed.count("| gap, matched |") == 4
    for line in printed.splitlines():
        if line.startswith("| simulated"):
            shares = [float(part) for part in line.split("|")[5:8]]
            assert max(shares) < 9


@pytest.mark.slow
@pytest.mark.parametrize("facts", [50, 500])
def test_a_larger_grid_is_held(calibration, facts) -> None:
    found = {name: [] for name in NEW}
    grid = itertools.product((5, 8, 15, 30), (1.0, 5.0), (0.0, 0.5, 1.0), (0.5, 0.8, 0.95, 0.98))
    for relations, largest, sd, rate in grid:
        rng = np.random.default_rng([relations, int(largest), int(10 * sd), int(100 * rate)])
        cells = calibration["quantities"](rng, facts, relations, largest, sd, rate, 1000)
        for name in NEW:
            found[name].append(cells[name].covered)
    for name, covered in found.items():
        assert min(covered) >= 0.905, name
        assert 0.945 <= np.mean(covered) <= 0.985, name
        assert np.mean(np.array(covered) < 0.93) <= 0.06, name  # 1,000 studies are uncertain by 0.8 points
