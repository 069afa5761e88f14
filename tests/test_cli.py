import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import retention_bench
from retention_bench.cli import main
from retention_bench.errors import RetentionBenchError
from retention_bench.pipeline import Cell, load_suite, plan
from retention_bench.pipeline.folder import default_folder
from retention_bench.pipeline.suite import PACKAGED


def run(*words, env=None):
    return CliRunner().invoke(main, list(words), env=env)


def test_help_is_quick_and_loads_no_model_library():
    heavy = ("torch", "transformers", "vllm", "rich")
    code = f"import sys, retention_bench.cli; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    best = 9.9
    for _ in range(5):  # the best of five: other work on the machine is not ours to judge
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "retention_bench.cli", "--help"], capture_output=True, check=True)
        best = min(best, time.monotonic() - began)
    assert best < 0.4


@pytest.mark.parametrize(
    ("command", "line"),
    [("compare", "FILE:CHECKPOINT   one of them")],
)
def test_the_forms_of_a_command_stand_on_lines_of_their_own(command, line):
    lines = [" ".join(told.split()) for told in run(command, "--help").output.splitlines()]
    assert any(told.startswith(" ".join(line.split())) for told in lines)


@pytest.mark.parametrize(("what", "one"), [("editors", "alphaedit"), ("finetunes", "tulu3"), ("suites", "atlas")])
def test_what_there_is_can_be_listed(what, one):
    assert one in run("list", what).output.split()
    listed = json.loads(run("list", what, "--json").output)
    assert one in (listed if what == "suites" else [entry["name"] for entry in listed])


@pytest.fixture
def own_suite(tmp_path):
    """Suite atlas with two more names for FT on one of its models, and one for an editor that there is not."""
    suite = yaml.safe_load((PACKAGED / "atlas.yaml").read_text())
    editors = suite["models"]["atlas-gpt2"]["editors"]
    editors["ft-paper"] = {"editor": "ft", "lr": 5e-5}
    editors["ft-l"] = editors["ft"] | {"editor": "ft", "norm_constraint": 1e-3}
    editors["wrong"] = {"editor": "ftt"}
    editors["romee"] = {}
    del editors["lora"]
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(suite).replace("../atlas/", f"{PACKAGED.parent / 'atlas'}/"))
    return str(path)


def test_a_suites_editors_are_listed_by_the_name_they_go_by(own_suite):
    lines = run("list", "editors", "--suite", own_suite).output.splitlines()
    assert {"alphaedit", "ft", "lora", "  ft", "  ft-paper (ft)", "  ft-l (ft)"} <= set(lines)
    assert f"suite {own_suite}, model atlas-llama:" in lines
    listed = json.loads(run("list", "editors", "--suite", own_suite, "--json").output)
    assert listed["editors"] == json.loads(run("list", "editors", "--json").output)
    assert listed["models"]["atlas-gpt2"]["ft-paper"] == "ft"
    assert (
        listed["models"]["atlas-llama"] | {"alphaedit": "alphaedit", "r-rome": "rome"}
        == listed["models"]["atlas-llama"]
    )
    refused = run("list", "finetunes", "--suite", own_suite)
    assert refused.exit_code == 2
    assert "--suite goes with `list editors`" in refused.output


@pytest.mark.parametrize(
    ("editor", "says"),
    [
        ("ft-papr", "Unknown editor 'ft-papr'. Did you mean 'ft-paper'? Allowed: alphaedit, ft, ft-l, ft-paper"),
        ("wrong", "editors.wrong: Unknown editor 'ftt'. Did you mean 'ft'?"),
        ("romee", "editors.romee: Unknown editor 'romee'."),
    ],
)
def test_an_editor_is_looked_up_in_the_suite(own_suite, tmp_path, editor, says):
    words = ["--editor", editor, "--finetune", "tulu3", "--suite", own_suite, "--dry-run"]
    result = run("evaluate", *words, env={"RETENTION_BENCH_STORE": str(tmp_path / "s")})
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize(
    ("more", "models"),
    [
        ([], 50),  # LoRA's own default, a fact a model
        (["--set", "editors.lora.edits_per_model=25"], 2),
        (["--set", "editors.lora.edits_per_model=25", "--set", "facts.edited=75"], 3),
        (["--set", "models.atlas-gpt2.editors.lora.edits_per_model=null"], 1),
    ],
)
def test_an_editor_that_the_suite_does_not_name_has_its_own_defaults_and_what_is_set(own_suite, tmp_path, more, models):
    words = ["--editor", "lora", "--finetune", "tulu3", "--suite", own_suite, "--dry-run", "--json", *more]
    result = run("evaluate", *words, env={"RETENTION_BENCH_STORE": str(tmp_path / "s")})
    assert result.exit_code == 0, result.output
    assert sum(stage["stage"] == "edit" for stage in json.loads(result.output)["stages"]) == models


