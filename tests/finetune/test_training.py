import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune import Example, Terms, train
from retention_bench.finetune.stopping import StopRule
from retention_bench.finetune.validation import mean_token_loss
from retention_bench.progress import silent


@pytest.fixture
def tune(task, tmp_path):
    """Fine-tune a model on a small task with some settings changed."""

    def run(model, tokenizer, *, terms=None, seed=0, progress=silent, **settings):
        out = tmp_path / "work"
        return train(
            model, tokenizer, task(**settings), terms=terms or Terms(), seed=seed, output_dir=out, progress=progress
        )

    return run


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_threshold_ends_a_run(tune, family, request):
    model, tokenizer = request.getfixturevalue(family), request.getfixturevalue(f"{family}_tokenizer")
    log = tune(model, tokenizer, threshold=4.0, max_steps=60)
    assert log.stopped_by == "threshold"
    assert not log.started_below
    assert log.metric == "validation_loss"
    assert log.value == log.curve[-1].value < 4.0
    assert all(point.value >= 4.0 for point in log.curve[:-1])
    assert [point.step for point in log.curve] == list(range(0, log.steps + 1, 2))


def test_the_budget_ends_a_run_and_its_last_step_is_evaluated(tune, gpt2, gpt2_tokenizer):
    log = tune(gpt2, gpt2_tokenizer, max_steps=5, eval_every=2)
    assert (log.stopped_by, log.steps) == ("budget", 5)
    assert [point.step for point in log.curve] == [0, 2, 4, 5]
    assert log.curve[-1].value < log.curve[0].value


def test_a_run_goes_through_several_epochs(tune, gpt2, gpt2_tokenizer):
    assert tune(gpt2, gpt2_tokenizer, train_size=10, max_steps=4).steps == 4


def test_a_model_that_starts_below_the_threshold_is_not_trained(tune, gpt2, gpt2_tokenizer):
    before = weights(gpt2)
    log = tune(gpt2, gpt2_tokenizer, threshold=100.0)
    assert log.started_below
    assert (log.stopped_by, log.steps, len(log.curve)) == ("threshold", 0, 1)
    assert same(before, weights(gpt2))


def test_the_last_curve_point_is_the_loss_of_the_model_that_is_left(tune, task, gpt2, gpt2_tokenizer):
    log = tune(gpt2, gpt2_tokenizer)
    assert log.value == task().measure(gpt2, task().prepare(gpt2_tokenizer, Terms(), 0).validation)


def test_the_same_seed_gives_the_same_bits(tune, gpt2, gpt2_tokenizer):
    start, results = weights(gpt2), []
    for seed in (3, 3, 4):
        gpt2.load_state_dict(start)
        torch.rand(seed)  # the state of the global generator before a run must not matter
        results.append((tune(gpt2, gpt2_tokenizer, seed=seed), weights(gpt2)))
    (log, trained), (log_again, trained_again), (_, trained_other) = results
    assert same(trained, trained_again)
    assert not same(trained, trained_other)
    assert json.dumps(log.to_json()) == json.dumps(log_again.to_json())


