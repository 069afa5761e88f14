import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import Fact, FactSet
from retention_bench.finetune import FinetuneOptions
from retention_bench.models import load_model
from retention_bench.pipeline import Bench, Cell, load_suite, plan
from retention_bench.pipeline.distributed import launching, worker
from retention_bench.pipeline.distributed.launching import CONFIGS, launcher
from retention_bench.pipeline.plan_file import write_plan
from retention_bench.pipeline.stage import Model, Rows
from retention_bench.pipeline.stages import Facts, Finetune, Knowledge
from retention_bench.pipeline.stages.facts import Group
from retention_bench.pipeline.stages.finetune import Tracked
from retention_bench.store import Entry, Store
from retention_bench.store.fingerprints import model_fingerprint, source_fingerprint

TWO = {"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
"""`accelerate launch` starts several processes for GPUs alone; these then go without."""


def config(tmp_path, **changes):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**TWO, **changes}))
    return str(path)


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_shipped_configurations_are_accelerates_and_use_all_gpus(gpus, name):
    found = launcher(name, "cuda")
    assert (found.processes, found.sharded) == (4, name == "fsdp")
    assert load_config_from_file(str(CONFIGS / f"{name}.yaml")).distributed_type == found.content["distributed_type"]


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"distributed_type": "DEEPSPEED"}, "cuda", "'DEEPSPEED'.*Allowed: MULTI_GPU, FSDP"),
        ({"distributed_type": ["x"] * 1000}, "cuda", "distributed_type a list of 1000. Allowed: MULTI_GPU, FSDP"),
        ({"distributed_type": "FSDP", "fsdp_config": 3}, "cuda", "fsdp_config is 3. Allowed: a mapping"),
        ({"num_machines": 2}, "cuda", "num_machines 2"),
        ({"num_processes": 5}, "cuda", "5 processes and 4 GPUs"),
        ({"num_processes": None}, "cpu", "starts None processes.*Allowed: num_processes from 2"),
        ({"num_processes": "2"}, "cpu", "starts '2' processes"),
        ({"num_processes": 1}, "cuda", "starts 1 processes"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, "cpu", "spreads a model over GPUs"),
        ({"distributed_type": "FSDP"}, "cuda", "fsdp_version under fsdp_config is left out. Allowed: 2"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": True}},
            "cuda",
            "fsdp_cpu_ram_efficient_loading under fsdp_config is True. Allowed: false",
        ),
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {
                    "fsdp_version": 2,
                    "fsdp_cpu_ram_efficient_loading": False,
                    "fsdp_offload_params": True,
                },
            },
            "cuda",
            "fsdp_offload_params under fsdp_config is True. Allowed: false",
        ),
    ],
)
def test_a_configuration_that_cannot_start_a_fine_tune_is_refused(gpus, tmp_path, changes, device, message):
    with pytest.raises(UsageError, match=message):
        launcher(config(tmp_path, **changes), device)


def test_several_gpus_without_a_configuration_are_refused_before_anything_is_computed(gpus, small_suite, tmp_path):
    cell = Cell(load_suite(str(small_suite)), None, "ft", "tulu3", 0, "cuda")
    with pytest.raises(UsageError, match="4 GPUs are visible.*--accelerate-config ddp.*CUDA_VISIBLE_DEVICES=0"):
        plan(cell)
    assert plan(dataclasses.replace(cell, accelerate_config="ddp")).tuned_control.launcher.processes == 4


def test_what_is_no_configuration_is_refused(tmp_path):
    with pytest.raises(UsageError, match="There is no configuration at zero3.*Allowed: ddp, fsdp"):
        launcher("zero3", "cpu")
    (tmp_path / "text.yaml").write_text("a: b: c")
    with pytest.raises(UsageError, match="text.yaml, line 1: not valid YAML.*Allowed: ddp, fsdp"):
        launcher(str(tmp_path / "text.yaml"), "cpu")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(UsageError, match="list.yaml has the distributed_type None"):
        launcher(str(tmp_path / "list.yaml"), "cpu")


