import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

import retention_bench as rb
from retention_bench.analysis import survival
from retention_bench.cli import main
from retention_bench.display.results import print_results
from retention_bench.editors import EditRequest
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import FactSet
from retention_bench.pipeline import Bench, Cell, load_suite, plan, run
from retention_bench.pipeline.stages import paraphrases as paraphrasing
from retention_bench.results import Results, Run, Sample, aggregate
from retention_bench.store import Store
from retention_bench.store.output import exclusive


def evaluate(asked, **given):
    """What `results.json` holds."""
    return run.evaluate(asked, **given).to_dict()


def cell(suite, editor="alphaedit", model=None, seed=0, **settings):
    return Cell(load_suite(str(suite)), model, editor, "tulu3", seed, "cpu", **settings)


@pytest.fixture(scope="module")
def finished(small_suite, tmp_path_factory):
    """A cell that was run once: its store, its output folder and its results."""
    root = tmp_path_factory.mktemp("run")
    store = Store(root / "store")
    results = evaluate(cell(small_suite), store=store, out=root / "out", save_checkpoints=True)
    return store, root / "out", results


def test_results_hold_to_the_contract(finished):
    _, out, results = finished
    assert json.loads((out / "results.json").read_text()) == results
    assert set(results["stages"]) == {"base", "post_edit", "post_finetune", "control_finetune"}
    totals = {stage: {kind: r["total"] for kind, r in kinds.items()} for stage, kinds in results["stages"].items()}
    # two edited models of three facts each; every one of them is asked all twelve intrinsic facts
    assert totals["base"]["edited"] == totals["post_edit"]["edited"] == 6
    assert (totals["base"]["intrinsic"], totals["post_edit"]["intrinsic"]) == (12, 24)
    assert results["stages"]["base"]["intrinsic"]["rate"] == 1.0  # the known-fact filter let them in
    assert [len(e["edited"]) for e in results["experiments"]] == [3, 3]
    assert results["control"]["finetune_log"]["stopped_by"] == "budget"
    assert results["learned"] is False  # so few steps teach nothing, and it is said
    assert all("6 steps of its budget" in why for why in results["not_learned"])
    assert "stand-in" in results["notice"]
    assert results["provenance"]["facts_sha256"] == FactSet.read(out / "facts.jsonl").sha256


def test_every_aggregate_follows_from_the_samples(finished):
    _, out, results = finished
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    logs = [*(e["finetune_log"] for e in results["experiments"]), results["control"]["finetune_log"]]
    matched, steps = (
        [json.loads(line) for line in (out / file).read_text().splitlines()]
        for file in ("step_matched.jsonl", "trajectory.jsonl")
    )
    again = aggregate([Run([Sample.model_validate(row) for row in rows], logs, matched)])
    typed = Results.model_validate(results)
    assert all(getattr(typed, name) == found for name, found in vars(again).items())
    assert survival(steps).to_json() == results["survival"]
    assert (out / "survival.svg").read_text().startswith("<?xml")
    assert {
        "relation",
        "strict",
        "whole",
        "outcome",
        "experiment",
        "stage",
        "kind",
        "fact_id",
        "prompt",
        "target",
        "hit",
        "token_ids",
        "text",
        "logprob",
    } == set(rows[0])


def test_the_same_cell_again_comes_from_the_store(finished, small_suite, tmp_path):
    store, out, _ = finished
    titles = []
    evaluate(
        cell(small_suite), store=store, out=tmp_path, announce=lambda title, cached: titles.append((title, cached))
    )
    assert titles == [("gather the results", True)]
    assert (tmp_path / "results.json").read_bytes() == (out / "results.json").read_bytes()


def test_the_results_say_what_the_contamination_filter_took_out(finished, small_suite, tmp_path, capsys):
    _, _, results = finished
    logs = [*(e["finetune_log"] for e in results["experiments"]), results["control"]["finetune_log"]]
    for log in logs:
        removed = {"seen": 96, "removed": 0, "samples": [], "terms": {}, "common": []}
        kinds = {"subject": 0, "subject_without_number": 0, "object": 0, "keyword": 0}
        assert log["removed"] == removed | {"by_kind": kinds}
    print_results(results, tmp_path, real=None)
    line = (
        "Rows of the fine-tune's data left out, since they mention a fact: 0 of 96 (subject 0, subject without number "
    )
    assert capsys.readouterr().out.count(f"{line}0, object 0, keyword 0; a row may count for several).") == 1


