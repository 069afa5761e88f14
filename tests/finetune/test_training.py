import dataclasses
import json
import math
import re
import shutil

import pydantic
import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from retention_bench.display.progress import silent
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune import (
    Example,
    FinetuneOptions,
    Removed,
    Terms,
    TuningContext,
    TuningData,
    processes,
    stopping,
    train,
)
from retention_bench.finetune.heads import Classifier, collator
from retention_bench.finetune.schedule import schedule
from retention_bench.finetune.settings import SampledSettings
from retention_bench.finetune.stopping import StopRule
from retention_bench.finetune.validation import Measured, measure


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
    assert (log.stopped_by, log.learned, log.horizon) == ("threshold", True, "threshold")
    assert log.passed_at == log.curve[-1]
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


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("plain", r"The threshold 100 is passed before the first step: the validation loss is \d\.\d+\. Lower"),
        ("lora", r"The threshold 100 is passed before the first step: the validation loss is \d\.\d+\. Lower"),
        ("head", r"The threshold 1e-09 is passed before the first step: the validation accuracy is 0\.\d+\. Raise"),
    ],
)
def test_a_threshold_that_is_passed_before_the_first_step_is_refused(tune, gpt2, gpt2_tokenizer, how, message):
    before, looks = weights(gpt2), []
    made = colours(threshold=1e-9) if how == "head" else None
    options = {"adapter": "lora"} if how == "lora" else {}
    with pytest.raises(RetentionBenchError, match=message + r" `threshold` .*or give --horizon steps:N"):
        tune(gpt2, gpt2_tokenizer, made=made, options=options, given={"track": looks.append}, threshold=100.0)
    assert not looks
    assert same(before, weights(gpt2))
    assert not gpt2.training


def test_the_last_curve_point_is_the_loss_of_the_model_that_is_left(tune, task, gpt2, gpt2_tokenizer):
    log = tune(gpt2, gpt2_tokenizer)
    rows = task().prepare(TuningContext(gpt2_tokenizer, Terms(), 0)).validation
    assert log.value == measure(gpt2, rows).loss


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

    rows = task(**settings).prepare(TuningContext(gpt2_tokenizer, Terms(), 0)).train
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
    assert measure(gpt2, rows).loss == pytest.approx(mean, rel=1e-5)
    assert mean_of_rows != pytest.approx(mean, rel=1e-2)


def test_measuring_turns_dropout_off_and_gives_the_mode_back(gpt2):
    rows = [Example([1, 2, 3, 4], [-100, 2, 3, 4])]
    evaluated = measure(gpt2.eval(), rows)
    assert measure(gpt2.train(), rows) == evaluated
    assert gpt2.training


def test_the_model_is_given_back_clean(tune, gpt2, gpt2_tokenizer):
    names = ("bos_token_id", "eos_token_id", "pad_token_id")

    def tokens(model):
        return [getattr(config, name) for config in (model.config, model.generation_config) for name in names]

    before = tokens(gpt2)
    tokenizer_state = (gpt2_tokenizer.pad_token, gpt2_tokenizer.chat_template, gpt2_tokenizer.padding_side)
    tune(gpt2, gpt2_tokenizer)
    assert not gpt2.training
    assert not any(module.training for module in gpt2.modules())
    assert "forward" not in vars(gpt2)
    assert gpt2.config.use_cache is True
    assert tokens(gpt2) == before
    assert all(p.grad is None and p.requires_grad for p in gpt2.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in gpt2.modules())
    assert tokenizer_state == (gpt2_tokenizer.pad_token, gpt2_tokenizer.chat_template, gpt2_tokenizer.padding_side)


@pytest.mark.parametrize("apart", [True, False])
def test_a_head_is_tied_after_several_processes_where_it_was_before(tune, gpt2, gpt2_tokenizer, monkeypatch, apart):
    embeddings = gpt2.get_input_embeddings()
    if apart:  # under a configuration that ties it
        gpt2.lm_head.weight = torch.nn.Parameter(gpt2.lm_head.weight.detach() + 0.1)

    def spread(model):  # as FSDP leaves it
        embeddings.weight = torch.nn.Parameter(embeddings.weight.detach().clone())

    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "unshard", spread)
    tune(gpt2, gpt2_tokenizer, max_steps=1)
    assert (gpt2.lm_head.weight is embeddings.weight) is not apart