def test_what_is_set_is_checked_and_the_results_go_into_a_folder_of_their_own(tmp_path):
    words = ["--editor", "ft", "--finetune", "tulu3", "--dry-run"]
    result = run("evaluate", *words, "--set", "facts.edted=3")
    assert result.exit_code == 2
    assert "unknown key 'facts.edted'. Did you mean 'edited'?" in result.output
    cells = (
        Cell(load_suite("atlas", given), None, "ft", "tulu3", 0, "cpu")
        for given in ((), ["facts.edited=25"], {"facts.edited": 25})
    )
    plain, other, same = (default_folder(cell, plan(cell)) for cell in cells)
    assert plain == Path("runs/atlas/atlas-gpt2/ft/tulu3/seed-0")
    assert other == same != plain
    assert other.parent.name.startswith("set-")


def test_the_old_name_of_track_every_still_works():
    words = ["evaluate", "--editor", "ft", "--finetune", "tulu3", "--dry-run", "--json"]
    old, new = (run(*words, option, "30").output for option in ("--probe-every", "--track-every"))
    assert old == new != run(*words).output
    assert "--probe-every" not in run("evaluate", "--help").output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--editor", "alphaedi", "--finetune", "tulu3"], "Unknown editor 'alphaedi'. Did you mean 'alphaedit'?"),
        (["--editor", "ft", "--finetune", "tulu"], "Unknown fine-tune 'tulu'. Did you mean 'tulu3'?"),
        (["--editor", "ft", "--finetune", "tulu3", "--suite", "atlsa"], "Unknown suite 'atlsa'. Did you mean 'atlas'?"),
        (["--editor", "ft", "--finetune", "tulu3", "--model", "atlas-gpt"], "Did you mean 'atlas-gpt2'?"),
        (
            ["--editor", "ft", "--finetune", "tulu3", "--paraphrases", "2", "--paraphrase-source", "templat"],
            "Unknown paraphrase source 'templat'. Did you mean 'template'?",
        ),
        (["--editor", "ft", "--finetune", "tulu3", "--paraphrases", "-1"], "-1 is not in the range 0<=x"),
        (["--editor", "ft"], "Missing option '--finetune'"),
    ],
)
def test_a_name_that_is_not_known_is_a_usage_error_in_one_line(words, says, tmp_path):
    result = run("evaluate", *words, "--dry-run", env={"RETENTION_BENCH_STORE": str(tmp_path)})
    assert result.exit_code == 2
    assert says in result.output
    assert "Traceback" not in result.output


def test_a_dry_run_names_every_stage_and_writes_nothing(tmp_path):
    result = run(
        "evaluate",
        "--editor",
        "alphaedit",
        "--finetune",
        "tulu3",
        "--dry-run",
        "--json",
        env={"RETENTION_BENCH_STORE": str(tmp_path / "s")},
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    stages = [s["stage"] for s in told["stages"]]
    # The control is trained first: a threshold that the base model is beyond is refused before any edit is made.
    assert stages[:6] == ["knowledge", "facts", "score", "finetune", "score", "covariance"]
    assert stages[-1] == "results"
    assert {"edit", "finetune"} <= set(stages)
    assert not (tmp_path / "s").exists()
    numbers = told["estimate"]["parameters"]
    assert (told["estimate"]["finetunes"], told["estimate"]["steps"]) == (3, 180)
    assert told["estimate"]["trainable"] == numbers
    assert told["estimate"]["memory_bytes"] == 16 * numbers  # weights, gradients and Adam's two moments
    assert told["estimate"]["disk_bytes"] == (3 + 2 * 3) * 4 * numbers


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        (["--freeze", "below:7"], 543_424 + 384),  # a layer of d_model 192 and d_mlp 1,024, and the final norm
        (["--freeze", "window:0:1", "--adapter", "lora"], 16 * ((192 + 576) + (192 + 192) + 2 * (192 + 1024))),
    ],
)
def test_a_dry_run_counts_what_is_trained(tmp_path, options, trained):
    result = run(
        *["evaluate", "--editor", "alphaedit", "--finetune", "tulu3", "--dry-run", *options],
        env={"RETENTION_BENCH_STORE": str(tmp_path / "s")},
    )
    assert result.exit_code == 0, result.output
    assert f"Each trains {trained:,} of " in " ".join(result.output.split())