def test_keywords_from_prompts_reach_the_fine_tune_s_filter(finished, small_suite, tmp_path):
    suite = load_suite(str(small_suite), {"facts.keywords": "auto", "finetunes.tulu3.train_size": 4000})
    with pytest.raises(RetentionBenchError, match=r"4000 rows; [1-9]\d* of them mention an edited or intrinsic fact"):
        evaluate(dataclasses.replace(cell(small_suite), suite=suite), store=finished[0], out=tmp_path)


def test_another_editor_shares_the_facts_and_the_control(finished, small_suite):
    store, _, _ = finished
    stages = plan(cell(small_suite, editor="ft")).plan()
    kept = {s.title() for s in stages if store.find(s)}
    assert {
        "what the base model knows",
        "known-fact filter and split",
        "score the base model",
        "tulu3 fine-tune, unedited control",
        "score the control",
    } == kept


def test_a_seed_or_a_setting_changes_the_keys_it_should(small_suite, tmp_path):
    first, other = (plan(cell(small_suite, seed=s)) for s in (0, 1))
    assert first.base.facts.key != other.base.facts.key
    assert first.base.facts.knowledge.key == other.base.facts.knowledge.key
    assert first.experiments[0].edit.covariance.key == other.experiments[0].edit.covariance.key


def finetune_keys(planned):
    return [stage.key for stage in planned.finetunes]


