"""What a cell makes of a dose: the step-matched control, and thresholds that are passed before the first step."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import yaml

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.pipeline import Bench, Cell, load_suite, plan, run
from retention_bench.pipeline.distributed.launching import Launcher
from retention_bench.pipeline.stages import Finetune, step_matched
from retention_bench.store import Input, Store


def cell(suite, **settings):
    return Cell(load_suite(str(suite)), None, "ft", "tulu3", 0, "cpu", **settings)


@pytest.fixture(scope="module")
def tiny(small_suite, tmp_path_factory):
    """A suite whose cells take seconds."""
    root = tmp_path_factory.mktemp("tiny")
    suite = yaml.safe_load(small_suite.read_text())
    rows = Path(suite["facts"]["source"]).read_text().splitlines(keepends=True)
    (root / "facts.jsonl").write_text("".join(random.Random(0).sample(rows, 40)))
    suite["facts"] |= {"source": str(root / "facts.jsonl"), "edited": 2, "intrinsic": 3}
    settings = suite["models"]["atlas-gpt2"]
    settings["editors"]["ft"] |= {"edits_per_model": 2, "num_steps": 2}
    settings["finetunes"]["tulu3"] |= {"train_size": 16, "validation_size": 4, "batch_size": 8, "max_steps": 3}
    settings["finetunes"]["tulu3"] |= {"eval_every": 1, "max_length": 48, "micro_batch_size": 8}
    (root / "suite.yaml").write_text(yaml.safe_dump(suite))
    return root / "suite.yaml"


def finished(store, stage, looks, stopped_by="threshold", facts=("a", "b")):
    """Put a fine-tune into the store that was looked at at these steps and ended with the last."""

    def write(folder):
        (folder / "log.json").write_text(json.dumps({"steps": looks[-1], "stopped_by": stopped_by}))
        rows = [{"step": step, "fact_id": fact, "of": stage.title()} for step in looks for fact in facts]
        (folder / "trajectory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    store.get(stage, write)


@pytest.fixture
def arms(small_suite, tmp_path):
    """The fine-tunes of a control and of two edited models, none computed, and a store."""
    *edited, control = plan(cell(small_suite)).finetunes
    return Store(tmp_path / "store"), control, edited


@pytest.fixture
def trained(monkeypatch):
    """Fine-tunes are not computed but noted, as ones that were looked at every third step of their horizon."""
    done = []

    def note(self, folder, bench):
        done.append(self)
        last = int(self.options.horizon.removeprefix("steps:"))
        (folder / "log.json").write_text(json.dumps({"steps": last, "stopped_by": "horizon"}))
        rows = [{"step": s, "fact_id": f, "of": self.title()} for s in {*range(0, last, 3), last} for f in "abc"]
        (folder / "trajectory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(Finetune, "run", note)
    monkeypatch.setattr(Finetune, "needs", ())
    return done


def test_the_controls_own_trajectory_is_read_where_it_went_as_far(arms, trained):
    store, control, edited = arms
    finished(store, control, [0, 3, 6, 9], facts=("a", "b", "c"))
    finished(store, edited[0], [0, 3, 6], facts=("a", "c"))
    finished(store, edited[1], [0, 3, 6, 9], facts=("b", "c"))
    rows = step_matched(Bench(store), control, edited)
    assert [(row["experiment"], row["stopped"], row["step"], row["fact_id"]) for row in rows] == [
        *((0, 6, 6, "a"), (0, 6, 6, "c")),  # of the facts that the edited model was asked
        *((1, 9, 9, "b"), (1, 9, 9, "c")),
    ]
    assert {row["of"] for row in rows} == {control.title()}
    assert not trained


def test_the_control_goes_on_where_an_edited_model_stopped_later(arms, trained):
    store, control, edited = arms
    finished(store, control, [0, 3])
    finished(store, edited[0], [0, 3, 6])
    finished(store, edited[1], [0, 3, 6, 9])
    for _ in range(2):  # once
        rows = step_matched(Bench(store), control, edited)
    assert {(row["experiment"], row["step"]) for row in rows} == {(0, 6), (1, 9)}
    assert {row["of"] for row in rows} == {"tulu3 fine-tune, unedited control to step 9"}
    [further] = trained
    expected = dataclasses.replace(control.options, horizon="steps:9")
    assert dataclasses.replace(control, options=expected).key == further.key  # nothing of an editor is in it


@pytest.mark.parametrize("which", ["edited", "control"])
def test_a_run_that_diverged_is_matched_by_the_last_look_before(arms, trained, which):
    store, control, edited = arms
    finished(
        store, control, [0, 3] if which == "control" else [0, 3, 6], "diverged" if which == "control" else "budget"
    )
    finished(store, edited[0], [0, 3, 5], "diverged")
    rows = step_matched(Bench(store), control, edited[:1])
    assert {(row["stopped"], row["step"]) for row in rows} == {(5, 3)}
    assert not trained


def test_without_a_trajectory_there_is_nothing_to_match(small_suite, tmp_path, trained):
    *edited, control = plan(cell(small_suite, track_every=None)).finetunes
    assert step_matched(Bench(Store(tmp_path)), control, edited) == []
    assert not trained


@pytest.fixture(scope="module")
def short(tiny, tmp_path_factory):
    """A cell of one step, its store, and its results."""
    root = tmp_path_factory.mktemp("short")
    asked, store = cell(tiny, horizon="steps:1"), Store(root / "store")
    return asked, store, run.evaluate(asked, store=store, out=root / "out")


def test_the_continued_control_is_the_control_that_goes_so_far(short, tiny):
    asked, store, _ = short
    bench, control = Bench(store), plan(asked).tuned_control
    longer = plan(cell(tiny, horizon="steps:3"))
    rows = step_matched(bench, control, [longer.tuned_control])  # any that stopped later
    own = [{"experiment": 0, "stopped": 3, **row} for row in longer.tuned_control.trajectory(bench)]
    assert rows == [row for row in own if row["step"] == 3]
    assert len(rows) == len({row["fact_id"] for row in rows}) > 5
    first = [row for row in own if row["step"] < 2]
    assert [{"experiment": 0, "stopped": 3, **row} for row in control.trajectory(bench)] == first


def test_a_horizon_is_in_the_log_and_the_trajectory_is_there_by_default(short):
    asked, store, results = short
    log = results.to_dict()["control"]["finetune_log"]
    assert (log["horizon"], log["steps"], log["stopped_by"], log["learned"]) == ("steps:1", 1, "horizon", False)
    assert (log["passed_at"], log["epochs"], log["tokens"] > 0) == (None, 0.5, True)
    assert [(entry["step"], entry["models"]) for entry in results.trajectory] == [(0, 1), (1, 1)]
    assert [entry["tokens"] for entry in results.trajectory] == [0, log["tokens"]]
    shared = plan(dataclasses.replace(asked, editor="alphaedit"))
    assert shared.tuned_control.key == plan(asked).tuned_control.key  # whatever the editor
    assert store.find(shared.tuned_control)


def test_without_a_trajectory_a_cell_has_none(tiny, short, tmp_path):
    _, store, _ = short
    results = run.evaluate(cell(tiny, horizon="steps:1", track_every=None), store=store, out=tmp_path / "out")
    assert results.trajectory is None
    assert not (tmp_path / "out" / "trajectory.jsonl").exists()


def test_a_threshold_that_the_base_model_is_beyond_is_refused_before_any_edit(tiny, short, tmp_path):
    suite = yaml.safe_load(tiny.read_text())
    suite["models"]["atlas-gpt2"]["finetunes"]["tulu3"]["threshold"] = 50.0
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    store, begun = Store(tmp_path / "store"), []
    with pytest.raises(RetentionBenchError, match=r"The threshold 50 is passed before the first step: .* is \d\.\d+\."):
        run.evaluate(
            cell(tmp_path / "suite.yaml"),
            store=store,
            out=tmp_path / "out",
            announce=lambda title, cached: begun.append(title),
        )
    assert begun[-1] == "tulu3 fine-tune, unedited control"
    assert not any("edit," in title for title in begun)


def test_what_sharding_cannot_follow_is_refused_before_anything_runs(monkeypatch):
    start = Launcher(Input("x", {}), {"distributed_type": "FSDP"}, 2)
    monkeypatch.setattr("retention_bench.pipeline.cell.launcher", lambda named, device: start)
    asked = Cell(load_suite("atlas"), None, "ft", "imdb", 0, "cpu", accelerate_config="x")
    with pytest.raises(UsageError, match="Give --track-every off, or --accelerate-config ddp"):
        plan(asked)
    assert plan(dataclasses.replace(asked, track_every=None)).tuned_control.launcher == start
    assert plan(dataclasses.replace(asked, finetune="tulu3")).tuned_control.launcher == start
