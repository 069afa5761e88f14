import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from retention_bench.cli import main
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import Fact, FactSet
from retention_bench.models import Checkpoint, Reference, load_model, read_references
from retention_bench.results.compare import read
from retention_bench.scoring import score
from retention_bench.scoring.checkpoints import batch
from retention_bench.scoring.checkpoints.batch import Options, score_checkpoints
from retention_bench.scoring.checkpoints.parity import fresh_model
from retention_bench.scoring.engine_process import EngineError, resolve_backend

COLOURS = ["red", "green", "blue"]
OPTIONS = Options("hf", "float32", "cpu", ("edited", "intrinsic", "paraphrase"))
TASKS = ["retention_edited", "retention_intrinsic", "retention_paraphrase"]


def rows_of(rows, name):
    return {row["task"]: row for row in rows if row["checkpoint"] == name}


def test_every_form_of_a_checkpoint_is_scored_as_a_model_of_its_own(zoo, facts, tmp_path):
    texts = [
        f"{zoo / 'gpt2'}",
        f"{zoo / 'llama'}",
        f"{zoo / 'gpt2'}+{zoo / 'delta.safetensors'}",
        f"{zoo / 'gpt2'}+{zoo / 'lora'}",
        f"{zoo / 'dora'}",  # names its base
        json.dumps({"name": "tuned", "checkpoint": f"{zoo / 'gpt2-tuned'}"}),
    ]
    references, unreadable = read_references(texts)
    assert not unreadable
    seen = []
    rows = score_checkpoints(references, facts, tmp_path, OPTIONS, progress=lambda *about: seen.append(about))
    assert seen[-1] == ("scoring", 15, 15)  # ten facts and five paraphrases
    assert [row["checkpoint"] for row in rows[::3]] == [reference.name for reference in references]
    answers = set()
    for reference in references:
        checkpoint = Checkpoint(reference.base, reference.delta, reference.adapter)
        expected = score(*fresh_model(checkpoint, "cpu"), facts)
        found = rows_of(rows, reference.name)
        assert list(found) == TASKS
        for task in TASKS:
            ours = found[task]["samples"]
            theirs = [sample for sample in expected if f"retention_{sample.kind}" == task]
            assert [(s["prompt"], s["hit"], s["token_ids"]) for s in ours] == [
                (s.prompt, s.hit, list(s.token_ids)) for s in theirs
            ]
            logprobs = [s["logprob"] for s in ours]
            assert logprobs == pytest.approx([s.logprob for s in theirs], abs=1e-4)
            assert found[task]["hits"] == sum(s["hit"] for s in ours)
            parity = found[task]["parity"]
            assert parity["logprob_distance"] < 1e-4
            assert parity["equal_answers"] == parity["prompts"] == len(facts)
        answers.add(tuple(s["logprob"] for task in TASKS for s in found[task]["samples"]))
    assert len(answers) == len(references)  # no two of them are alike


def test_what_was_scored_is_not_scored_again(zoo, facts, tmp_path, monkeypatch):
    references = read_references([str(zoo / "gpt2"), str(zoo / "gpt2-tuned")])[0]
    first = score_checkpoints(references, facts, tmp_path, OPTIONS)
    before = (tmp_path / "scores.jsonl").read_bytes()
    seen = []
    monkeypatch.setattr(batch, "_start", lambda *_: pytest.fail("no engine is needed"))
    again = score_checkpoints(references, facts, tmp_path, OPTIONS, announce=lambda name, done: seen.append(done))
    assert again == first
    assert seen == [True, True]
    assert (tmp_path / "scores.jsonl").read_bytes() == before
    renamed = dataclasses.replace(references[0], name="again")  # the same content under another name
    rows = rows_of(score_checkpoints([renamed], facts, tmp_path, OPTIONS), "again")
    assert [row["samples"] for row in rows.values()] == [row["samples"] for row in first[:3]]