def test_what_is_trained_changes_the_fine_tunes_and_no_edit(small_suite, tmp_path):
    plans = [plan(cell(small_suite))]
    plans += [plan(cell(small_suite, freeze=freeze)) for freeze in ("edited", "below:2")]
    plans += [plan(cell(small_suite, adapter="lora")), plan(cell(small_suite, track_every=3))]
    assert len({planned.experiments[0].edit.key for planned in plans}) == 1
    keys = [finetune_keys(planned) for planned in plans]
    assert len({key for own in keys for key in own}) == 3 * len(plans)
    # Of an unedited model, "edited" means what the editor of the cell edits.
    controls = [
        [plan(cell(small_suite, editor=e, freeze=freeze)).tuned_control for e in ("ft", "alphaedit")]
        for freeze in ("below:2", "edited")
    ]
    assert [a.key == b.key for a, b in controls] == [True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"freeze": "abve:2"}, "'abve:2' is not known. Allowed: none"), ({"adapter": "lora2"}, "'lora2'.*'lora'")],
)
def test_what_cannot_be_trained_is_refused_before_anything_runs(small_suite, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        plan(cell(small_suite, **settings))


def test_edited_layers_can_be_kept_and_the_facts_followed(finished, small_suite, tmp_path, capsys):
    store, _, _ = finished
    planned = cell(small_suite, freeze="edited", track_every=3)
    results = evaluate(planned, store=store, out=tmp_path, save_checkpoints=True)
    assert (results["freeze"], results["adapter"]) == ("edited", "none")
    logs = [e["finetune_log"] for e in results["experiments"]] + [results["control"]["finetune_log"]]
    assert all(log["trained_layers"] == list(range(2, 8)) for log in logs)  # AlphaEdit writes into layers 0 and 1
    for before, after in [("post_edit-0", "post_finetune-0"), ("base", "control_finetune")]:
        old, new = (load_file(tmp_path / "checkpoints" / name / "model.safetensors") for name in (before, after))
        for name, tensor in old.items():
            assert torch.equal(tensor, new[name]) is (".h.0." in name or ".h.1." in name), name

    rows = [json.loads(line) for line in (tmp_path / "trajectory.jsonl").read_text().splitlines()]
    assert {(row["experiment"], row["step"]) for row in rows} == {(e, s) for e in (0, 1, None) for s in (0, 3, 6)}
    assert all(
        sum(row[name] or 0 for name in ("true", "edited", "related", "other")) == pytest.approx(1) for row in rows
    )
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for step, stage in [(0, "post_edit"), (6, "post_finetune")]:
        for kind in ("edited", "intrinsic"):
            asked = {
                (s["experiment"], s["fact_id"]): s["hit"] for s in samples if (s["stage"], s["kind"]) == (stage, kind)
            }
            seen = {(r["experiment"], r["fact_id"]): r["hit"] for r in rows if (r["step"], r["kind"]) == (step, kind)}
            assert {key: hit for key, hit in seen.items() if key[0] is not None} == asked
    first, _, last = results["trajectory"]
    assert (first["step"], last["step"], first["models"]) == (0, 6, 2)
    doses = {(row["step"], row["tokens"], row["epoch"]) for row in rows}
    assert doses == {(point["step"], point["tokens"], point["epoch"]) for log in logs for point in log["curve"]}
    relations = {fact.id: fact.relation for fact in FactSet.read(tmp_path / "facts.jsonl")}
    assert all(row["relation"] == relations[row["fact_id"]] for row in rows)
    assert first["edited"]["rate"] == results["stages"]["post_edit"]["edited"]["rate"]
    assert last["intrinsic"]["rate"] == results["stages"]["post_finetune"]["intrinsic"]["rate"]
    print_results(results, tmp_path, real=None)
    assert "of layers 2 to 7 (--freeze edited)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_fine_tune_that_diverges_is_scored_and_marked(finished, small_suite, tmp_path):
    store, _, _ = finished
    suite = yaml.safe_load(small_suite.read_text())
    for model in suite["models"].values():
        model["finetunes"]["tulu3"] |= {"lr": 1e30}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    results = evaluate(cell(tmp_path / "suite.yaml", track_every=1), store=store, out=tmp_path / "out")
    assert results["learned"] is False
    assert all("diverged: after 2 steps the training loss is" in why for why in results["not_learned"])
    assert results["stages"]["post_finetune"]["edited"]["hits"] == 0
    last = results["trajectory"][-1]
    assert (last["step"], last["edited"]["true"], last["edited"]["hits"]) == (2, None, 0)
    for name in ("results.json", "samples.jsonl", "trajectory.jsonl"):
        assert "NaN" not in (tmp_path / "out" / name).read_text()
    print_results(results, tmp_path, real=None)


@pytest.mark.slow
def test_a_data_set_of_ones_own_needs_no_entry_in_the_suite(finished, small_suite, tmp_path):
    store, _, _ = finished
    words = ("red", "green", "blue") * 20
    rows = [{"prompt": f"Say {word}, {n}.", "completion": f" {word}"} for n, word in enumerate(words)]
    own = []
    for folder, some in (("a", rows), ("b", rows[1:])):
        path = tmp_path / folder / "own.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
        own.append(dataclasses.replace(cell(small_suite), finetune=f"path:{path}"))
    names = [plan(c).finetune for c in own]
    assert all(re.fullmatch(r"path:own\.jsonl@[0-9a-f]{8}", name) for name in names)
    assert names[0] != names[1]  # files of one name, told apart by what is in them
    results = evaluate(own[0], store=store, out=tmp_path / "out")
    assert results["finetune"] == names[0]
    assert results["control"]["finetune_log"]["train_rows"] == 60
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"dtype": "bfloat16"}, {}, "needs float32 weights, the suite has bfloat16"),
        ({}, {"freeze": "below:8"}, "leaves none of the model's 8 layers"),
    ],
)
def test_what_a_fine_tune_would_refuse_is_refused_before_the_edit(small_suite, tmp_path, change, settings, message):
    suite = yaml.safe_load(small_suite.read_text())
    for model in suite["models"].values():
        model |= change
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    with pytest.raises(UsageError, match=message):
        plan(cell(tmp_path / "suite.yaml", **settings))


def test_a_suite_has_one_editor_with_several_settings(small_suite, tmp_path):
    suite = yaml.safe_load(small_suite.read_text())
    editors = suite["models"]["atlas-gpt2"]["editors"]
    editors["same"] = editors["ft"] | {"editor": "ft"}
    editors["slow"] = editors["ft"] | {"editor": "ft", "lr": 1e-5}
    editors["ft"] |= {"editor": "ft"}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    ft, same, slow = (plan(cell(path, editor=name)) for name in ("ft", "same", "slow"))
    edits = [p.experiments[0].edit for p in (ft, same, slow)]
    assert [edit.settings["lr"] for edit in edits] == [1e-3, 1e-3, 1e-5]
    # The edit is the same whatever its name, the results carry the name.
    assert ft.experiments[0].edit.inputs == same.experiments[0].edit.inputs
    assert ft.experiments[0].edit.inputs["editor"] == slow.experiments[0].edit.inputs["editor"] == "ft"
    assert len({p.key for p in (ft, same, slow)}) == 3
    assert slow.experiments[0].edit.title() == "slow edit, model 1 of 2"
    plain = plan(cell(small_suite, editor="ft"))
    assert plain.experiments[0].edit.inputs == ft.experiments[0].edit.inputs


