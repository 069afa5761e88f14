"""How far a run goes, which rows its steps take, and the dose that the model has had."""

import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune import FinetuneOptions, Horizon, Terms, TuningContext, parse_horizon, stopping
from retention_bench.finetune.schedule import schedule

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("text", "horizon"),
    [
        ("threshold", Horizon()),
        ("steps:200", Horizon("steps", 200)),
        ("epochs:0.5", Horizon("epochs", 0.5)),
        ("epochs:3", Horizon("epochs", 3.0)),
        ("tokens:1000000", Horizon("tokens", 1_000_000)),
    ],
)
def test_a_horizon_is_read(text, horizon):
    assert parse_horizon(text) == horizon
    assert FinetuneOptions(horizon=text).horizon == text
    assert horizon.fixed is (text != "threshold")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "steps",
            "steps:",
            "steps:0",
            "steps:-1",
            "steps:1.5",
            "steps:07",
            "epochs:0",
            "epochs:0.0",
            "epochs:inf",
        ),
        *("epochs:1e3", "tokens:0", "tokens:1_000", "tokens:٣", "tokens:" + "9" * 400, "Threshold", "threshold\n"),
    ],
)
def test_what_is_no_horizon_is_refused(text):
    with pytest.raises(UsageError, match=r"is not known\. Allowed: threshold, steps:N, epochs:X and tokens:N"):
        FinetuneOptions(horizon=text)


def test_a_horizon_beyond_all_bounds_is_refused():
    for text in ("steps:100000000", "epochs:9999999", "tokens:999999999999999"):
        with pytest.raises(UsageError, match=f"--horizon {text[:6]}.* rows; a run has 100,000,000 at most"):
            schedule([10] * 100, 8, 0, 5, parse_horizon(text))