def test_a_change_of_content_or_of_the_question_is_scored(zoo, facts, tmp_path):
    shutil.copytree(zoo / "gpt2", tmp_path / "model")
    [reference] = read_references([str(tmp_path / "model")])[0]
    first = score_checkpoints([reference], facts, tmp_path / "out", OPTIONS)
    shutil.copy(zoo / "gpt2-tuned" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    second = score_checkpoints([reference], facts, tmp_path / "out", OPTIONS)
    assert [row["key"] for row in first] != [row["key"] for row in second]
    assert first[0]["samples"] != second[0]["samples"]
    fewer = FactSet.of(facts.facts[:4])
    third = score_checkpoints([reference], fewer, tmp_path / "out", OPTIONS)
    assert third[0]["total"] == 2
    scores = f"{tmp_path / 'out' / 'scores.jsonl'}:{reference.name}"
    [side], _ = read(scores, None)
    assert len(side.rows) == sum(row["total"] for row in third)  # what was scored last is what is compared


def break_weights(model, change):
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def cut_off(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def diverged(model):
    break_weights(model, lambda weights: weights["transformer.h.1.ln_1.bias"].fill_(float("nan")))


def another_width(model):
    break_weights(model, lambda w: w.update({"transformer.wpe.weight": torch.zeros(3, 32)}))


def incomplete(model):
    break_weights(model, lambda weights: weights.pop("transformer.h.1.ln_1.bias"))


def pickled(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def no_tokenizer(model):
    for path in model.glob("token*"):
        path.unlink()


def encoder(model):
    (model / "config.json").write_text(json.dumps({"model_type": "bert"}))


def no_json(model):
    (model / "config.json").write_text("{")


def no_config(model):
    (model / "config.json").unlink()


def dangling(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("elsewhere")


def escaping_index(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../gpt2/model.safetensors"}}))


BREAKERS = {
    cut_off: "could not be loaded .*Safetensor",
    diverged: "transformer.h.1.ln_1.bias in .* not finite",
    another_width: "has the shape .* and config.json asks for",
    incomplete: "transformer.h.1.ln_1.bias among them",
    pickled: "only pickled weights.*--allow-pickle",
    no_tokenizer: "has no tokenizer",
    encoder: "bert",
    no_json: "config.json: not JSON",
    no_config: "config.json",
    dangling: "cannot be read .*No such file",
    escaping_index: "names '../gpt2/model.safetensors', which is no .safetensors file beside it",
}


def test_a_checkpoint_that_cannot_be_scored_is_recorded_and_the_others_go_on(zoo, facts, tmp_path):
    texts = [str(zoo / "gpt2")]
    for breaker in BREAKERS:
        shutil.copytree(zoo / "gpt2", tmp_path / breaker.__name__)
        breaker(tmp_path / breaker.__name__)
        texts.append(str(tmp_path / breaker.__name__))
    texts += [f"{zoo / 'gpt2'}+{zoo / 'other.safetensors'}", "./nothing", str(zoo / "gpt2-tuned")]
    references, unreadable = read_references(texts)
    rows = score_checkpoints(references, facts, tmp_path / "out", OPTIONS, unreadable=unreadable)
    scored = {row["checkpoint"] for row in rows if "error" not in row}
    assert scored == {texts[0], texts[-1]}
    errors = {row["checkpoint"]: row["error"] for row in rows if "error" in row}
    for breaker, message in BREAKERS.items():
        with pytest.raises(RetentionBenchError, match=message):
            raise RetentionBenchError(errors[str(tmp_path / breaker.__name__)])
    assert "model.layers.0.mlp.down_proj.weight" in errors[texts[-3]]
    assert "no model folder" in errors["./nothing"]
    # repaired, it is scored, and no failure of it is left
    shutil.copy(zoo / "gpt2" / "model.safetensors", tmp_path / "cut_off" / "model.safetensors")
    repaired = read_references([str(tmp_path / "cut_off")])[0]
    assert [row["task"] for row in score_checkpoints(repaired, facts, tmp_path / "out", OPTIONS)] == TASKS


def test_pickles_are_read_on_request(zoo, facts, tmp_path):
    shutil.copytree(zoo / "gpt2", tmp_path / "pickled")
    pickled(tmp_path / "pickled")
    references = read_references([str(tmp_path / "pickled"), str(zoo / "gpt2")])[0]
    rows = score_checkpoints(references, facts, tmp_path / "out", dataclasses.replace(OPTIONS, allow_pickle=True))
    assert [row["samples"] for row in rows[:3]] == [row["samples"] for row in rows[3:]]


def test_facts_that_a_tokenizer_cannot_ask_are_left_out_and_counted(zoo, facts, tmp_path):
    odd = Fact("odd", "x", "R", "The {} is", "?", None)  # never found
    references = read_references([str(zoo / "gpt2")])[0]
    rows = score_checkpoints(references, FactSet.of([*facts, odd]), tmp_path, OPTIONS)
    whole = score_checkpoints(references, facts, tmp_path / "whole", OPTIONS)
    assert [row["samples"] for row in rows] == [row["samples"] for row in whole]
    [found] = rows[0]["left_out"].values()
    assert found == {"facts": 1, "first": ["odd"]}
    [row] = score_checkpoints(references, FactSet.of([odd]), tmp_path, OPTIONS)
    assert "No fact can be asked: 1 fact is left out" in row["error"]


def test_an_engine_that_says_something_else_is_not_believed(zoo, facts, tmp_path, monkeypatch):
    from retention_bench.scoring.hf import HFEngine

    swap = HFEngine.swap

    def wrong(self, checkpoint):
        swap(self, checkpoint)
        if checkpoint.folder.endswith("gpt2"):
            with torch.no_grad():
                for parameter in self.lm.model.parameters():
                    parameter.mul_(1.1)

    monkeypatch.setattr(HFEngine, "swap", wrong)
    references = read_references([str(zoo / "gpt2"), str(zoo / "gpt2-tuned")])[0]
    rows = score_checkpoints(references, facts, tmp_path, OPTIONS)
    assert re.search("10 get other log-probabilities.*'The green cold is'", rows[0]["error"])
    assert [row["task"] for row in rows[1:]] == TASKS  # each is compared until one has passed


def test_after_an_engine_that_is_gone_another_is_started(zoo, facts, tmp_path, monkeypatch):
    from retention_bench.scoring.hf import HFEngine

    swap, started = HFEngine.swap, []

    def gone(self, checkpoint):
        started.append(self)
        if len(started) == 1:
            raise EngineError("The engine is gone.")
        swap(self, checkpoint)

    monkeypatch.setattr(HFEngine, "swap", gone)
    references = read_references([str(zoo / "gpt2"), str(zoo / "gpt2-tuned")])[0]
    rows = score_checkpoints(references, facts, tmp_path, OPTIONS)
    assert rows[0]["error"] == "The engine is gone."
    assert [row["task"] for row in rows[1:]] == TASKS
    assert started[0] is not started[1]


def test_an_engine_with_other_answers_is_not_believed_in_float32(zoo, facts, tmp_path, monkeypatch):
    from retention_bench.scoring.hf import RetentionHFLM

    decode = RetentionHFLM._decode
    monkeypatch.setattr(RetentionHFLM, "_decode", lambda *given: {p: [ids[0] + 1] for p, ids in decode(*given).items()})
    references = read_references([str(zoo / "gpt2")])[0]
    [row] = score_checkpoints(references, facts, tmp_path / "exact", OPTIONS)
    assert re.search("10 get other answers from the hf engine.*'The green cold is'", row["error"])
    rounded = dataclasses.replace(OPTIONS, dtype="bfloat16")
    rows = score_checkpoints(references, facts, tmp_path / "rounded", rounded)
    assert rows[0]["parity"]["equal_answers"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_the_comparison(zoo, facts, tmp_path, dtype):
    references = read_references([str(zoo / "gpt2"), str(zoo / "llama")])[0]
    rows = score_checkpoints(references, facts, tmp_path, dataclasses.replace(OPTIONS, dtype=dtype))
    exact = score_checkpoints(references, facts, tmp_path / "exact", OPTIONS)
    for row, other in zip(rows, exact, strict=True):
        assert row["parity"]["logprob_distance_median"] <= row["parity"]["logprob_distance"]
        pairs = zip(row["samples"], other["samples"], strict=True)
        apart = [abs(a["logprob"] - b["logprob"]) for a, b in pairs]
        assert 0 < max(apart) < 0.5


def test_after_another_checkpoint_the_first_answers_as_before_bit_for_bit(zoo, facts):
    from retention_bench.scoring import score_lm
    from retention_bench.scoring.hf import HFEngine

    for family in ("gpt2", "llama"):
        engine, found = HFEngine(device="cpu"), []
        for name in (family, f"{family}-tuned", family):
            engine.swap(Checkpoint(str(zoo / name)))
            found.append(score_lm(engine.lm, facts))
        assert found[0] == found[2] != found[1]


@pytest.mark.slow
def test_a_batch_that_is_killed_goes_on_where_it_was(zoo, facts, tmp_path):
    facts.write(tmp_path / "facts.jsonl")
    weights = load_file(zoo / "gpt2" / "model.safetensors")
    for number in range(50):
        shutil.copytree(zoo / "gpt2", tmp_path / "runs" / f"{number:02}")
        weights["transformer.ln_f.bias"] += 0.01
        save_file(weights, tmp_path / "runs" / f"{number:02}" / "model.safetensors", {"format": "pt"})
    command = [sys.executable, "-m", "retention_bench.cli", "score", str(tmp_path / "runs" / "*")]
    command += ["--facts", str(tmp_path / "facts.jsonl"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for stop in (5, 20):
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            for line in process.stderr:
                if line.startswith(f"[{stop}/50]"):
                    os.kill(process.pid, signal.SIGKILL)
                    break
    path = tmp_path / "out" / "scores.jsonl"
    before = path.read_bytes()
    path.write_bytes(before[:-7])  # in the middle of a line
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"".join(before.splitlines(keepends=True)[:-1]))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    scored = [(row["checkpoint"], row["task"]) for row in rows]
    tasks = {task for _, task in scored}
    assert {"retention_edited", "retention_intrinsic", "retention_edited_qa"} <= tasks
    assert len(scored) == len(set(scored)) == 50 * len(tasks)


def test_the_command_scores_prints_and_says_what_failed(zoo, facts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts.write(tmp_path / "facts.jsonl")
    (tmp_path / "list.txt").write_text(f"# two of them\n{zoo / 'gpt2'}\n\n{zoo / 'gpt2-tuned'}\n")
    asked = ["score", "--facts", "facts.jsonl", "--device", "cpu", "--out", "out"]
    found = CliRunner().invoke(main, [*asked, "--manifest", "list.txt", "--json"])
    assert found.exit_code == 0, found.stderr
    names = dict.fromkeys(row["checkpoint"] for row in json.loads(found.stdout))
    assert list(names) == [str(zoo / "gpt2"), str(zoo / "gpt2-tuned")]
    found = CliRunner().invoke(main, [*asked, "--manifest", "list.txt", "./nothing"])
    assert found.exit_code == 1
    assert "2 checkpoints scored, 1 not" in found.stdout
    assert "Not scored: ./nothing: There is no model folder" in found.stdout
    for wrong, message in (
        ([], "No checkpoint is given"),
        ([str(zoo / "gpt2"), str(zoo / "gpt2")], "is given twice"),
        (["nothing/*"], "No folder fits"),
        (["{}"], "no JSON object with name and checkpoint"),
        ([str(zoo / "gpt2"), "--tasks", "edited,all"], "Unknown kind of question 'all'"),
        ([str(zoo / "gpt2"), "--manifest", "none.txt"], "no manifest at none.txt"),
        ([str(zoo / "gpt2"), "--tasks", "locality"], "no question of the kinds locality"),
    ):
        found = CliRunner().invoke(main, [*asked, *wrong])
        assert (found.exit_code, message in found.stderr) == (2, True), (wrong, found.stderr)


@pytest.mark.slow
def test_tasks_of_lm_evals_own_run_on_the_same_engine(zoo, facts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts.write(tmp_path / "facts.jsonl")
    rows = [{"question": f"The {word} is", "choices": COLOURS, "answer": n % 3} for n, word in enumerate(COLOURS * 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {
        "task": "colours",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }
    written = {
        "task": "written",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["###"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    for task in (choice, written):
        (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    asked = ["score", str(zoo / "gpt2"), "--facts", "facts.jsonl", "--device", "cpu", "--include-path", "tasks"]
    found = CliRunner().invoke(main, [*asked, "--also", "colours,written", "--json"])
    assert found.exit_code == 0, found.stderr
    scored = {row["task"]: row for row in json.loads(found.stdout)}
    model, tokenizer = load_model(str(zoo / "gpt2"))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    for task, metric in (("colours", "acc,none"), ("written", "exact_match,none")):
        theirs = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=[task], task_manager=manager)
        assert scored[task]["metrics"][metric] == theirs["results"][task][metric]
    assert "colours: acc 0." in CliRunner().invoke(main, [*asked, "--also", "colours"]).stdout
    wrong = CliRunner().invoke(main, [*asked, "--also", "colors"])
    assert (wrong.exit_code, "Unknown task of lm-eval 'colors'. Did you mean 'colours'?" in wrong.stderr) == (2, True)


def test_the_backend_that_is_there_is_taken(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_backend("auto", "cuda") == resolve_backend("auto", "cpu") == "hf"
    with pytest.raises(UsageError, match="vLLM is not installed"):
        resolve_backend("vllm", "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert (resolve_backend("auto", "cuda"), resolve_backend("auto", "cpu")) == ("vllm", "hf")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", Reference("gpt2", "gpt2")),
        ("owner/name@abc", Reference("owner/name@abc", "owner/name", "abc")),
    ],
)
def test_names_that_are_no_folders_are_hub_ids(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_references([text]) == ([expected], {})