def test_a_cell_keeps_its_key_without_and_gets_another_with(small_suite, tmp_path):
    def keys(**given):
        cell = Cell(load_suite(str(small_suite)), None, "ft", "tulu3", 0, "cpu", **given)
        return {stage.title(): stage.key for stage in plan(cell).plan()}

    alone, two = keys(), keys(accelerate_config=config(tmp_path))
    assert alone.keys() == two.keys()
    others = {title for title in alone if alone[title] != two[title]}
    assert others == {title for title in alone if "fine-tune" in title or "control" in title or "results" in title}
    with pytest.raises(UsageError, match="3 processes cannot share the 16 rows"):
        keys(accelerate_config=config(tmp_path, num_processes=3))


@pytest.fixture
def finetune(make_tokenizer, make_model, tmp_path):
    """A small fine-tune that is tracked, and a store with all that it needs."""
    words = "red green blue small large round fast slow old new warm cold loud".split()
    tokenizer = make_tokenizer("gpt2", [" ".join(words), " ".join(f" {w}" for w in words)] * 10, vocab_size=400)
    model = make_model("gpt2", tokenizer)
    model.config.update({"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0})  # each process draws its own
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"text": " ".join(words[i % 13 :] + words[: i % 7])} for i in range(64)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = [
        Fact(str(n), w, "R", "{} is", "grey", "square" if n % 2 else None) for n, w in enumerate(["Ann", "Bob", "Cy"])
    ]
    (tmp_path / "done").mkdir()
    model = Model(str(tmp_path / "base"), model_fingerprint(str(tmp_path / "base"), None), "float32", "cpu")
    texts = str(tmp_path / "texts.jsonl")
    knowledge = Knowledge(model, Rows("facts", {"sha256": "0"}))
    found = Facts(knowledge, 0.1, 1, 2, 0)
    store = Store(tmp_path / "store")

    def known(folder):
        FactSet.of(facts).write(folder / "facts.jsonl")
        row = {"target": 0.9, "second": 0.1, "lead": 1.0}
        (folder / "knowledge.jsonl").write_text("".join(json.dumps({"fact_id": f.id, **row}) + "\n" for f in facts))

    store.get(Entry(knowledge.name, knowledge.inputs), known)
    store.get(Entry(found.name, found.inputs), lambda folder: FactSet.of(facts).write(folder / "facts.jsonl"))
    settings = {
        "train_size": 16,
        "validation_size": 4,
        "batch_size": 8,
        "micro_batch_size": 4,
        "lr": 1e-3,
        "eval_every": 2,
        "threshold": 0.01,
        "max_steps": 4,
        "max_length": 16,
    }
    stage = Finetune(
        model=model,
        facts=found,
        keywords={},
        edit=None,
        frozen_by=(),
        task="commoncrawl",
        settings=settings,
        data=Rows(texts, source_fingerprint(texts, None)),
        unknown=None,
        options=FinetuneOptions(),
        tracked=Tracked(Group(0, 1), knowledge),
        launcher=launcher(config(tmp_path), "cpu"),
        seed=0,
        called=("commoncrawl", "model 1 of 1"),
    )
    return stage, store


def run(stage, store, folder, progress=print):
    """A fine-tune, into a folder of one's own."""
    folder.mkdir(exist_ok=True)
    stage.run(folder, Bench(store, progress))


@pytest.mark.slow
def test_a_launched_fine_tune_is_the_one_in_this_process(finetune, tmp_path):
    stage, store = finetune
    seen = []

    def progress(name, done, total, figures=None):
        seen.append((name, done, total, sorted(figures or {})))

    run(stage, store, tmp_path / "done", progress)
    assert ("fine-tune", 4, 4, ["loss", "validation_loss"]) in seen
    run(dataclasses.replace(stage, launcher=None), store, tmp_path / "alone")
    shared, alone = (load_model(str(tmp_path / name / "model"))[0].state_dict() for name in ("done", "alone"))
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, atol=1e-5, rtol=0)
    logs = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("done", "alone")]
    assert [log["processes"] for log in logs] == [2, 1]
    assert [log["steps"] for log in logs] == [4, 4]
    looks = [(tmp_path / name / "trajectory.jsonl").read_text().splitlines() for name in ("done", "alone")]
    assert [[json.loads(row)["step"] for row in rows] for rows in looks] == [[0] * 3 + [2] * 3 + [4] * 3] * 2


