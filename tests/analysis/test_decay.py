"""Decay in log-odds: against statsmodels, in simulation, and at its limits."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logit as reference
from statsmodels.regression.linear_model import OLS

from retention_bench.analysis.decay import LARGEST_PROBABILITY, LEAST_PROBABILITY, Confidence, decay, logit


@given(st.floats(1e-8, 1 - 2e-6))
def test_log_odds_are_scipys(p):
    assert logit(math.log(p)) == pytest.approx(reference(p), abs=1e-8)


@pytest.mark.parametrize(("logprob", "limit"), [(0.0, LARGEST_PROBABILITY), (-math.inf, LEAST_PROBABILITY)])
def test_certainty_is_clipped_and_counted(logprob, limit):
    assert logit(logprob) == pytest.approx(reference(limit))
    found = decay([Confidence("a", logprob, -1, -1, -1), Confidence("b", -1, -1, -1, logprob)])
    assert found.clipped == 2


@pytest.mark.parametrize("logprob", [0.1, math.nan])
def test_what_is_no_log_probability_is_refused(logprob):
    with pytest.raises(ValueError, match="at most 0"):
        decay([Confidence("a", -1, logprob, -1, -1)])


def made(rng, relations=15, facts=90, spread=0.5, change=(-1.2, -0.3)):
    own = rng.normal(size=(relations, 2)) * spread
    rows = []
    for _ in range(facts):
        relation = int(rng.integers(relations))
        before = rng.normal([3, 0], 1)
        after = before + change + own[relation] + rng.normal(0, 0.7, 2)
        logs = -np.log1p(np.exp(-np.array([before, after])))
        rows.append(Confidence(f"r{relation}", logs[0, 0], logs[1, 0], logs[0, 1], logs[1, 1]))
    return rows


def test_with_relations_of_one_size_the_interval_is_cluster_robust_ols():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(8, 5)) + rng.normal(size=(8, 1))
    rows = [
        Confidence(f"r{g}", math.log(0.5), -math.log1p(math.exp(-v)), -1, -1)
        for g, own in enumerate(values)
        for v in own
    ]
    groups = np.repeat(np.arange(8), 5)
    fit = OLS(values.ravel(), np.ones(40)).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    found = decay(rows)
    assert found.edited.mean == pytest.approx(values.mean())
    assert found.edited.ci95 == pytest.approx(tuple(fit.conf_int()[0]))
    assert found.paired == found.edited  # the control did not move
    assert json.loads(json.dumps(found.to_json()))["paired"]["mean"] == found.paired.mean


def test_paired_is_the_difference_and_needs_two_relations():
    found = decay(made(np.random.default_rng(1)))
    assert found.paired.mean == pytest.approx(found.edited.mean - found.control.mean)
    assert decay(made(np.random.default_rng(1), relations=1)).paired.ci95 is None
    assert decay([]) is None


@pytest.mark.parametrize(("relations", "spread"), [(8, 0.5), (30, 0), (30, 0.5)])
def test_known_decay_is_recovered(relations, spread):
    rng = np.random.default_rng(2)
    runs = [decay(made(rng, relations, spread=spread)).paired.ci95 for _ in range(200)]
    assert 0.92 <= np.mean([low <= -0.9 <= high for low, high in runs]) <= 0.98