def test_a_facts_tokens_are_printed_step_by_step(capsys, monkeypatch):
    from retention_bench.display.trajectory import print_tokens

    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        {"experiment": e, "step": s, "fact_id": "f1", "kind": "edited", "top": [[" [red]Apple", 0.992], [" \n", 0.004]]}
        for e in (0, None)
        for s in (0, 20)
    ]
    rows[1] |= {"top": []}  # a model that diverged
    print_tokens("f1", rows)
    printed = capsys.readouterr().out
    assert "fact f1 (edited) in edited model 1" in printed
    assert "fact f1 (edited) in the unedited control" in printed
    assert printed.count("[red]Apple 0.99") == 3
    assert printed.count("' \\n' 0.00") == 3


def test_a_fact_is_not_followed_without_a_trajectory():
    result = run("evaluate", "--editor", "ft", "--finetune", "tulu3", "--probe-fact", "x", "--track-every", "off")
    assert result.exit_code == 2
    assert "--probe-fact needs the trajectory" in result.output


def test_a_horizon_and_no_trajectory_are_plans_and_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("RETENTION_BENCH_STORE", str(tmp_path))  # an empty one: all steps are to be taken
    words = ["evaluate", "--editor", "ft", "--finetune", "tulu3", "--dry-run", "--json"]
    plans = [json.loads(run(*words, *more).output) for more in ([], ["--horizon", "steps:7"], ["--track-every", "off"])]
    keys = [{stage["key"] for stage in found["stages"] if stage["stage"] == "finetune"} for found in plans]
    assert not set.intersection(keys[0], keys[1]) | set.intersection(keys[0], keys[2])
    assert [found["estimate"]["steps"] for found in plans] == [count * len(keys[0]) for count in (60, 7, 60)]
    assert json.loads(run(*words, "--horizon", "epochs:2").output)["estimate"]["steps"] is None
    assert "as many steps as their horizon takes" in " ".join(run(*words[:-1], "--horizon", "epochs:2").output.split())
    cells = (
        Cell(load_suite("atlas"), None, "ft", "tulu3", 0, "cpu", horizon=text) for text in ("threshold", "tokens:5")
    )
    folders = [default_folder(cell, plan(cell)) for cell in cells]
    assert [folder.parent.name for folder in folders] == ["tulu3", "tokens-5"]


def test_paraphrases_have_a_folder_and_a_stage_of_their_own(tmp_path, monkeypatch):
    from retention_bench.pipeline import run as running

    folders = []

    def stop(planned, *, out, **_):
        found = planned.base.paraphrases
        folders.append((out, *((found.count, found.shown) if found else (0, "own"))))
        raise RetentionBenchError("far enough")

    monkeypatch.setattr(running, "evaluate", stop)
    command = ["evaluate", "--editor", "ft", "--finetune", "tulu3", "--device", "cpu", "--seed", "3"]
    where = {"RETENTION_BENCH_STORE": str(tmp_path)}
    for more in (
        [],
        ["--paraphrases", "2"],
        ["--paraphrases", "1", "--paraphrase-source", "model:atlas-llama"],
        ["--paraphrases", "3", "--paraphrase-source", "own+template+model:atlas-llama"],
        ["--paraphrases", "3", "--paraphrase-source", "own+template", "--paraphrase-mode", "separate"],
    ):
        assert "far enough" in run(*command, *more, env=where).output
    common = Path("runs/atlas/atlas-gpt2/ft/tulu3")
    assert folders == [
        (common / "seed-3", 0, "own"),
        (common / "paraphrases-2-own" / "seed-3", 2, "own"),
        (common / "paraphrases-1-model-atlas-llama" / "seed-3", 1, "model:atlas-llama"),
        (common / "paraphrases-3-own-template-model-atlas-llama" / "seed-3", 3, "own+template+model:atlas-llama"),
        (common / "paraphrases-3-own-template-separate" / "seed-3", 3, "own+template"),
    ]
    dry = run(*command, "--paraphrases", "2", "--dry-run", "--json", env=where)
    assert [s["stage"] for s in json.loads(dry.output)["stages"]][:4] == ["knowledge", "facts", "paraphrases", "score"]


ATLAS = Path(retention_bench.__file__).parent / "atlas"