def test_paraphrases_change_only_the_keys_that_they_should(small_suite, tmp_path):

    def keys(**given):
        planned = plan(dataclasses.replace(cell(small_suite), **given))
        return {s.title(): s.key for s in planned.plan()}

    without = keys()
    assert keys(paraphrase_source="template") == without
    own, three, template = (
        keys(paraphrases=n, paraphrase_source=s) for n, s in ((2, "own"), (3, "own"), (2, "template"))
    )
    same = {
        "what the base model knows",
        "known-fact filter and split",
        "covariance",
        "tulu3 fine-tune, unedited control",
    }
    for some in (own, three, template):
        assert {title for title in without if some[title] == without[title]} == same
    assert len({some["alphaedit edit, model 1 of 2"] for some in (without, own, three, template)}) == 4
    assert (
        own["paraphrases for the edits, 2 a fact (own)"] != template["paraphrases for the edits, 2 a fact (template)"]
    )


def test_a_paraphrase_source_is_checked_before_anything_runs(small_suite, tmp_path):
    for source, says in (
        ("owns", "Unknown paraphrase source 'owns'. Did you mean 'own'"),
        ("model:atlas-lama", "Unknown model 'atlas-lama'. Did you mean 'atlas-llama'"),
    ):
        asked = dataclasses.replace(cell(small_suite), paraphrases=1, paraphrase_source=source)
        with pytest.raises(UsageError, match=says):
            plan(asked)


def test_a_model_that_writes_is_a_part_of_the_key_and_gets_the_edited_facts(
    finished, small_suite, tmp_path, monkeypatch
):
    store, _, _ = finished
    asked = dataclasses.replace(cell(small_suite), paraphrases=2, paraphrase_source="model:atlas-llama")
    planned = plan(asked)
    assert planned.base.paraphrases.shown == "model:atlas-llama"
    folder = load_suite(str(small_suite)).models["atlas-llama"].path
    assert "model.safetensors" in planned.base.paraphrases.writer.fingerprint["files"]
    by_folder = plan(dataclasses.replace(asked, paraphrase_source=f"model:{folder}"))
    assert by_folder.base.paraphrases.inputs == planned.base.paraphrases.inputs

    def write(facts, count, source, **given):
        assert [f.target_new is not None for f in facts] == [True] * 6
        loads = given["load"].keywords
        assert (count, source, loads["device"], loads["dtype"]) == (2, f"model:{folder}", "cpu", torch.float32)
        raise RetentionBenchError("Fact 'x': too few")

    monkeypatch.setattr(paraphrasing, "augment", write)
    with pytest.raises(RetentionBenchError, match="Fact 'x': too few"):
        evaluate(asked, store=store, out=tmp_path)


