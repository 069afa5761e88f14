"""Stages as values: their keys, their plans, and what is computed how often."""

import dataclasses
import json
import pickle

import pytest
from click.testing import CliRunner

from retention_bench import facts
from retention_bench.cli import main
from retention_bench.errors import UsageError
from retention_bench.pipeline import Bench, Cell, load_suite, plan
from retention_bench.pipeline.plan_file import read_plan, write_plan
from retention_bench.pipeline.stages import STAGES, knowledge
from retention_bench.store import Store
from tools.atlas.world import told_facts


@pytest.fixture(scope="module")
def planned(small_suite):
    cell = Cell(load_suite(str(small_suite)), None, "alphaedit", "tulu3", 0, "cpu", paraphrases=1, track_every=2)
    return plan(cell)


def test_a_stage_comes_behind_all_that_it_needs_and_once(planned):
    seen = set()
    for stage in planned.plan():
        assert {need.key for need in stage.needs} <= seen
        assert stage.key not in seen
        seen.add(stage.key)
    assert [s.name for s in planned.plan()].count("knowledge") == 1
    assert planned.plan()[-1] is planned


def test_a_plan_comes_back_from_json_and_from_a_pickle_with_the_same_keys(planned, tmp_path):
    write_plan(planned, tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json", STAGES)
    assert list(again) == [stage.key for stage in planned.plan()]
    assert [s.title() for s in again.values()] == [s.title() for s in planned.plan()]
    assert again[planned.key].reads == planned.reads
    assert pickle.loads(pickle.dumps(planned)).key == planned.key


def test_a_plan_that_was_changed_is_refused(planned, tmp_path):
    path = tmp_path / "plan.json"
    write_plan(planned, path)
    entries = json.loads(path.read_text())
    found = next(key for key, entry in entries.items() if entry["stage"] == "facts")
    for change, says in (
        ({"seed": 1}, "makes the key"),
        ({"seed": "x"}, "seed: "),
        ({"more": 1}, "differ in 'more'"),
        ({"knowledge": "0" * 32}, "has no such stage"),
    ):
        values = {**entries[found]["values"], **change}
        path.write_text(json.dumps({**entries, found: {"stage": "facts", "values": values}}))
        with pytest.raises(Exception, match=says) as refused:
            read_plan(path, STAGES)
        assert "\n" not in str(refused.value)
    path.write_text(json.dumps({found: {"stage": "fact", "values": {}}}))
    with pytest.raises(UsageError, match="there is no stage 'fact'"):
        read_plan(path, STAGES)


def test_where_things_lie_and_what_they_are_called_is_no_part_of_a_key(planned):
    edit = planned.experiments[0].edit
    moved = dataclasses.replace(edit.model, path="/elsewhere")
    assert dataclasses.replace(edit, model=moved, called=("x", "y")).key == edit.key
    assert dataclasses.replace(edit, seed=9).key != edit.key


def test_a_second_seed_does_not_ask_the_base_model_about_the_pool_again(small_suite, tmp_path, monkeypatch):
    asked = []

    def counted(model, tokenizer, some, **given):
        asked.append(len(some))
        return facts.knowledge(model, tokenizer, some, **given)

    monkeypatch.setattr(knowledge, "knowledge", counted)
    suite = load_suite(str(small_suite))
    bench = Bench(Store(tmp_path))
    for seed in (0, 1):
        bench.get(plan(Cell(suite, None, "ft", "tulu3", seed, "cpu")).base.facts)
    assert asked == [len(told_facts())]
    # Nor does a fine-tune that teaches what the base model does not know, where its data are the same.
    cell = Cell(suite, None, "ft", "counterfact", 0, "cpu")
    source = suite.facts.source
    for model in suite.models.values():
        model.finetunes["counterfact"] = {**model.finetunes["counterfact"], "source": source}
    unknown = plan(cell).tuned_control.unknown
    assert unknown.knowledge.key == plan(cell).base.facts.knowledge.key


def test_one_stage_is_computed_by_its_key_in_a_process_of_its_own(small_suite, tmp_path, monkeypatch):
    monkeypatch.setenv("RETENTION_BENCH_STORE", str(tmp_path / "store"))
    path = tmp_path / "plan.json"
    words = ["evaluate", "--editor", "ft", "--finetune", "tulu3", "--suite", str(small_suite), "--plan", str(path)]
    assert CliRunner().invoke(main, [*words, "--device", "cpu", "--out", str(tmp_path / "out")]).exit_code == 0
    assert not (tmp_path / "store").exists()
    key = next(key for key, entry in json.loads(path.read_text()).items() if entry["stage"] == "facts")
    done = CliRunner().invoke(main, ["stage", str(path), key[:12], "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "store" / "facts" / key)
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["facts", "knowledge"]
    assert CliRunner().invoke(main, ["stage", str(path), "nothing"]).exit_code == 2


def test_a_plan_with_a_stage_of_another_kind_in_its_place_is_refused(planned, tmp_path):
    path = tmp_path / "plan.json"
    write_plan(planned, path)
    entries = json.loads(path.read_text())
    keys = {entry["stage"]: key for key, entry in entries.items()}
    entries[keys["results"]]["values"]["base"] = keys["facts"]
    path.write_text(json.dumps(entries))
    with pytest.raises(UsageError, match="base: the plan has no such stage"):
        read_plan(path, STAGES)
