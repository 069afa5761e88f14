"""A line of scores.jsonl answers for the content that it was scored of, and one bad checkpoint is nobody else's."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from retention_bench.errors import UsageError
from retention_bench.facts import FactSet
from retention_bench.models.reference import Reference
from retention_bench.results.compare import read
from retention_bench.scoring.checkpoints.batch import Options, score_checkpoints
from retention_bench.scoring.hf import HFEngine

OPTIONS = Options("hf", "float32", "cpu", ("intrinsic",))


def scaled(source, folder, factor):
    folder = Path(shutil.copytree(source, folder, dirs_exist_ok=True))
    weights = load_file(Path(source) / "model.safetensors")
    weights["transformer.ln_f.weight"] *= factor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_facts_a_then_b_then_a_again(zoo, facts, tmp_path):
    gpt2 = [Reference("gpt2", str(zoo / "gpt2"))]
    few, more = FactSet.of(facts.intrinsic.facts[:2]), facts.intrinsic
    totals = [score_checkpoints(gpt2, asked, tmp_path, OPTIONS)[0]["total"] for asked in (few, more, few, more)]
    assert totals == [2, 5, 2, 5]
    score_checkpoints(gpt2, few, tmp_path, OPTIONS)
    [side], _ = read(f"{tmp_path / 'scores.jsonl'}:gpt2", None)
    assert len(side.rows) == 2  # what was asked last is what is compared


def test_a_checkpoint_that_is_overwritten_while_it_is_read_is_not_scored(zoo, facts, tmp_path, monkeypatch):
    folder = scaled(zoo / "gpt2", tmp_path / "model", 1.0)
    swap = HFEngine.swap

    def late(self, checkpoint):
        scaled(zoo / "gpt2", folder, 3.0)
        swap(self, checkpoint)

    monkeypatch.setattr(HFEngine, "swap", late)
    [row] = score_checkpoints([Reference("model", str(folder))], facts, tmp_path / "out", OPTIONS)
    assert "changed while they were read" in row["error"]
    monkeypatch.undo()
    [row] = score_checkpoints([Reference("model", str(folder))], facts, tmp_path / "out", OPTIONS)
    assert row["total"] == 5


@pytest.mark.parametrize(
    "error", [KeyError("embed_out.weight"), ZeroDivisionError("modulo"), MemoryError(), OSError(5, "bad")]
)
def test_whatever_a_checkpoint_raises_is_recorded_and_the_others_are_scored(zoo, facts, tmp_path, monkeypatch, error):
    swap = HFEngine.swap

    def bad(self, checkpoint):
        if checkpoint.folder.endswith("gpt2"):
            raise error
        swap(self, checkpoint)

    monkeypatch.setattr(HFEngine, "swap", bad)
    references = [Reference(name, str(zoo / name)) for name in ("gpt2", "gpt2-tuned", "llama")]
    rows = score_checkpoints(references, facts, tmp_path, OPTIONS)
    assert [row["checkpoint"] for row in rows if "error" in row] == ["gpt2"]
    assert [row["checkpoint"] for row in rows if "total" in row] == ["gpt2-tuned", "llama"]


def test_a_task_or_a_checkpoint_given_twice_is_refused(zoo, facts, tmp_path):
    gpt2 = Reference("gpt2", str(zoo / "gpt2"))
    with pytest.raises(UsageError, match="task 'intrinsic' is given twice"):
        score_checkpoints([gpt2], facts, tmp_path, dataclasses.replace(OPTIONS, kinds=("intrinsic", "intrinsic")))
    with pytest.raises(UsageError, match="checkpoint 'gpt2' is given twice"):
        score_checkpoints([gpt2, gpt2], facts, tmp_path, OPTIONS)


def test_a_trainers_checkpoint_without_tokenizer_takes_another_ones(zoo, facts, tmp_path):
    folder = Path(shutil.copytree(zoo / "gpt2", tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*")))
    reference = Reference("model", str(folder))
    [row] = score_checkpoints([reference], facts, tmp_path / "out", OPTIONS)
    assert "--tokenizer" in row["error"]
    options = dataclasses.replace(OPTIONS, tokenizer=str(zoo / "gpt2"))
    [row] = score_checkpoints([reference], facts, tmp_path / "out", options)
    [whole] = score_checkpoints([Reference("whole", str(zoo / "gpt2"))], facts, tmp_path / "whole", OPTIONS)
    assert row["samples"] == whole["samples"]
    with pytest.raises(UsageError, match="no model folder"):
        score_checkpoints([reference], facts, tmp_path / "out", dataclasses.replace(OPTIONS, tokenizer="./nothing"))


@pytest.fixture
def own_tasks_alone(monkeypatch, tmp_path):
    """Without lm-eval's own thousands of tasks, which take seconds to look through."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def own_task(folder, **change):
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text('{"q": "The red is"}\n')
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "word_perplexity"}],
        **change,
    }
    (folder / "own.yaml").write_text(json.dumps(task))
    return dataclasses.replace(OPTIONS, also=("own",), include_path=str(folder))