def test_facts_are_not_asked_in_the_words_they_were_edited_with(finished, small_suite, tmp_path, monkeypatch, capsys):
    store, out, without = finished
    seen = []
    make = EditRequest.from_fact
    monkeypatch.setattr(EditRequest, "from_fact", lambda fact, given: seen.append(make(fact, given)) or seen[-1])
    one_model = tmp_path / "suite.yaml"
    suite = yaml.safe_load(small_suite.read_text())
    suite["models"]["atlas-gpt2"]["editors"]["ft"]["edits_per_model"] = 6
    one_model.write_text(yaml.safe_dump(suite))
    asked = dataclasses.replace(cell(one_model, editor="ft"), paraphrases=4)
    titles = []
    ahead = Bench(store).ahead(plan(asked))
    results = evaluate(
        asked,
        store=store,
        out=tmp_path / "out",
        announce=lambda title, cached: titles.append(title),
        save_checkpoints=True,
    )
    assert titles[:3] == [
        "known-fact filter and split", "paraphrases for the edits, 4 a fact (own)", "score the base model"
    ]  # fmt: skip
    assert len(titles) == len(set(titles)) == ahead + 4  # and the four checkpoints
    facts = FactSet.read(tmp_path / "out" / "facts.jsonl")
    assert facts == FactSet.read(out / "facts.jsonl")  # whole, whatever is asked
    assert [[p.replace("{}", r.subject) for p in r.paraphrases] for r in seen] == [
        list(f.paraphrases) for f in facts.edited
    ]
    assert (results["paraphrases"], results["paraphrase_source"]) == (4, "own")
    assert results["paraphrase_questions"] == {"asked": 0, "used_by_edits": 24}
    assert all("paraphrase" not in kinds for kinds in results["stages"].values())
    for name in ("base", "post_edit-0", "post_finetune-0", "control_finetune"):
        left = FactSet.read(tmp_path / "out" / "checkpoints" / name / "facts.jsonl")
        assert not any(fact.paraphrases for fact in left.edited)
    print_results(results, tmp_path, real="gpt2-xl")
    said = capsys.readouterr().out
    assert "Each fact was edited with 4 more prompts (own)." in said
    assert "none is left to ask." in said
    assert "--paraphrases 4 --paraphrase-source own" in said

    assert (without["paraphrases"], without["paraphrase_source"]) == (0, None)
    assert without["paraphrase_questions"] == {"asked": 24, "used_by_edits": 0}


def test_checkpoints_are_whole_models_with_their_facts(finished):
    from retention_bench.models import load_model
    from retention_bench.scoring import score

    _, out, results = finished
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["base", "control_finetune", "post_edit-0", "post_edit-1", "post_finetune-0", "post_finetune-1"]
    folder = out / "checkpoints" / "post_finetune-1"
    samples = score(*load_model(folder), FactSet.read(folder / "facts.jsonl"))
    for kind, rate in results["experiments"][1]["stages"]["post_finetune"].items():
        hits = [s.hit for s in samples if s.kind == kind]
        assert (sum(hits), len(hits)) == (rate["hits"], rate["total"])


def test_an_output_folder_in_use_is_refused_before_anything_runs(small_suite, tmp_path):
    from retention_bench.store.output import exclusive

    with exclusive(tmp_path / "out", "evaluate"), pytest.raises(RetentionBenchError, match="in use by another run"):
        evaluate(cell(small_suite), store=Store(tmp_path / "store"), out=tmp_path / "out")
    assert not (tmp_path / "store").exists()