def test_a_step_is_adamw_on_the_mean_over_the_target_tokens(tune, task, gpt2, gpt2_tokenizer):
    adam = {"lr": 1e-3, "weight_decay": 0.3, "betas": (0.5, 0.6)}
    settings = {**adam, "train_size": 8, "validation_size": 1, "max_steps": 3}  # every step sees all of the rows
    start = weights(without_dropout(gpt2))

    rows = task(**settings).prepare(gpt2_tokenizer, Terms(), 0).train
    targets = sum(label != -100 for row in rows for label in row.labels)
    matrices = [p for p in gpt2.parameters() if p.dim() == 2]
    vectors = [p for p in gpt2.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.5, 0.6))
    for _ in range(3):
        optimizer.zero_grad()
        for row in rows:
            logits = gpt2(torch.tensor([row.input_ids])).logits[0, :-1]
            (cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum") / targets).backward()
        torch.nn.utils.clip_grad_norm_(gpt2.parameters(), 1.0)
        optimizer.step()
    expected = weights(gpt2)

    gpt2.zero_grad()
    gpt2.load_state_dict(start)
    tune(gpt2, gpt2_tokenizer, **settings)
    for name, tensor in weights(gpt2).items():
        # Adam makes a step of a gradient that is rounding alone, so single weights may differ.
        close = torch.isclose(tensor, expected[name], rtol=0, atol=1e-5)
        assert close.float().mean() > 0.99, name


def test_micro_batches_hold_rows_of_like_length(tune, gpt2, gpt2_tokenizer):
    lengths = []

    def note(module, arguments, named):
        if module.training:
            lengths.extend(named["attention_mask"].sum(1).tolist())

    with gpt2.transformer.register_forward_pre_hook(note, with_kwargs=True):
        tune(gpt2, gpt2_tokenizer, micro_batch_size=2)
    steps = [lengths[i : i + 8] for i in range(0, len(lengths), 8)]
    assert len(steps) == 4
    assert all(step == sorted(step) and step[0] < step[-1] for step in steps)


def test_the_micro_batch_does_not_change_what_is_learned(tune, gpt2, gpt2_tokenizer):
    start, curves = weights(without_dropout(gpt2)), []
    for size in (1, 4, 64):
        gpt2.load_state_dict(start)
        curves.append([point.value for point in tune(gpt2, gpt2_tokenizer, micro_batch_size=size).curve])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0] == pytest.approx(curves[2], rel=1e-4)


def test_the_validation_loss_weighs_every_target_token_the_same(gpt2):
    gpt2.transformer.wte.weight.data *= 50  # a fresh model gives every token the same loss
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length, targets in [(3, 1), (40, 30), (7, 2), (5, 4), *[(9, 5)] * 8]:
        ids = torch.randint(len(gpt2.transformer.wte.weight), (length,), generator=generator).tolist()
        rows.append(Example(ids, [-100] * (length - targets) + ids[length - targets :]))
    by_row = []
    with torch.no_grad():
        for row in rows:
            logs = log_softmax(gpt2(torch.tensor([row.input_ids])).logits[0].double(), dim=-1)
            by_row.append([-logs[i - 1, label].item() for i, label in enumerate(row.labels) if label != -100])
    losses = [loss for row in by_row for loss in row]
    mean, mean_of_rows = sum(losses) / len(losses), sum(sum(row) / len(row) for row in by_row) / len(by_row)
    assert mean_token_loss(gpt2, rows) == pytest.approx(mean, rel=1e-5)
    assert mean_of_rows != pytest.approx(mean, rel=1e-2)


def test_measuring_turns_dropout_off_and_gives_the_mode_back(gpt2):
    rows = [Example([1, 2, 3, 4], [-100, 2, 3, 4])]
    evaluated = mean_token_loss(gpt2.eval(), rows)
    assert mean_token_loss(gpt2.train(), rows) == evaluated
    assert gpt2.training


def test_the_model_is_given_back_clean(tune, gpt2, gpt2_tokenizer):
    tokenizer_state = (gpt2_tokenizer.pad_token, gpt2_tokenizer.chat_template, gpt2_tokenizer.padding_side)
    tune(gpt2, gpt2_tokenizer)
    assert not gpt2.training
    assert not any(module.training for module in gpt2.modules())
    assert "forward" not in vars(gpt2)
    assert gpt2.config.use_cache is True
    assert all(p.grad is None and p.requires_grad for p in gpt2.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in gpt2.modules())
    assert tokenizer_state == (gpt2_tokenizer.pad_token, gpt2_tokenizer.chat_template, gpt2_tokenizer.padding_side)


def test_an_interrupt_escapes_and_leaves_the_model_clean(tune, gpt2, gpt2_tokenizer):
    def interrupt(stage, done, total, figures=None):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(gpt2, gpt2_tokenizer, progress=interrupt)
    assert not gpt2.training
    assert "forward" not in vars(gpt2)