PLUGIN = """
import dataclasses, os, sys
import torch
from retention_bench.finetune.tasks.commoncrawl import CommonCrawl

def fits(self, context):
    if self.settings.micro_batch_size > int(os.environ["FITS"]):
        raise torch.OutOfMemoryError
    return CommonCrawl.prepare(self, context)

class Hungry(CommonCrawl):
    prepare = fits

class Broken(CommonCrawl):
    def prepare(self, context):
        print("about to break", file=sys.stderr, flush=True)
        os._exit(7)

class Wrong(CommonCrawl):
    def prepare(self, context):
        return 1 / 0
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Tasks of another package, which this process and those it starts find by their entry points."""
    about = tmp_path / "greedy-1.0.dist-info"
    about.mkdir()
    (tmp_path / "greedy.py").write_text(PLUGIN)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[retention_bench.finetunes]\nhungry = greedy:Hungry\nbroken = greedy:Broken\nwrong = greedy:Wrong\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.slow
def test_where_memory_runs_out_the_processes_begin_again_with_less(plugins, finetune, tmp_path, monkeypatch):
    stage, store = finetune
    hungry = dataclasses.replace(stage, task="hungry")
    monkeypatch.setenv("FITS", "1")
    run(hungry, store, tmp_path / "done")
    log = json.loads((tmp_path / "done" / "log.json").read_text())
    assert (log["micro_batch_size"], log["processes"], log["steps"]) == (1, 2, 4)
    monkeypatch.setenv("FITS", "0")
    smallest = dataclasses.replace(hungry, settings={**stage.settings, "micro_batch_size": 1})
    with pytest.raises(RetentionBenchError, match="single row of up to 16 tokens.*--accelerate-config fsdp"):
        run(smallest, store, tmp_path / "done")


@pytest.mark.slow
def test_what_went_wrong_in_a_process_reaches_the_user(plugins, finetune, tmp_path):
    stage, store = finetune
    settings = {**stage.settings, "max_length": 100, "train_size": 4, "validation_size": 1}
    with pytest.raises(UsageError, match="The model takes 64 tokens, the longest row has 100. Set max_length to 64"):
        run(dataclasses.replace(stage, settings=settings), store, tmp_path / "done")
    with pytest.raises(RetentionBenchError, match="ended with code 1.*goes on from its last(?s:.)*about to break"):
        run(dataclasses.replace(stage, task="broken"), store, tmp_path / "done")
    with pytest.raises(RuntimeError, match="prepare(?s:.)*ZeroDivisionError"):
        run(dataclasses.replace(stage, task="wrong"), store, tmp_path / "done")


@pytest.mark.slow
def test_no_process_outlives_the_one_that_was_killed(finetune, tmp_path):
    stage, store = finetune
    endless = dataclasses.replace(stage, settings={**stage.settings, "max_steps": 100_000})
    write_plan(endless, tmp_path / "plan.json")
    code = (
        "import sys; from pathlib import Path\n"
        "from retention_bench.pipeline import Bench\n"
        "from retention_bench.pipeline.plan_file import read_plan\n"
        "from retention_bench.pipeline.stages import STAGES\n"
        "from retention_bench.store import Store\n"
        "say = lambda stage, done, *rest: print(done, flush=True)\n"
        "stage = read_plan(Path(sys.argv[1]), STAGES)[sys.argv[2]]\n"
        "stage.run(Path(sys.argv[4]), Bench(Store(Path(sys.argv[3])), say))"
    )
    arguments = [str(tmp_path / "plan.json"), endless.key, str(store.root), str(tmp_path / "done")]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= 5:  # in full swing
                break
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 3  # the launcher and two workers
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in started):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_lines_of_libraries_are_not_taken_for_messages():
    assert launching._message('{"progress": ["fine-tune", 1, 2, {}]}\n') == {"progress": ["fine-tune", 1, 2, {}]}
    for line in (
        "loading\n",
        "{}\n",
        "[1]\n",
        "3\n",
        '{"loss": 1.0}\n',
        "{broken\n",
        '{"error": "x"}',
        '{"progress": 3}',
    ):
        assert launching._message(line) is None


def test_what_a_process_has_to_say_reaches_the_user(finetune, tmp_path, monkeypatch, caplog, capsys):
    worker._Notices().emit(logging.makeLogRecord({"msg": "%s is damaged", "args": ("checkpoint-4",)}))
    said = capsys.readouterr().out
    (tmp_path / "python").write_text(f"#!/bin/sh\necho '{said.strip()}'\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(launching.sys, "executable", str(tmp_path / "python"))
    stage, store = finetune
    run(stage, store, tmp_path / "done")
    assert caplog.messages == ["checkpoint-4 is damaged"]