def test_a_model_of_an_unknown_family_is_refused_in_one_line(small_suite, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(RetentionBenchError, match="bert"):
        evaluate(cell(small_suite, model=str(folder)), store=Store(tmp_path / "store"), out=tmp_path / "out")


def test_a_setting_that_an_editor_does_not_have_is_refused(small_suite, tmp_path):
    text = small_suite.read_text().replace("nullspace_threshold", "nullspace_treshold")
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(UsageError, match="nullspace_treshold"):
        plan(cell(tmp_path / "wrong.yaml"))


@pytest.mark.slow
def test_a_run_killed_three_times_in_its_fine_tunes_ends_with_the_same_results(finished, small_suite, tmp_path):
    store, out, undisturbed = finished
    command = [
        sys.executable, "-m", "retention_bench.cli", "evaluate", "--editor", "alphaedit", "--finetune", "tulu3",
        "--suite", str(small_suite), "--device", "cpu", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    env = os.environ | {"RETENTION_BENCH_STORE": str(tmp_path / "store")}
    tunes = tmp_path / "store" / "finetune"
    waits = [random.uniform(0, 4) for _ in range(3)]  # other moments each time
    for done, wait in enumerate(waits):  # into the fine-tune of an edited model, of the other, of the control
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        deadline = time.monotonic() + 180
        while not (len(list(tunes.glob("*/manifest.json"))) == done and list(tunes.glob("*.work"))):
            assert time.monotonic() < deadline, "the fine-tune never began"
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        finish_one(command, env, tunes, done + 1)
    subprocess.run(command, env=env, check=True, capture_output=True)
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    for volatile in ("timing",):
        again.pop(volatile), undisturbed.pop(volatile)
    assert again == undisturbed, waits
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == (Path(out) / "samples.jsonl").read_bytes()
    ours = {path.parent.parent.name: path for path in tunes.glob("*/model/model.safetensors")}
    assert len(ours) == 3
    for key, path in ours.items():
        assert path.read_bytes() == (store.root / "finetune" / key / "model" / "model.safetensors").read_bytes()


def finish_one(command, env, tunes, count):
    """Run on until so many fine-tunes are done, then kill again."""
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 180
    while len(list(tunes.glob("*/manifest.json"))) < count:
        assert time.monotonic() < deadline, "the fine-tune never ended"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("new", "says"),
    [("the {new}", "stop word"), ("{true}", "the same first content token"), ("{true} Republic", "the same first")],
)
def test_facts_that_the_metric_cannot_tell_are_refused_with_that_reason(small_suite, tmp_path, new, says):
    def spoilt(row):
        return row | {"target_new": new.format(new=row["target_new"], true=row["target_true"])}

    path, rows = with_facts(small_suite, tmp_path, spoilt)
    with pytest.raises(RetentionBenchError, match=f"can be scored: {len(rows):,} facts are left out .*{says}"):
        evaluate(cell(path), store=Store(tmp_path / "store"), out=tmp_path / "out")


def test_facts_that_the_metric_cannot_tell_are_left_out_counted_and_named(small_suite, tmp_path):
    def every_third_spoilt(row):
        return row | {"target_new": row["target_true"]} if int(row["id"][-3:]) % 3 == 0 else row

    path, rows = with_facts(small_suite, tmp_path, every_third_spoilt)
    out = tmp_path / "out"
    results = evaluate(cell(path), store=Store(tmp_path / "store"), out=out)
    spoilt = [row["id"] for row in rows if row["target_new"] == row["target_true"]]
    [(why, found)] = results["facts"]["left_out"].items()
    assert "same first content token" in why
    assert found == {"facts": len(spoilt), "first": spoilt[:10]}
    assert not {fact.id for fact in FactSet.read(out / "facts.jsonl")} & set(spoilt)


def with_facts(suite_path, tmp_path, change):
    """A suite whose facts are changed, and their rows."""
    suite = yaml.safe_load(suite_path.read_text())
    rows = [change(json.loads(line)) for line in Path(suite["facts"]["source"]).read_text().splitlines()]
    source = tmp_path / "facts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite["facts"]["source"] = str(source)
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    return path, rows


# What becomes of a finished cell's files


@pytest.fixture(scope="module")
def micro(small_suite, tmp_path_factory):
    """A cell of seconds that was run: the cell, its store and its results."""
    root = tmp_path_factory.mktemp("micro")
    suite = yaml.safe_load(small_suite.read_text())
    rows = Path(suite["facts"]["source"]).read_text().splitlines(keepends=True)
    (root / "facts.jsonl").write_text("".join(random.Random(0).sample(rows, 40)))
    suite["facts"] |= {"source": str(root / "facts.jsonl"), "edited": 2, "intrinsic": 3}
    settings = suite["models"]["atlas-gpt2"]
    settings["editors"]["ft"] |= {"edits_per_model": 2, "num_steps": 3}
    settings["finetunes"]["tulu3"] |= {"train_size": 16, "validation_size": 4, "batch_size": 8, "max_steps": 2}
    settings["finetunes"]["tulu3"] |= {"eval_every": 1, "max_length": 48, "micro_batch_size": 8}
    (root / "suite.yaml").write_text(yaml.safe_dump(suite))
    asked, store = cell(root / "suite.yaml", editor="ft", track_every=1), Store(root / "store")
    results = evaluate(asked, store=store, out=root / "out")
    return asked, store, results


def test_the_api_and_the_command_line_give_the_same_results(micro, tmp_path, monkeypatch):
    _asked, store, results = micro
    suite = str(store.root.parent / "suite.yaml")
    same = {"editor": "ft", "finetune": "tulu3", "suite": suite, "device": "cpu", "track_every": 1}
    ours = rb.evaluate(**same, out=tmp_path / "api", store=tmp_path / "store", quiet=True)
    assert timeless(ours.to_dict()) == timeless(results)
    monkeypatch.setenv("RETENTION_BENCH_STORE", str(tmp_path / "store"))
    words = [f"--{name.replace('_', '-')}={value}" for name, value in same.items()]
    done = CliRunner().invoke(main, ["evaluate", *words, "--out", str(tmp_path / "cli")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "cli" / "results.json").read_bytes() == (tmp_path / "api" / "results.json").read_bytes()


def test_results_are_saved_read_and_tabled(finished, tmp_path):
    _, out, results = finished
    found = rb.Results.load(out)
    found.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (out / "results.json").read_bytes()
    assert rb.Results.load(tmp_path / "again.json") == found
    table = found.to_frame()
    [row] = table[table.experiment.isna() & (table.stage == "post_edit") & (table.kind == "edited")].itertuples()
    assert (row.hits, row.total, row.low) == (
        *(results["stages"]["post_edit"]["edited"][name] for name in ("hits", "total")),
        results["stages"]["post_edit"]["edited"]["ci95"][0],
    )
    assert set(rb.Results.model_json_schema()["required"]) <= set(results)


def flipped(path, data):
    path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])