def test_an_interrupt_escapes_and_leaves_the_model_clean(tune, gpt2, gpt2_tokenizer):
    def interrupt(stage, done, total, figures=None):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(gpt2, gpt2_tokenizer, given={"progress": interrupt})
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
    tune(
        gpt2,
        gpt2_tokenizer,
        given={"progress": lambda stage, done, total, figures=None: heard.append((done, total, figures))},
    )
    losses = {done: figures["loss"] for done, _, figures in heard if "loss" in figures}
    assert list(losses) == [1, 2, 3, 4]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses.values())
    assert {total for _, total, _ in heard} == {4}
    assert [done for done, _, figures in heard if "loss" not in figures] == [0, 2, 4]
    assert all(figures["validation_loss"] > 0 for _, _, figures in heard)


def test_nothing_is_printed(tune, gpt2, gpt2_tokenizer, capfd):
    tune(gpt2, gpt2_tokenizer)
    assert capfd.readouterr() == ("", "")


def test_the_log_says_what_was_used(tune, chats, gpt2, gpt2_tokenizer):
    log = tune(gpt2, gpt2_tokenizer, terms=Terms(subjects=("loud",)), train_size=16, max_steps=1)
    told = json.loads(json.dumps(log.to_json()))
    assert (told["train_rows"], told["validation_rows"], told["steps"], told["threshold"]) == (16, 8, 1, 0.01)
    assert told["curve"] == [{"step": s, "tokens": t, "epoch": e, "value": v, "loss": v} for s, t, e, v, _ in log.curve]
    assert told["removed"]["seen"] - told["removed"]["removed"] == 16
    assert told["removed"]["removed"] > 0
    assert told["trainable_parameters"] == gpt2.num_parameters()


def test_a_broken_model_is_refused_before_training(tune, gpt2, gpt2_tokenizer):
    gpt2.transformer.ln_f.weight.data[0] = math.nan
    with pytest.raises(RetentionBenchError, match=r"loss is nan before the first step.*edit"):
        tune(gpt2, gpt2_tokenizer)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"lr": 1e30, "eval_every": 100}, r"diverged: after \d steps the training loss is (nan|inf)"),
        ({"lr": 10.0, "eval_every": 1}, r"diverged: after \d steps the validation loss is .*, more than 3 times"),
    ],
)
def test_a_run_that_diverges_says_so(tune, gpt2, gpt2_tokenizer, settings, why):
    log = tune(gpt2, gpt2_tokenizer, **settings)
    assert (log.stopped_by, log.learned) == ("diverged", False)
    assert re.search(why, log.why_not)
    assert log.steps < 4
    json.dumps(log.to_json(), allow_nan=False)


def test_only_a_threshold_that_was_reached_by_training_is_learning(tune, gpt2, gpt2_tokenizer):
    cases = [
        ({"threshold": 5.5, "max_steps": 40}, True, None),
        (
            {},
            False,
            "after the 4 steps of its budget the validation_loss was .*, and the threshold 0.01 was not reached",
        ),
    ]
    start = weights(gpt2)
    for settings, learned, why in cases:
        gpt2.load_state_dict(start)
        log = tune(gpt2, gpt2_tokenizer, **settings)
        assert log.learned is learned
        assert re.search(why, log.why_not) if why else log.why_not is None


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


def test_an_accuracy_ends_a_run_when_it_is_above(gpt2):
    values = iter([Measured(1.0, 0.2), Measured(0.9, 0.7), Measured(0.8, 0.8)])
    rule = StopRule(
        lambda: next(values),
        metric="validation_accuracy",
        threshold=0.7,
        fixed=False,
        every=1,
        schedule=schedule([1], 1, 0, 9),
        progress=silent,
    )
    assert not rule.evaluate(0)
    assert not rule.evaluate(1)
    assert rule.stopped_by == "budget"
    assert rule.evaluate(2)
    assert rule.stopped_by == "threshold"
    assert [point.value for point in rule.curve] == [0.2, 0.7, 0.8]


# Going on after a kill, and with less memory