def test_frozen_parameters_stay(tune, gpt2, gpt2_tokenizer):
    gpt2.requires_grad_(False)
    gpt2.transformer.h[1].mlp.requires_grad_(True)
    before = weights(gpt2)
    log = tune(gpt2, gpt2_tokenizer)
    changed = {name for name, tensor in weights(gpt2).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("transformer.h.1.mlp.") for name in changed)
    assert log.trainable_parameters == sum(p.numel() for p in gpt2.transformer.h[1].mlp.parameters())
    assert [name for name, p in gpt2.named_parameters() if p.requires_grad] == [
        name for name, _ in gpt2.named_parameters() if name.startswith("transformer.h.1.mlp.")
    ]


def test_progress_hears_of_every_step(tune, gpt2, gpt2_tokenizer):
    heard = []
    tune(gpt2, gpt2_tokenizer, progress=lambda stage, done, total, figures=None: heard.append((done, total, figures)))
    losses = {done: figures["loss"] for done, _, figures in heard if "loss" in figures}
    assert list(losses) == [1, 2, 3, 4]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses.values())
    assert {total for _, total, _ in heard} == {4}
    assert [done for done, _, figures in heard if "loss" not in figures] == [0, 2, 4]
    assert all(figures["validation_loss"] > 0 for _, _, figures in heard)


def test_nothing_is_printed_or_left_on_disk(tune, gpt2, gpt2_tokenizer, tmp_path, capfd, source):
    tune(gpt2, gpt2_tokenizer)
    assert capfd.readouterr() == ("", "")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {source}


def test_the_log_says_what_was_used(tune, chats, gpt2, gpt2_tokenizer):
    log = tune(gpt2, gpt2_tokenizer, terms=Terms(subjects=("loud",)), train_size=16, max_steps=1)
    told = json.loads(json.dumps(log.to_json()))
    assert (told["train_rows"], told["validation_rows"], told["steps"], told["threshold"]) == (16, 8, 1, 0.01)
    assert told["curve"] == [{"step": s, "value": v} for s, v in log.curve]
    assert told["removed"]["seen"] - told["removed"]["removed"] == 16
    assert told["removed"]["removed"] > 0
    assert told["trainable_parameters"] == gpt2.num_parameters()


def test_a_broken_model_is_refused_before_training(tune, gpt2, gpt2_tokenizer):
    gpt2.transformer.ln_f.weight.data[0] = math.nan
    with pytest.raises(RetentionBenchError, match=r"after 0 steps its validation_loss is nan.*edit"):
        tune(gpt2, gpt2_tokenizer)


def test_a_run_that_diverges_is_an_error(tune, gpt2, gpt2_tokenizer):
    with pytest.raises(RetentionBenchError, match=r"diverged: after \d steps its training loss is"):
        tune(gpt2, gpt2_tokenizer, lr=1e30, eval_every=100)


def test_half_precision_weights_are_refused(tune, gpt2, gpt2_tokenizer):
    with pytest.raises(UsageError, match=r"float32 weights, the model has torch.bfloat16"):
        tune(gpt2.bfloat16(), gpt2_tokenizer)


def test_rows_longer_than_the_model_takes_are_refused(tune, gpt2, gpt2_tokenizer):
    gpt2.config.n_positions = 8
    with pytest.raises(UsageError, match=r"takes 8 tokens.*max_length to 8"):
        tune(gpt2, gpt2_tokenizer)


def test_a_model_without_trainable_parameters_is_refused(tune, gpt2, gpt2_tokenizer):
    with pytest.raises(UsageError, match="frozen"):
        tune(gpt2.requires_grad_(False), gpt2_tokenizer)


def test_a_stop_rule_may_ask_for_more_than_a_threshold():
    values = iter([0.2, 0.8])
    rule = StopRule(lambda: next(values), lambda v: v > 0.7, metric="accuracy", every=1, budget=9, progress=silent)
    assert not rule.evaluate(0)
    assert rule.stopped_by == "budget"
    assert rule.evaluate(1)
    assert rule.stopped_by == "threshold"