def test_a_covariance_is_measured_found_again_and_inspected(tmp_path):
    words = [
        "covariance", "measure", "--model", str(ATLAS / "models" / "atlas-gpt2"), "--layers", "0", "--device", "cpu",
        "--corpus", str(ATLAS / "data" / "corpus.jsonl.gz"), "--samples", "30", "--max-length", "64",
    ]  # fmt: skip
    env = {"RETENTION_BENCH_STORE": str(tmp_path)}
    assert "not there yet" in run(*words, "--dry-run", env=env).output
    first = run(*words, env=env)
    assert first.exit_code == 0, first.output
    file = first.stdout.strip()
    assert Path(file).is_file()
    again = run(*words, "--json", env=env)
    assert json.loads(again.stdout) == {"file": file, "in_store": True}
    assert "from the store" in again.stderr
    shown = run("covariance", "inspect", file, env=env)
    assert "the first 30 texts of corpus.jsonl.gz" in shown.stdout
    assert "below 0.02" in shown.stdout
    assert json.loads(run("covariance", "inspect", file, "--json", env=env).stdout)["texts"] == 30


def test_a_covariance_without_what_it_needs_is_a_usage_error(tmp_path):
    result = run("covariance", "measure", "--layers", "0", env={"RETENTION_BENCH_STORE": str(tmp_path)})
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: Missing option '--model'" in result.stderr