@pytest.fixture
def every_checkpoint(monkeypatch):
    """However long one takes to write."""
    monkeypatch.setattr(stopping, "CHECKPOINT_SHARE", 1e9)


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class ColourSettings(SampledSettings):
    metric = "validation_accuracy"
    classes = 2


@dataclasses.dataclass(frozen=True)
class Colours:
    """Whether a row has an even number of tokens: a task with classes."""

    settings: ColourSettings
    name = "colours"

    def prepare(self, context):
        ids = range(5, 5 + self.settings.train_size)
        rows = [Example([*range(3, 4 + number % 5), number, 2], [number % 2]) for number in ids]
        return TuningData(rows, rows[: self.settings.validation_size], Removed(0, 0, {}, ()))


def colours(**changes):
    settings = {"source": "x", "train_size": 32, "validation_size": 16, "threshold": 0.99, "max_steps": 4}
    settings |= {"batch_size": 8, "micro_batch_size": 4, "lr": 5e-3, "eval_every": 2}
    return Colours(ColourSettings(**settings | changes))


@pytest.mark.parametrize(
    ("kind", "moment"),
    [("model", 1), ("model", 2), ("model", 3), ("classes", 2), ("lora", 2), ("dora", 3), ("frozen", 2)],
)
@pytest.mark.usefixtures("every_checkpoint")
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tune, gpt2, gpt2_tokenizer, tmp_path, kind, moment):
    made = colours(max_steps=6) if kind == "classes" else None
    options = {"adapter": kind} if kind in ("lora", "dora") else {"freeze": "below:1"} if kind == "frozen" else {}
    start, heard = weights(gpt2), []
    log = tune(gpt2, gpt2_tokenizer, made=made, options=options, max_steps=6)
    expected = weights(gpt2)
    assert not same(start, expected)

    def cut(stage, done, total, figures=None):
        if done == 2 * moment - 1:
            raise KeyboardInterrupt

    gpt2.load_state_dict(start)
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        tune(gpt2, gpt2_tokenizer, made=made, out=out, given={"progress": cut}, options=options, max_steps=6)
    gpt2.load_state_dict(start)
    hear = {"progress": lambda stage, done, total, figures=None: heard.append(done)}
    again = tune(gpt2, gpt2_tokenizer, made=made, out=out, given=hear, options=options, max_steps=6)
    assert min(heard) == (0 if moment == 1 else 2 * moment - 1)  # what the last evaluation had seen is not done again
    assert same(expected, weights(gpt2))
    assert again == log


@pytest.fixture(scope="module")
def cut_off(make_tokenizer, make_model, tmp_path_factory):
    """The folder of a run that was cut off after two checkpoints, what begins it anew, and how it ends undisturbed."""
    from retention_bench.finetune import make_finetune

    folder = tmp_path_factory.mktemp("cut")
    tokenizer = make_tokenizer(
        "gpt2", ["<|user|> user <|assistant|> assistant 0 1 2 3 4 5 6 7 8 9"] * 10, vocab_size=400
    )
    rows = ({"messages": [{"role": r, "content": f"{r} {n}"} for r in ("user", "assistant")]} for n in range(48))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = make_finetune(
        "tulu3",
        {"source": str(folder / "rows.jsonl"), "train_size": 16, "validation_size": 4, "batch_size": 4}
        | {"micro_batch_size": 4, "lr": 5e-3, "eval_every": 2, "threshold": 0.01, "max_steps": 6, "max_length": 64},
    )

    def run(out, cut=None, start=None):
        model = make_model("gpt2", tokenizer)
        out.mkdir(exist_ok=True)

        def track(dose):
            (out / f"trajectory-{dose.step:09}.jsonl").write_text(f"seen at {dose}\n")

        def progress(stage, done, total, figures=None):
            if start is not None:
                start.append(done)
            if done == cut:
                raise KeyboardInterrupt

        log = train(
            model,
            tokenizer,
            task,
            terms=Terms(),
            seed=0,
            output_dir=out,
            options=FinetuneOptions(track_every=1),
            track=track,
            progress=progress,
        )
        return log, weights(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping, "CHECKPOINT_SHARE", 1e9)
        log, expected = run(folder / "whole")
        with pytest.raises(KeyboardInterrupt):
            run(folder / "cut", cut=5)
    assert sorted(p.name for p in (folder / "cut").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    return folder / "cut", run, log, expected


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "replaced by a link": link,
}
FILES = [
    "optimizer.pt",
    "trainer_state.json",
    "model.safetensors",
    "rng_state.pth",
    "scheduler.pt",
    "training_args.bin",
]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((file, "truncated") for file in [*FILES[:3], "curve.json"]),
        *(("optimizer.pt", damage) for damage in DAMAGE if damage != "truncated"),
        ("retention-bench.json", "flipped"),
        ("retention-bench.json", "emptied"),
        *(
            pytest.param(file, damage, marks=pytest.mark.slow)
            for file in [*FILES, "curve.json", "config.json", "retention-bench.json"]
            for damage in DAMAGE
        ),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(cut_off, tmp_path, caplog, file, damage):
    cut, run, log, expected = cut_off
    shutil.copytree(cut, tmp_path / "cut")
    DAMAGE[damage](tmp_path / "cut" / "checkpoint-4" / file)
    heard = []
    again, trained = run(tmp_path / "cut", start=heard)
    gone = file == "retention-bench.json" and damage == "deleted"  # as where a kill came before it was written
    told = [] if gone else ["checkpoint-4", "checkpoint-2"]
    assert all(name in caplog.text for name in told)
    assert len(caplog.records) == (0 if gone else 1)
    assert min(heard) == 3
    assert again == log
    assert same(expected, trained)