def linked(path, data):
    target = path.parents[2] / "elsewhere"
    target.write_bytes(data)
    path.unlink()
    path.symlink_to(target)


DAMAGE = {
    "flipped": flipped,
    "truncated": lambda path, data: path.write_bytes(data[:-2]),
    "emptied": lambda path, data: path.write_bytes(b""),
    "deleted": lambda path, data: path.unlink(),
    "replaced by a link": linked,
}


def files_of(store, planned):
    """All files of all stages, by stage."""
    folders = {s.title(): store.find(s) for s in planned.plan()}
    return {title: sorted(p for p in folder.rglob("*") if p.is_file()) for title, folder in folders.items()}


def timeless(results):
    return {name: value for name, value in results.items() if name != "timing"}


@pytest.mark.parametrize("every_way", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_whatever_becomes_of_a_file_of_a_finished_cell_is_said_and_changes_no_result(
    micro, tmp_path, caplog, every_way
):
    asked, store, results = micro
    planned = plan(asked)
    stages = files_of(store, planned)
    assert len(stages) == 10
    ways = itertools.cycle(DAMAGE)  # each file in its own way, or in all
    count = 0
    for title, paths in list(stages.items())[:-1]:  # the results themselves are gathered again below
        folder = store.root / paths[0].relative_to(store.root).parents[-3]
        for path in paths:
            for kind in DAMAGE if every_way else [next(ways)]:
                count += 1
                data = path.read_bytes()
                DAMAGE[kind](path, data)
                caplog.clear()
                again = evaluate(asked, store=store, out=tmp_path / "out")
                assert again == results
                assert f"{path.relative_to(folder)}" in caplog.text, (title, path.name, kind)
                assert "\n" not in caplog.messages[0]
                assert not folder.exists()
                aside = max(
                    folder.parent.glob(f"{folder.name}.damaged-*"), key=lambda p: int(p.name.rpartition("-")[2])
                )
                aside.rename(folder)
                path.unlink(missing_ok=True)
                path.write_bytes(data)
    assert count >= (125 if every_way else 25)


ROUNDS = [
    ("known-fact filter and split", "facts.jsonl", "flipped"),
    ("score the base model", "samples.jsonl", "truncated"),
    ("ft edit, model 1 of 1", "delta.safetensors", "flipped"),
    ("gather the results", "results.json", "emptied"),
    ("tulu3 fine-tune, model 1 of 1", "log.json", "deleted"),
]
ALL = [
    *((title, name, kind) for title, name, _ in ROUNDS for kind in DAMAGE),
    *(("tulu3 fine-tune, unedited control", "model/model.safetensors", kind) for kind in DAMAGE),
    *(("tulu3 fine-tune, model 1 of 1", "trajectory.jsonl", kind) for kind in DAMAGE),
    *(("gather the results", name, kind) for name in ("samples.jsonl", "trajectory.jsonl") for kind in DAMAGE),
]


@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_what_is_damaged_and_read_is_computed_again_to_the_same_results(micro, tmp_path, caplog, rounds):
    asked, store, results = micro
    planned = plan(asked)
    stages = {stage.title(): stage for stage in planned.plan()}
    names = [stage.name for stage in planned.plan()]
    for title, name, kind in rounds:
        stage = stages[title]
        folder = store.find(stage)
        DAMAGE[kind](folder / name, (folder / name).read_bytes())
        for after in planned.plan()[names.index(stage.name) + 1 :]:
            if after.name in ("score", "results") and after is not stage:
                shutil.rmtree(store.place(after))
        caplog.clear()
        again = evaluate(asked, store=store, out=tmp_path / "out")
        assert timeless(again) == timeless(results), (title, name, kind)
        assert f"is damaged: {name}" in caplog.text
        assert store.find(stage) == folder


def test_data_that_is_replaced_while_an_earlier_stage_runs_stops_the_run(micro, tmp_path):
    asked = micro[0]
    source = tmp_path / "chats.jsonl"
    rows = [json.dumps({"prompt": f"Say {n}.", "completion": f" {n}"}) + "\n" for n in range(60)]
    source.write_text("".join(rows))
    asked = dataclasses.replace(asked, finetune=f"path:{source}", track_every=None)
    store = Store(tmp_path / "store")

    def replace(title, cached):
        if title == "score the base model":
            source.write_text("".join(rows[::-1]))

    with pytest.raises(RetentionBenchError, match=r"chats\.jsonl was changed while the run went on"):
        evaluate(asked, store=store, out=tmp_path / "out", announce=replace)
    assert list((store.root / "score").glob("*/manifest.json"))
    assert not list((store.root / "finetune").glob("*/manifest.json"))


def test_a_model_that_is_replaced_before_its_checkpoints_are_written_stops_the_run(micro, tmp_path):
    asked, store, results = micro
    suite = yaml.safe_load((store.root.parent / "suite.yaml").read_text())
    settings = suite["models"]["atlas-gpt2"]
    shutil.copytree(settings["path"], tmp_path / "model")
    settings["path"] = str(tmp_path / "model")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    asked = dataclasses.replace(asked, suite=load_suite(str(tmp_path / "suite.yaml")))
    said = []

    def replace(title, cached):
        said.append(title)
        file = tmp_path / "model" / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "max_length": 9}))

    with pytest.raises(RetentionBenchError, match=r"generation_config\.json was changed while the run went on"):
        evaluate(asked, store=store, out=tmp_path / "out", announce=replace, save_checkpoints=True)
    assert said == ["gather the results"]
    assert not list((tmp_path / "out" / "checkpoints").iterdir())
    assert timeless(json.loads((tmp_path / "out" / "results.json").read_text())) == timeless(results)