def test_the_results_fit_into_80_columns(capsys, monkeypatch, tmp_path):
    from retention_bench.display.results import print_results

    monkeypatch.setenv("COLUMNS", "80")
    rate = {"hits": 5000, "total": 5000, "rate": 1.0, "ci95": [0.99, 1.0]}
    log = {"stopped_by": "threshold", "steps": 20, "metric": "validation_loss", "value": 1.3, "threshold": 1.7}
    log |= {"trained_layers": list(range(100, 132)), "trainable_parameters": 123456789, "parameters": 1234567890}
    log |= {"dropped": {"have no messages": {"rows": 1200, "first": "line 7: [/x]"}}}
    kinds = {"subject": 12, "subject_without_number": 3, "object": 1900, "keyword": 0}
    log |= {"removed": {"seen": 12000, "removed": 1905, "by_kind": kinds}}
    seen = {"rate": 1.0, "edited": 0.5, "true": 0.25, "related": 0.125, "other": 0.125}
    difference = {"value": 0.05, "ci95": [-0.1, 0.1], "n": 5000, "clusters": 30, "detectable": 0.123}
    nats = {"value": -0.894, "ci95": [-1.3, -0.5]}
    results = {
        "editor": "alphaedit",
        "finetune": "commoncrawl",
        "model": "atlas-llama",
        "notice": "A stand-in.",
        "defaults": [],
        "paraphrases": 0,
        "stages": {
            stage: dict.fromkeys(("edited", "paraphrase", "locality", "intrinsic"), rate)
            for stage in ("base", "post_edit", "post_finetune", "control_finetune")
        },
        "gates": [{"passed": False, "text": "3 of 5000 edits took; 80 % must"}],
        "paired": {"difference": difference, "control": rate, "edited": rate},
        "paired_step_matched": None,
        "decay": {"paired": nats, "edited": nats, "control": nats, "before": {"edited": 0.95, "control": 0.4}}
        | {"clipped": 0, "no_number": 0},
        "survival": None,
        "retention": dict.fromkeys(("edited", "locality", "control_edited_true", "control_intrinsic"), rate),
        "gap": {"unmatched": difference, "matched": difference | {"value": None}},
        "lost": {"new": 0, "true": 3, "related": 4, "other": 0, "none": 0},
        "confidence": [{"low": 0.95, "high": 1.0, "edited": rate, "control": rate}],
        "collateral": {"locality": {"post_edit": difference, "post_finetune": difference}},
        "horizon": "threshold",
        "freeze": "edited",
        "adapter": "dora",
        "learned": True,
        "not_learned": [],
        "trajectory": [{"step": 12000, "models": 50, "edited": seen, "intrinsic": seen}],
        "facts": {
            "known": 1434,
            "rows": {"read": 21919, "dropped": {"nothing tells the relation": 2}},
            "left_out": {"one character": {"facts": 3, "first": ["a", "b", "c"]}},
        },
        "experiments": [{"finetune_log": log, "edit_factor": 0.4321}],
        "control": {"finetune_log": log},
    }
    print_results(results, tmp_path, real="gpt2-xl")
    printed = capsys.readouterr().out
    assert "Trained were DoRA adapters of layers 100 to 131 (--freeze edited): 123,456,789 of the" in printed
    assert "--freeze edited --adapter dora" in printed
    assert "Not ranked: 3 of 5000 edits took; 80 % must." in printed
    assert "Paired difference: +5 points (95 % interval -10 to +10)." in printed
    assert "Of 5000 facts in 30 relations that the base model knew and the edit took" in printed
    assert "Minimum detectable effect: 12 points (80 % power)." in printed
    assert "Decay in log-odds: -0.89 (-1.30 to -0.50)." in printed
    assert "Gap, unmatched (intrinsic minus edited; of other relations, the paper's gap): +5 points" in printed
    assert "The norm of each edit, as a multiple of the one it is made of: 0.43." in printed
    assert "Gap, matched" not in printed
    assert "Of 7 lost edits the answer became: true 3, related 4." in printed
    assert printed.count("Rows of the fine-tune's data left out, since they mention a fact: ") == 1
    assert (
        "1,905 of 12,000 (subject 12, subject without number 3, object 1,900, keyword 0; a row may count for several)."
        in printed
    )
    assert "Rows of the fine-tune's data; left out: 1,200 have no messages (line 7: [/x])." in printed
    followed = printed[printed.index("While training") :].partition("A stand-in.")[0].splitlines()
    assert max(len(line.rstrip()) for line in followed) <= 80
    assert "12000 50 100 % 0.50 0.25 0.12 0.12 100 % 0.25" in " ".join(printed.split())
    assert (
        "1,434 that the base model knows, of 21,919 rows read, 2 dropped (nothing tells the relation), 3 left out (one "
        "character)." in printed
    )
    table = printed[printed.index("questions") :].split("edited: the edited facts")[0].splitlines()
    assert max(len(line.rstrip()) for line in table) <= 80
    rows = [line for line in table if "5000 of 5000" in line]
    assert len(rows) == 4
    assert all(line.count("5000 of 5000") == 4 for line in rows)  # no cell is wrapped
    log |= {"stopped_by": "horizon", "horizon": "steps:40", "steps": 40, "passed_at": {"step": 15}}
    results["horizon"] = "steps:40"
    print_results(results, tmp_path, real="gpt2-xl")
    printed = capsys.readouterr().out
    assert "went on for 40 steps and passed its threshold (validation loss < 1.7) after 15." in printed
    assert "--adapter dora --horizon steps:40" in printed
    results |= {"learned": False, "not_learned": ["after the 60 steps of its budget the validation_loss was 2"]}
    print_results(results, tmp_path, real=None)
    assert "Not learned: after the 60 steps of its budget the validation loss was 2." in capsys.readouterr().out


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A working folder with one of each kind of thing, two suites and facts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETENTION_BENCH_STORE", str(tmp_path / "store"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    atlas = (PACKAGED / "atlas.yaml").read_text().replace("../atlas/", f"{PACKAGED.parent / 'atlas'}/")
    (tmp_path / "good.yaml").write_text(atlas)
    (tmp_path / "twice.yaml").write_text(atlas.replace("real: gpt2-xl", "real: gpt2-xl\nreal: llama3-8b"))
    (tmp_path / "on.yaml").write_text(atlas + "\non: 1\n")
    (tmp_path / "nul.yaml").write_text(atlas.replace("name: atlas", 'name: "a\\0b"'))
    (tmp_path / "up.yaml").write_text(atlas.replace("name: atlas", "name: ../up"))
    (tmp_path / "deep.yaml").write_text(f"a: {'[' * 20_000}{']' * 20_000}")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    (tmp_path / "many.yaml").write_text(atlas.replace("edited: 50", "edited: 1000000000"))
    (tmp_path / "latin.txt").write_bytes(b"g\xf6od\n")
    (tmp_path / "list.txt").write_text('file\n{"checkpoint": 3, "name": "x"}\n')
    facts = (PACKAGED.parent / "atlas" / "data" / "facts.jsonl").read_text().splitlines(keepends=True)[:3]
    (tmp_path / "facts.jsonl").write_text("".join(facts))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "scores.jsonl").write_text('{"run": 7}\n')
    return tmp_path


CELL = "evaluate --editor ft --finetune tulu3 --device cpu --dry-run --suite good.yaml"
LIST = "list editors --suite"
SCORE = "score --device cpu --facts facts.jsonl"
LONG = "x" * 300