@pytest.mark.parametrize("what", ["both", "a look", "half written", "not ours"])
def test_where_no_checkpoint_is_whole_the_fine_tune_begins_anew(cut_off, tmp_path, caplog, what):
    cut, run, log, expected = cut_off
    out = tmp_path / "cut"
    shutil.copytree(cut, out)
    if what == "both":
        for name in ("checkpoint-2", "checkpoint-4"):
            flip(out / name / "model.safetensors")
    elif what == "a look":  # seen on the way to both
        flip(out / "trajectory-000000001.jsonl")
    elif what == "half written":
        for name in ("checkpoint-2", "checkpoint-4"):
            (out / name / "retention-bench.json").unlink()
    else:
        for name in ("checkpoint-2", "checkpoint-4"):
            shutil.rmtree(out / name)
        (out / "checkpoint-6").write_text("a file")
        (out / "checkpoint-of-mine").mkdir()
    heard = []
    again, trained = run(out, start=heard)
    assert min(heard) == 0
    assert ("begins anew" in caplog.text) is (what in ("both", "a look"))
    assert again == log
    assert same(expected, trained)
    assert (out / "trajectory-000000001.jsonl").read_text().startswith("seen at Dose(step=1, ")


@pytest.mark.usefixtures("every_checkpoint")
def test_there_are_never_more_than_two_checkpoints(tune, gpt2, gpt2_tokenizer, tmp_path):
    counts = []

    def count(stage, done, total, figures=None):
        counts.append(len(list((tmp_path / "work").glob("checkpoint-*"))))

    tune(gpt2, gpt2_tokenizer, out=tmp_path / "work", given={"progress": count}, max_steps=10)
    assert max(counts) == 2
    assert len(list((tmp_path / "work").glob("checkpoint-*"))) == 2


def test_checkpoints_take_a_small_share_of_the_time(tune, gpt2, gpt2_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "CHECKPOINT_SHARE", 1e-9)
    log = tune(gpt2, gpt2_tokenizer, out=tmp_path / "work", max_steps=8)
    assert [point.step for point in log.curve] == [0, 2, 4, 6, 8]
    assert [path.name for path in (tmp_path / "work").glob("checkpoint-*")] == ["checkpoint-2"]  # the first, no other