# Output folders


@pytest.mark.parametrize("name", ["facts.jsonl", "notes.txt"])
def test_an_output_folder_that_is_not_ours_is_refused_before_anything_runs(micro, tmp_path, name):
    asked, *_ = micro
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"holds {name}.*--out"):
        evaluate(asked, store=Store(tmp_path / "store"), out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_checkpoints_that_could_not_be_written_are_refused_before_anything_runs(micro, tmp_path, monkeypatch):
    asked, *_ = micro
    with exclusive(tmp_path / "out", "evaluate"):  # marks it as ours
        (tmp_path / "out" / "checkpoints").mkdir()
    monkeypatch.setattr(run.os, "access", lambda path, mode: False)  # tests may run as root, who may do all
    with pytest.raises(UsageError, match="checkpoints may not be written"):
        evaluate(asked, store=Store(tmp_path / "store"), out=tmp_path / "out", save_checkpoints=True)
    assert not (tmp_path / "store").exists()


def test_a_checkpoint_that_is_not_ours_is_neither_deleted_nor_overwritten(micro, tmp_path):
    asked, store, _ = micro
    out = tmp_path / "out"
    for _ in range(2):  # what we wrote ourselves is replaced
        evaluate(asked, store=store, out=out, save_checkpoints=True)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "base", "control_finetune", "post_edit-0", "post_finetune-0"
    ]  # fmt: skip
    (out / "checkpoints" / "base" / "notes.txt").write_text("mine")
    weights = out / "checkpoints" / "post_edit-0" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])  # trained on, and saved in its place
    for name in ("base", "post_edit-0"):
        with pytest.raises(UsageError, match=f"checkpoints/{name} would be replaced.*Move it away"):
            evaluate(asked, store=Store(tmp_path / "store"), out=out, save_checkpoints=True)
        (out / "checkpoints" / name).rename(tmp_path / name)
    assert (tmp_path / "base" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "store").exists()
    evaluate(asked, store=store, out=out, save_checkpoints=True)