@pytest.mark.parametrize(
    ("command", "more", "says", "code"),
    [
        # seeds and counts
        (CELL, ["--seed", "-1"], "'--seed': -1 is not in the range 0<=x<=4294967295", 2),
        (CELL, ["--seed", "4294967296"], "'--seed': 4294967296 is not in the range", 2),
        (CELL, ["--seed", "9" * 5000], "'--seed'", 2),
        (CELL, ["--track-every", "9" * 30], "'--track-every'", 2),
        (CELL, ["--track-every", "never"], "'--track-every'", 2),
        (CELL, ["--horizon", "days:3"], "--horizon 'days:3' is not known. Allowed: threshold, steps:N", 2),
        (CELL, ["--paraphrases", "1001"], "1001 is not in the range 0<=x<=1000", 2),
        (CELL, ["--freeze", "window:0:999999999"], "--freeze window:0:999999999", 0),
        (CELL, ["--freeze", "below:99999999999"], "--freeze 'below:99999999999' is not known", 2),
        ("covariance measure --model m --layers 0 --corpus c", ["--samples", "9" * 30], "'--samples'", 2),
        (
            "covariance measure --model m --layers 0 --corpus c",
            ["--memory", "nan"],
            "nan is not a number to count with",
            2,
        ),
        (f"{SCORE} file", ["--batch-size", "9" * 30], "'--batch-size'", 2),
        # suites
        (LIST, ["none.yaml"], "There is no suite file at none.yaml", 2),
        (LIST, ["twice.yaml"], "twice.yaml, line 9: not valid YAML: the key 'real' stands here again, after line 8", 2),
        (LIST, ["on.yaml"], "the key 'on' is no text", 2),
        (LIST, ["nul.yaml"], "a text holds a NUL", 2),
        (LIST, ["up.yaml"], "name: a name becomes a folder", 2),
        (LIST, ["deep.yaml"], "more than 50 levels", 2),
        (LIST, ["latin.yaml"], "latin.yaml, line 1: the byte 0xe9 is not UTF-8", 2),
        (LIST, ["many.yaml"], "facts.edited: Input should be less than or equal to 1000000", 2),
        (LIST, [f"{LONG}.yaml"], "File name too long", 2),
        (LIST, ["folder"], "Unknown suite 'folder'", 2),
        # names and paths
        (CELL, ["--model", LONG], "Unknown model 'xxx", 2),
        (CELL, ["--model", ""], "'--model': It is empty. Give a value, or leave the option out", 2),
        (CELL, ["--accelerate-config", " "], "'--accelerate-config': It is empty", 2),
        (CELL, ["--paraphrase-source", "nope"], "Unknown paraphrase source 'nope'", 2),
        (CELL, ["--paraphrases", "27", "--paraphrase-source", "template"], "has 26 openings, and 27 paraphrases", 2),
        (
            CELL,
            ["--track-every", "1", "--probe-fact", "city_country-00"],
            "suite: 'city_country-00'. Did you mean 'city_country-",
            2,
        ),
        ("covariance measure --model m --layers 0 --corpus", [""], "'--corpus': It is empty", 2),
        ("covariance measure --layers 0 --corpus c --model", [" "], "'--model': It is empty", 2),
        ("covariance measure --model m --layers 0 --corpus c", ["--revision", ""], "'--revision': It is empty", 2),
        ("covariance measure --layers 0 --corpus c --model", ["x" * 5000], "xxx...xxx", 2),
        (CELL, ["--model", "~nobody-of-this-name/m"], "home directory", 2),
        (CELL, ["--model", "a\0b"], "a\\x00b holds a NUL", 2),
        (CELL, ["--model", "a\udcff"], "a\\udcff holds a NUL, or bytes that are not UTF-8", 2),
        (CELL, ["--model", "folder"], "holds no model", 1),
        (CELL, ["--editor", "\x1b]0;x\x07[/b]"], "Unknown editor '\\x1b]0;x\\x07[/b]'", 2),
        (CELL, ["--finetune", "path:pipe"], "pipe", 2),
        (CELL, ["--accelerate-config", "pipe"], "pipe is a pipe or a device, where a configuration is needed", 2),
        (CELL, ["--out", "file"], "file is a file, where a folder is needed", 2),
        (CELL, ["--out", "file/below"], "file is a file", 2),
        (CELL, ["--out", "foreign"], "foreign holds scores.jsonl, and `retention-bench evaluate` did not write it", 2),
        (CELL, ["--out", "dangling"], "is a link to nothing", 2),
        (CELL, ["--out", LONG], "so long a name", 2),
        (CELL, ["--out", ""], "must not be empty", 2),
        ("covariance measure --model m --layers 0 --corpus c", ["--out", "folder"], "folder is a folder", 2),
        ("covariance measure --model m --layers 0 --corpus c", ["--out", "none/x"], "There is no folder none", 2),
        ("nothing\x1b[31m", [], "No such command 'nothing\\", 2),
        ("evaluate", ["--nothing\x1b[31m"], "No such option '--nothing\\", 2),
        # files of scores and runs
        ("compare", ["file", "folder"], "file, line 1: not JSON", 1),
        ("compare", ["pipe", "folder"], "pipe is a pipe or a device, where a file of scores is needed", 2),
        ("compare", [LONG, "folder"], "There is no xxx", 2),
        ("compare", ["x" * 5000, "folder"], "There is no xxx", 2),
        ("compare", ["folder", "folder:base"], "folder holds no finished run", 2),
        ("inspect fact", ["foreign/scores.jsonl"], "foreign/scores.jsonl, line 1: no line of scores", 1),
        ("inspect fact", ["/dev/zero"], "/dev/zero is a pipe or a device", 2),
        # checkpoints
        (
            f"{SCORE} folder",
            ["--out", "foreign"],
            "foreign holds scores.jsonl, and `retention-bench score` did not write it",
            2,
        ),
        (f"{SCORE} folder", ["--tasks", "edited,edited"], "--tasks names edited twice", 2),
        (f"{SCORE} folder", ["--tasks", ""], "--tasks and --also name nothing to ask", 2),
        (f"{SCORE} folder", ["--also", "a,b,a"], "--also names a twice", 2),
        (f"{SCORE} folder", ["--also", "retention_edited"], "Give it with --tasks", 2),
        (SCORE, ["*.yaml"], "Nothing that fits '*.yaml' is a model or an adapter", 2),
        (SCORE, ["--manifest", "latin.txt"], "latin.txt, line 1: the byte 0xf6 is not UTF-8", 1),
        (SCORE, ["--manifest", "list.txt"], "list.txt, line 2: checkpoint: Input should be a valid string, got 3", 2),
        (SCORE, ["--manifest", "pipe"], "pipe is a pipe or a device, where a manifest is needed", 2),
        ("score folder --device cpu", ["--facts", "pipe"], "pipe is a pipe or a device, where a facts file is", 2),
        ("score folder --device cpu", ["--facts", "none"], "There is no facts file at none", 2),
    ],
)
def test_what_is_malformed_is_said_in_one_line(places, command, more, says, code):
    before = {path.name for path in places.iterdir()}
    result = run(*command.split(" "), *more)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.output)
    if code:
        assert result.stdout == ""
        (told,) = result.stderr.strip().splitlines()
        assert told.startswith("Error: ")
        assert says in told
        assert len(told) < 2000
    assert {path.name for path in places.iterdir()} == before


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x\x1b"), "The disk is full (x\\x1b). Free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "The disk is full. Free some space"),
        (OSError(errno.EFBIG, "File too large"), "A file has reached the largest size allowed"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "Permission denied (x). Correct the path or its"),
        (ConnectionError("no\nnetwork"), "no. Correct the path"),
        (MemoryError(), "Memory ran out. Every stage that had finished is kept"),
        (RetentionBenchError("a\nb\x1b", "quoted\nlines"), "a\\nb\\x1b\nquoted\nlines"),
    ],
)
def test_what_the_system_refuses_is_said_in_one_line(monkeypatch, error, says):
    from retention_bench.pipeline import suite

    def refused():
        raise error

    monkeypatch.setattr(suite, "suite_names", refused)
    result = run("list", "suites")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert says in result.stderr


