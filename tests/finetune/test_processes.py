"""A fine-tune that two processes share is the fine-tune of one, whether each holds the model or a part of it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from retention_bench.errors import UsageError
from retention_bench.finetune import processes
from retention_bench.finetune.training import _share
from retention_bench.models import load_model
from retention_bench.pipeline.distributed.launching import CONFIGS

SEVERAL = Path(__file__).with_name("several.py")
fine_tune = runpy.run_path(str(SEVERAL))["fine_tune"]

# family, task, options
RUNS = {
    "plain": ("gpt2", "tulu3", {}),
    "head": ("gpt2", "imdb", {}),
    "untied": ("llama", "imdb", {}),
    "frozen": ("llama", "tulu3", {"freeze": "window:1:1"}),
    "lora": ("llama", "tulu3", {"adapter": "lora"}),
    "dora": ("gpt2", "tulu3", {"adapter": "dora"}),
}
SETTINGS = {
    "train_size": 32,
    "validation_size": 9,  # an odd number of batches
    "batch_size": 8,
    "micro_batch_size": 2,
    "lr": 5e-3,
    "eval_every": 2,
    "max_steps": 4,
    "max_length": 48,
}


def fsdp() -> dict[str, str]:
    """The environment that `accelerate launch` makes of the shipped configuration."""
    settings = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())["fsdp_config"]
    names = {
        key.upper(): str(value).lower() if isinstance(value, bool) else str(value) for key, value in settings.items()
    }
    return {"ACCELERATE_USE_FSDP": "true", **names}


@pytest.fixture
def prepared(source, request, tmp_path):
    """What every run is given, its model in a folder; IMDB's rows are of two classes."""
    reviews = tmp_path / "reviews.jsonl"
    rows = [json.loads(line)["messages"][0]["content"] for line in Path(source).read_text().splitlines()]
    reviews.write_text("".join(json.dumps({"text": text, "label": n % 2}) + "\n" for n, text in enumerate(rows)))
    for family in ("gpt2", "llama"):
        request.getfixturevalue(family).save_pretrained(tmp_path / family)
        request.getfixturevalue(f"{family}_tokenizer").save_pretrained(tmp_path / family)

    def runs(where):
        made = []
        for name, (family, task, options) in RUNS.items():
            chats = task == "tulu3"
            settings = {**SETTINGS, "source": str(source if chats else reviews), "threshold": 0.01 if chats else 0.999}
            folder = tmp_path / where / name
            folder.mkdir(parents=True)
            made.append(
                {
                    "folder": str(folder),
                    "model": str(tmp_path / family),
                    "task": task,
                    "settings": settings,
                    "options": options,
                    "tracked": task != "imdb",  # FSDP cannot serve that
                }
            )
        return made

    return runs


def in_two_processes(runs, tmp_path, *, shard):
    file = tmp_path / "runs.json"
    file.write_text(json.dumps({"shard": shard, "runs": runs}))
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(fsdp() if shard else {})}
    done = subprocess.run([*launched, str(SEVERAL), str(file)], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_train_what_one_does(prepared, tmp_path, shard):
    runs = prepared("runs")
    in_two_processes(runs, tmp_path, shard=shard)
    for run in runs:
        start = load_model(run["model"])[0].state_dict()
        expected, _, log, points = fine_tune(run, "alone")
        shared, _ = load_model(str(Path(run["folder"]) / "model"))
        assert type(shared) is type(expected)
        moved = 0.0
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(shared.state_dict()[name], tensor, atol=2e-4, rtol=0, msg=f"{run} {name}")
            moved = max(moved, (tensor - start[name]).abs().max().item())
        assert moved > 1e-3  # ten times what is let pass
        found = json.loads((Path(run["folder"]) / "log.json").read_text())
        values = [point["loss"] for point in log["curve"]]
        assert [point["loss"] for point in found["log"]["curve"]] == pytest.approx(values, abs=1e-4)
        assert found["log"] | {"curve": None} == log | {"curve": None, "value": found["log"]["value"], "processes": 2}
        [checkpoint] = (Path(run["folder"]) / "work").glob("checkpoint-*")
        assert (checkpoint / "pytorch_model_fsdp_0").is_dir() == shard
        if run["tracked"]:
            assert [step for step, _ in found["points"]] == [0, 0, 2, 2, 4, 4]  # two prompts
            assert [value for _, value in found["points"]] == pytest.approx([value for _, value in points], abs=1e-3)


@pytest.mark.slow
def test_a_run_that_shards_goes_on_from_its_checkpoint_with_the_same_bits(prepared, tmp_path):
    one, two = prepared("one")[:1], prepared("two")[:1]
    in_two_processes(one, tmp_path, shard=True)
    short = [{**run, "settings": {**run["settings"], "max_steps": 3}} for run in two]  # leaves the checkpoint of step 2
    in_two_processes(short, tmp_path, shard=True)
    assert [path.name for path in (Path(two[0]["folder"]) / "work").glob("checkpoint-*")] == ["checkpoint-2"]
    in_two_processes(two, tmp_path, shard=True)
    whole, resumed = (load_model(str(Path(runs[0]["folder"]) / "model"))[0].state_dict() for runs in (one, two))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_trajectory_that_sharding_cannot_serve_is_refused(prepared, monkeypatch):
    monkeypatch.setattr(processes, "sharded", lambda: True)
    with pytest.raises(UsageError, match="Give --track-every off, or --accelerate-config ddp"):
        fine_tune({**prepared("runs")[1], "tracked": True}, "alone")


def test_a_process_alone_has_what_it_has():
    assert (processes.index(), processes.count(), processes.gathered("x")) == (0, 1, ["x"])
    assert not processes.sharded()


def test_rows_that_processes_cannot_share_equally_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    assert _share(9) == 3
    with pytest.raises(UsageError, match="8 rows.*3 processes"):
        _share(8)