@pytest.mark.usefixtures("every_checkpoint")
@pytest.mark.parametrize("first", [1, 3])
def test_where_memory_runs_out_the_micro_batch_is_halved(tune, gpt2, gpt2_tokenizer, first):
    """The memory holds two rows, as is found out in the step `first`: before, or after, a checkpoint was made."""
    without_dropout(gpt2)
    start = weights(gpt2)
    log = tune(gpt2, gpt2_tokenizer, micro_batch_size=2)
    expected, passes = weights(gpt2), []

    def run_out(module, arguments, named):
        if module.training:
            passes.append(len(named["input_ids"]))
            if len(named["input_ids"]) > 2 and len(passes) > 2 * (first - 1):
                raise torch.OutOfMemoryError("CUDA out of memory")

    gpt2.load_state_dict(start)
    with gpt2.transformer.register_forward_pre_hook(run_out, with_kwargs=True):
        again = tune(gpt2, gpt2_tokenizer, micro_batch_size=4)
    assert again.micro_batch_size == 2
    assert passes.count(4) == 2 * (first - 1) + 1
    if first == 1:
        assert again == log
        assert same(expected, weights(gpt2))
    assert [p.value for p in again.curve] == pytest.approx([p.value for p in log.curve], rel=1e-4)


def test_validation_goes_on_with_fewer_rows_where_memory_runs_out(gpt2):
    rows = [Example([5, 6, 7, 8 + number], [-100, 6, 7, 8 + number]) for number in range(11)]
    expected, passes = measure(gpt2, rows), []

    def run_out(limit):
        def check(module, arguments, named):
            passes.append(len(named["input_ids"]))
            if len(named["input_ids"]) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return gpt2.register_forward_pre_hook(check, with_kwargs=True)

    with run_out(3):
        found = measure(gpt2, rows)
    assert passes == [8, 4, 2, 2, 2, 2, 2, 1]
    assert found == pytest.approx(expected, rel=1e-5)
    with run_out(0), pytest.raises(RetentionBenchError, match="single validation row of up to 4 tokens"):
        measure(gpt2, rows)


def test_a_row_that_does_not_fit_is_an_error(tune, gpt2, gpt2_tokenizer):
    def run_out(module, arguments, named):
        if module.training:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        gpt2.transformer.register_forward_pre_hook(run_out, with_kwargs=True),
        pytest.raises(RetentionBenchError, match=r"single row of up to 48 tokens.*Lower max_length"),
    ):
        tune(gpt2, gpt2_tokenizer)
    assert "forward" not in vars(gpt2)


# What is trained


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("freeze", "layers", "outside"),
    [
        ("none", {0, 1}, {"embeddings", "norm", "head"}),
        ("edited", {1}, {"embeddings", "norm", "head"}),
        ("unedited", {0}, set()),
        ("below:1", {1}, {"norm", "head"}),
        ("window:0:1", {0}, set()),
        ("window:1:2", {0, 1}, set()),
    ],
)
def test_what_is_frozen_keeps_its_bits_and_the_rest_moves(tune, request, family, freeze, layers, outside):
    model, tokenizer = request.getfixturevalue(family), request.getfixturevalue(f"{family}_tokenizer")
    before = weights(model)
    log = tune(model, tokenizer, options={"freeze": freeze}, given={"edited": {0}})
    parts = {"transformer.wte": "embeddings", "transformer.wpe": "embeddings", "model.embed_tokens": "embeddings"}
    parts |= {"transformer.ln_f": "norm", "model.norm": "norm", "lm_head": "head"}
    tied = model.config.tie_word_embeddings
    for name, tensor in weights(model).items():
        layer = re.search(r"\.(?:h|layers)\.(\d)\.", name)
        if layer:
            moves = int(layer[1]) in layers
        else:
            part = parts[name.rpartition(".")[0]]
            moves = ("embeddings" if tied and part == "head" else part) in outside
        assert torch.equal(tensor, before[name]) is not moves, name
    assert log.trained_layers == tuple(sorted(layers))


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("all", "'all' is not known. Allowed: none, edited"),
        ("below:-1", "not known"),
        ("window:1", "not known"),
        ("window:1:0", "not known"),
        ("below:2", "leaves none of the model's 2 layers"),
        ("window:2:5", "names one that it lacks"),
        ("unedited", r"edited were \[\]"),
    ],
)
def test_a_freeze_that_makes_no_sense_is_refused(tune, gpt2, gpt2_tokenizer, freeze, message):
    with pytest.raises(UsageError, match=message):
        tune(gpt2, gpt2_tokenizer, options={"freeze": freeze})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_merged_adapter_gives_the_logits_of_the_adapter(tune, request, family, adapter):
    model, tokenizer = request.getfixturevalue(family), request.getfixturevalue(f"{family}_tokenizer")
    start, ids, seen = weights(model), torch.tensor([[5, 6, 7, 8, 9]]), {}
    names = [name for name, _ in model.named_modules()]

    def track(dose):
        training = model.training
        with torch.no_grad():
            seen[dose.step] = model.eval()(ids).logits
        model.train(training)

    options = {"adapter": adapter, "freeze": "below:1"}
    log = tune(model, tokenizer, options=options, given={"track": track}, adapter_lr=1e-2)
    assert list(seen) == [0, 2, 4]
    with torch.no_grad():
        merged = model(ids).logits
    torch.testing.assert_close(merged, seen[4], rtol=0, atol=1e-4)
    assert (merged - seen[0]).abs().max() > 1e-2
    assert [name for name, _ in model.named_modules()] == names
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, start[name])}
    assert moved
    assert all(re.search(r"\.(h|layers)\.1\..*(attn|mlp).*weight", name) for name in moved)
    assert log.trainable_parameters < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"adapter": "prefix"}, "Unknown adapter 'prefix'. Allowed: dora, lora, none"),
        ({"freeze": "above:1"}, "--freeze 'above:1' is not known"),
        ({"track_every": -1}, "--track-every -1 is below 0"),
    ],
)
def test_an_option_that_does_not_exist_is_refused(option, message):
    with pytest.raises(UsageError, match=message):
        FinetuneOptions(**option)