def test_a_perplexity_that_is_no_number_ends_nothing(zoo, facts, tmp_path, own_tasks_alone):
    diverged = Path(shutil.copytree(zoo / "gpt2", tmp_path / "diverged"))
    weights = load_file(diverged / "model.safetensors")
    weights["transformer.ln_f.weight"] *= 1e25
    weights["transformer.wte.weight"] *= 1e25
    save_file(weights, diverged / "model.safetensors", {"format": "pt"})
    references = [Reference("diverged", str(diverged)), Reference("gpt2", str(zoo / "gpt2"))]
    rows = score_checkpoints(references, facts, tmp_path / "out", own_task(tmp_path / "tasks"))
    metrics = {row["checkpoint"]: row["metrics"]["word_perplexity,none"] for row in rows if row["task"] == "own"}
    assert metrics["diverged"] is None
    assert metrics["gpt2"] > 1


def test_a_task_of_ones_own_that_was_changed_is_asked_again(zoo, facts, tmp_path, own_tasks_alone):
    gpt2 = [Reference("gpt2", str(zoo / "gpt2"))]

    def asked(**change):
        rows = score_checkpoints(gpt2, facts, tmp_path / "out", own_task(tmp_path / "tasks", **change))
        [own] = [row for row in rows if row["task"] == "own"]
        return own

    first, again = asked(), asked()
    assert first == again
    other = asked(doc_to_target="{{q}} green")
    assert (other["key"], other["metrics"]) != (first["key"], first["metrics"])
    assert asked() == first


def test_a_head_that_was_trained_apart_is_scored_as_it_is_and_left_so(zoo, facts):
    from retention_bench.models import load_model
    from retention_bench.scoring import score

    model, tokenizer = load_model(str(zoo / "llama"))
    model.config.tie_word_embeddings = True
    before = model.lm_head.weight.detach().clone()
    assert not torch.equal(before, model.model.embed_tokens.weight)
    score(model, tokenizer, facts, kinds=("intrinsic",))
    assert torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert "tie_weights" not in vars(model)


def test_a_task_whose_own_code_fails_leaves_the_others_their_scores(zoo, facts, tmp_path, own_tasks_alone):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "code.py").write_text(
        "import datasets\n"
        "def rows(**_):\n    return {'test': datasets.Dataset.from_list([{'q': 'The sky', 'a': ' is'}])}\n"
        "def fails(document, results):\n    raise KeyError('of the task')\n"
        "def ends(document, results):\n    raise SystemExit(3)\n"
    )
    common = (
        "custom_dataset: !function code.rows\ntest_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{q}}'\n"
        "doc_to_target: '{{a}}'\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    for task, more in {"fails": "fails", "ends": "ends", "works": ""}.items():
        judged = f"process_results: !function code.{more}\n" if more else "tag: [tagged]\n"
        (tmp_path / "tasks" / f"{task}.yaml").write_text(f"task: {task}\n{judged}{common}")
    asked = dataclasses.replace(
        OPTIONS, also=("fails", "ends", "works", "tagged"), include_path=str(tmp_path / "tasks")
    )
    rows = score_checkpoints([Reference("one", str(zoo / "gpt2"))], facts, tmp_path / "out", asked)
    errors = {row["task"]: row["error"] for row in rows if "error" in row}
    assert errors.keys() == {"fails", "ends"}
    assert errors["fails"] == "Task 'fails': one cannot be scored (KeyError: 'of the task')."
    scored = {row["task"]: row for row in rows if "error" not in row}
    assert scored.keys() == {"retention_intrinsic", "works", "tagged"}
    assert scored["tagged"]["metrics"] == {"works acc,none": scored["works"]["metrics"]["acc,none"]}