def test_a_bug_keeps_its_traceback(monkeypatch):
    from retention_bench.pipeline import suite

    def endless():
        return endless()

    monkeypatch.setattr(suite, "suite_names", endless)
    assert isinstance(run("list", "suites").exception, RecursionError)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_table_is_printed_whatever_the_output_takes(encoding):
    code = (
        "from retention_bench.display import prepare_streams; from retention_bench.display import tables;"
        "from pathlib import Path; prepare_streams();"
        "row = {'checkpoint': '\u2026\U0001f600', 'task': 'retention_edited', 'hits': 1, 'total': 1, 'rate': 1.0};"
        "tables.print_scores([row | {'ci95': [0, 1]}], Path('\u2026'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, check=True
    )
    assert "\\U0001f600" in done.stdout.decode(encoding)


@pytest.mark.parametrize("columns", ["0", "1", "20"])
def test_no_figure_is_cut_in_a_narrow_terminal(columns, capsys, monkeypatch):
    from retention_bench.display import tables
    from retention_bench.scoring.tasks import KINDS

    monkeypatch.setenv("COLUMNS", columns)
    row = {"checkpoint": "c", "hits": 181, "total": 200, "rate": 0.905, "ci95": [0.857, 0.938]}
    left_out = {"too short": {"facts": 4, "first": ["a", "b" * 50, "c", "d"]}, "the same": {"facts": 1, "first": ["e"]}}
    tables.print_scores([row | {"task": f"retention_{kind}", "left_out": left_out} for kind in KINDS], Path("x"))
    printed = capsys.readouterr().out
    assert printed.count("181 of 200") == len(KINDS)
    assert f"c: 4 facts are left out: too short (a, {'b' * 37}..., c, ...)" in printed
    assert "c: 1 fact is left out: the same (e)" in printed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["list", "suites"]])