@given(LENGTHS, st.integers(1, 12), st.integers(0, 5), st.integers(1, 2000), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_a_schedule_counts_every_row_and_is_the_beginning_of_any_longer_one(lengths, batch, seed, amount, steps):
    whole = schedule(lengths, batch, seed, 1, Horizon("tokens", amount))
    assert whole.tokens[-2] < amount <= whole.tokens[-1]  # reached within the last step
    for step in range(whole.steps + 1):
        rows = whole.order[: step * batch]
        assert whole.at(step) == (step, sum(lengths[row] for row in rows), len(rows) / len(lengths))
    other = schedule(lengths, batch, seed, 1, Horizon("steps", steps))
    assert other.steps == steps
    shared = min(steps, whole.steps)
    assert list(other.order[: shared * batch]) == list(whole.order[: shared * batch])
    assert schedule(lengths, batch, seed, steps) == other  # a run to the threshold has its budget
    if batch % len(lengths) == 0 or len(lengths) % batch == 0:  # whole epochs have every row equally often
        epochs = schedule(lengths, batch, seed, 1, Horizon("epochs", math.lcm(batch, len(lengths)) // len(lengths)))
        assert sorted(epochs.order) == sorted([*range(len(lengths))] * (len(epochs.order) // len(lengths)))


def test_the_order_of_the_rows_is_what_it_was():
    lengths = [random.Random(7).randint(1, 30) for _ in range(10)]
    rng = random.Random(3)
    order = [row for _ in range(3) for row in rng.sample(range(10), 10)]
    expected = [row for at in range(0, 28, 4) for row in sorted(order[at : at + 4], key=lengths.__getitem__)]
    assert schedule(lengths, 4, 3, 7).order == expected


@pytest.mark.parametrize(
    ("horizon", "steps"), [("epochs:0.5", 2), ("epochs:1", 4), ("epochs:1.01", 5), ("epochs:0.01", 1), ("steps:7", 7)]
)
def test_epochs_are_of_the_training_rows(horizon, steps):
    assert schedule([1] * 32, 8, 0, 3, parse_horizon(horizon)).steps == steps


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_the_tokens_are_those_that_the_model_was_trained_on(tune, gpt2, gpt2_tokenizer, micro_batch_size):
    seen, looks = [], []

    def note(module, arguments, named):
        if module.training:
            seen.append(int(named["attention_mask"].sum()))

    def look(dose):
        looks.append((dose, sum(seen)))

    with gpt2.transformer.register_forward_pre_hook(note, with_kwargs=True):
        log = tune(
            gpt2,
            gpt2_tokenizer,
            given={"track": look},
            options={"track_every": 1, "horizon": "steps:6"},
            micro_batch_size=micro_batch_size,
        )
    assert [dose.step for dose, _ in looks] == list(range(7))
    assert all(dose.tokens == tokens for dose, tokens in looks)
    assert [dose.epoch for dose, _ in looks] == [step / 4 for step in range(7)]  # 32 rows, 8 a step
    assert (log.tokens, log.epochs) == (sum(seen), 1.5)
    assert [point[:3] for point in log.curve] == [dose for dose, _ in looks if dose.step % 2 == 0]


def test_a_fixed_horizon_passes_the_threshold_and_goes_on(tune, gpt2, gpt2_tokenizer):
    start = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    short = tune(gpt2, gpt2_tokenizer, threshold=4.5, max_steps=60)
    there = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    gpt2.load_state_dict(start)
    log = tune(gpt2, gpt2_tokenizer, threshold=4.5, max_steps=1, options={"horizon": f"steps:{short.steps + 3}"})
    assert (log.stopped_by, log.learned, log.why_not) == ("horizon", True, None)
    assert (log.steps, log.horizon) == (short.steps + 3, f"steps:{short.steps + 3}")  # an odd step, and evaluated
    assert log.passed_at == short.passed_at == short.curve[-1]
    assert log.curve[: len(short.curve)] == short.curve
    assert json.loads(json.dumps(log.to_json()))["passed_at"]["step"] == short.steps
    gpt2.load_state_dict(start)
    assert tune(gpt2, gpt2_tokenizer, threshold=4.5, options={"horizon": f"steps:{short.steps}"}).steps == short.steps
    assert all(torch.equal(there[name], tensor) for name, tensor in gpt2.state_dict().items())


def test_a_dose_in_tokens_ends_with_the_step_that_reaches_it(tune, task, gpt2, gpt2_tokenizer):
    rows = task().prepare(TuningContext(gpt2_tokenizer, Terms(), 0)).train
    once = sum(len(row.input_ids) for row in rows)
    log = tune(gpt2, gpt2_tokenizer, options={"horizon": f"tokens:{once + 1}"})
    assert (log.steps, log.epochs) == (5, 1.25)
    assert log.curve[-2].tokens == once < log.tokens


def test_a_fixed_horizon_that_does_not_pass_the_threshold_has_learned_nothing(tune, gpt2, gpt2_tokenizer):
    log = tune(gpt2, gpt2_tokenizer, options={"horizon": "epochs:0.5"})
    assert (log.steps, log.stopped_by, log.learned, log.passed_at) == (2, "horizon", False, None)
    assert "after the 2 steps of its horizon the validation_loss was" in log.why_not


def test_a_fixed_horizon_may_pass_the_threshold_before_the_first_step(tune, gpt2, gpt2_tokenizer):
    log = tune(gpt2, gpt2_tokenizer, threshold=100.0, options={"horizon": "steps:3"})
    assert (log.steps, log.stopped_by, log.learned) == (3, "horizon", False)
    assert log.passed_at == log.curve[0]
    assert log.why_not.endswith("before the first step, beyond the threshold 100, so passing it says nothing")


def test_a_run_that_diverges_after_the_threshold_has_not_learned(tune, gpt2, gpt2_tokenizer):
    given = {"lr": 10.0, "eval_every": 1, "threshold": 100.0}
    log = tune(gpt2, gpt2_tokenizer, options={"horizon": "steps:4"}, **given)
    assert (log.stopped_by, log.learned, log.passed_at.step) == ("diverged", False, 0)


def test_the_last_step_of_a_run_that_diverges_is_looked_at(tune, gpt2, gpt2_tokenizer):
    looks = []
    log = tune(gpt2, gpt2_tokenizer, given={"track": looks.append}, lr=1e30, eval_every=100)
    assert log.stopped_by == "diverged"
    assert [dose.step for dose in looks] == [0, log.steps]
    assert log.curve[-1][:3] == looks[-1]


@pytest.mark.parametrize("horizon", ["threshold", "tokens:700"])
def test_a_resumed_run_has_the_same_doses(tune, gpt2, gpt2_tokenizer, tmp_path, monkeypatch, horizon):
    monkeypatch.setattr(stopping, "CHECKPOINT_SHARE", 1e9)
    start = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    options, seen = {"horizon": horizon, "track_every": 1}, []
    log = tune(gpt2, gpt2_tokenizer, given={"track": seen.append}, options=options)
    assert log.steps >= 4
    ended = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}

    def cut(stage, done, total, figures=None):
        if done == 3:
            raise KeyboardInterrupt

    gpt2.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        tune(gpt2, gpt2_tokenizer, out=tmp_path / "cut", given={"progress": cut}, options=options)
    gpt2.load_state_dict(start)
    again = []
    assert tune(gpt2, gpt2_tokenizer, out=tmp_path / "cut", given={"track": again.append}, options=options) == log
    assert again == seen[3:]  # it goes on behind the checkpoint of step 2
    assert all(torch.equal(ended[name], tensor) for name, tensor in gpt2.state_dict().items())


def test_a_resumed_run_whose_threshold_was_refused_is_refused_again(tune, gpt2, gpt2_tokenizer, tmp_path):
    for _ in range(2):
        with pytest.raises(RetentionBenchError, match="passed before the first step"):
            tune(gpt2, gpt2_tokenizer, out=tmp_path / "work", threshold=100.0)