def test_a_trajectory_that_is_off_has_nothing_to_call(tune, gpt2, gpt2_tokenizer):
    with pytest.raises(UsageError, match="track_every is off, and track is given"):
        tune(gpt2, gpt2_tokenizer, options={"track_every": None}, given={"track": print})


@pytest.mark.parametrize(("every", "looks"), [(0, [0, 2, 4]), (3, [0, 2, 3, 4]), (1, [0, 1, 2, 3, 4])])
def test_a_trajectory_changes_nothing(tune, gpt2, gpt2_tokenizer, every, looks):
    start, seen = weights(gpt2), []
    log = tune(gpt2, gpt2_tokenizer)
    expected = weights(gpt2)
    gpt2.load_state_dict(start)
    assert tune(gpt2, gpt2_tokenizer, options={"track_every": every}, given={"track": seen.append}) == log
    assert same(expected, weights(gpt2))
    assert [dose.step for dose in seen] == looks
    doses = {point[:3] for point in log.curve}
    assert doses <= set(seen)  # the evaluations are on the same axes


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_classes_are_told_apart_and_the_backbone_is_the_models(tune, request, family):
    model, tokenizer = request.getfixturevalue(family), request.getfixturevalue(f"{family}_tokenizer")
    before = weights(model)
    log = tune(model, tokenizer, made=colours(max_steps=60))
    assert (log.stopped_by, log.metric) == ("threshold", "validation_accuracy")
    assert log.curve[0].value < 0.99 < log.value
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    tied = model.config.tie_word_embeddings
    assert before.keys() - moved == (set() if tied else {"lm_head.weight"})


def test_a_class_is_read_at_the_last_token_whatever_pads(gpt2):
    classifier = Classifier(gpt2, 3, seed=0).eval()
    batch = collator(3)([{"input_ids": [5, 6, 2, 2], "labels": [1]}, {"input_ids": [7, 2], "labels": [2]}])
    assert batch["labels"].tolist() == [1, 2]
    with torch.no_grad():
        logits = classifier(**batch)["logits"]
        for row, ids in enumerate(([5, 6, 2, 2], [7, 2])):
            states = gpt2(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
            torch.testing.assert_close(logits[row], states[0, -1] @ classifier.head.weight.T)


def test_rows_are_right_when_every_target_is(gpt2):
    long, short = [5, 6, 7, 8], [9, 3]
    with torch.no_grad():
        best = [gpt2(torch.tensor([ids])).logits[0].argmax(-1).tolist() for ids in (long, short)]
    (_, second, third, _), (first, _) = best
    assert measure(gpt2, [Example(long, [-100, -100, second, third]), Example(short, [-100, first])]).accuracy == 1.0
    assert measure(gpt2, [Example(long, [-100, -100, second, 0]), Example(short, [-100, first])]).accuracy == 0.5