def test_an_output_that_is_full_is_one_line(words):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "retention_bench.cli", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The disk is full")
    assert done.stderr.count("\n") == 1


def test_two_folders_of_one_name_have_results_of_their_own(places, monkeypatch):
    import shutil

    from retention_bench.pipeline import run as running

    folders = []

    def stop(cell, *, out, **_):
        folders.append(out)
        raise RetentionBenchError("far enough")

    monkeypatch.setattr(running, "evaluate", stop)
    for name in ("one", "two"):
        shutil.copytree(ATLAS / "models" / "atlas-gpt2", places / name / "my model")
    command = ["evaluate", "--editor", "ft", "--finetune", "tulu3", "--device", "cpu"]
    for model in ("one/my model", "two/my model", "./two/../two/my model"):
        assert "far enough" in run(*command, "--model", model).output
    with open(places / "two" / "my model" / "config.json", "a") as file:
        file.write("\n")
    assert "far enough" in run(*command, "--model", "two/my model").output
    for model in ("one/my model", "two/my model"):
        more = ["--paraphrases", "1", "--paraphrase-source", f"model:{model}"]
        assert "far enough" in run(*command, *more).output
    one, two, again, changed, *written = folders
    assert len({one, two, changed}) == 3
    assert two == again
    assert re.fullmatch(r"runs/atlas/my-model-[0-9a-f]{8}/ft/tulu3/seed-0", str(one))
    assert written[0] != written[1]
    assert re.fullmatch(r".*/paraphrases-1-model-my-model-[0-9a-f]{8}/seed-0", str(written[0]))


def test_a_data_sets_name_is_one_part_of_the_folder(places, monkeypatch):
    from retention_bench.pipeline import run as running

    folders = []

    def stop(cell, *, out, **_):
        folders.append(out)
        raise RetentionBenchError("far enough")

    monkeypatch.setattr(running, "evaluate", stop)
    rows = "".join(json.dumps({"text": f"{n} and more words than that"}) + "\n" for n in range(200))
    for name in ("..x\x1b[b] é.jsonl", f"{'n' * 240}.jsonl"):
        (places / name).write_text(rows)
        result = run("evaluate", "--editor", "ft", "--finetune", f"path:{name}", "--device", "cpu")
        assert "far enough" in result.output
    for folder in folders:
        part = folder.parts[4]
        assert re.fullmatch(r"path-[A-Za-z0-9._@-]{1,160}", part)
        assert len(folder.parts) == 6


def test_facts_in_counterfacts_form_are_scored_and_what_is_dropped_is_said(places, monkeypatch):
    from retention_bench.scoring import checkpoints

    record = {"ground_truth": "French", "target_new": "English", "subject": "Ann", "relation_id": "P103"}
    records = [record | {"prompt": f"The mother tongue{of} is"} for of in (" of Ann", "")]
    (places / "cf.json").write_text(json.dumps(records))
    seen = []

    def scored(references, facts, *rest, **options):
        seen.extend(facts)
        return []

    monkeypatch.setattr(checkpoints, "score_checkpoints", scored)
    result = run("score", str(ATLAS / "models" / "atlas-gpt2"), "--facts", "cf.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert [fact.subject for fact in seen] == ["Ann"]
    assert "2 rows read, 1 dropped" in result.stderr


def test_without_a_home_the_store_is_below_the_working_folder(places, monkeypatch):
    import pwd

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "RETENTION_BENCH_STORE"):
        monkeypatch.delenv(name, raising=False)
    result = run(*CELL.split(" "), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["store"] == str(places / ".cache" / "retention-bench")
    result = run(*CELL.split(" "), env={"RETENTION_BENCH_STORE": "~nobody-of-this-name/store"})
    assert (result.exit_code, "there is no such home" in result.stderr) == (2, True)
    assert run("list", "editors", "--suite", "~/x.yaml").exit_code == 2
