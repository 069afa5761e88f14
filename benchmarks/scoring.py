"""Checkpoints a minute by `score` and by `lm_eval run` started anew for each; ratios of one run.

    python benchmarks/scoring.py [--sizes 20x100,3x1000] [--alone 3x10000] [--backends hf[,vllm]] [--model atlas-gpt2]

A size is a number of checkpoints and one of facts; those under `--alone` are scored by `score` alone. The checkpoints
are a model of suite `atlas` with a little noise on its weights, each with noise of its own. Both ways ask the same
facts, half of them edited, in their own words; beyond those of the suite, facts have the prompt and object of one and
the subject of another, and no question occurs twice. Times are those of whole processes, with imports and, for `score`,
with the comparison with a fresh model. The last column is how far apart the rates of the two ways are at most: `score`
judges token ids, `lm_eval` text (tasks/README.md). The script ends with an error if that is more than two points.
"""

import argparse
import dataclasses
import functools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from retention_bench.facts import FactSet, read_pool
from retention_bench.pipeline.suite import load_suite
from retention_bench.scoring import tasks_dir

KINDS = ("edited", "intrinsic")


def make(folder: Path, model: str, checkpoints: int, count: int) -> list[Path]:
    """Write the facts and the checkpoints."""
    suite = load_suite("atlas")
    pool = list(read_pool(suite.facts.source, None, None))
    pool = [dataclasses.replace(fact, paraphrases=(), neighborhood=()) for fact in pool]
    facts = {fact.question: fact for fact in pool[:count]}
    templates = {fact.prompt: fact for fact in pool}.values()
    made = [
        dataclasses.replace(
            like, id=f"{other.id}+{like.id}+{number}", subject=other.subject, prompt=f"{words}{like.prompt}"
        )
        for number, words in enumerate(("", "It is known that "))
        for other in pool
        for like in templates
    ]
    random.Random(0).shuffle(made)
    for fact in made:
        if len(facts) < count:
            facts.setdefault(fact.question, fact)
    assert len(facts) == count
    asked = [dataclasses.replace(f, target_new=None) if n % 2 else f for n, f in enumerate(facts.values())]
    FactSet.of(asked).write(folder / "facts.jsonl")
    base = Path(suite.model(model)[1].path)
    paths = []
    for number in range(checkpoints):
        path = folder / f"checkpoint-{number}"
        shutil.copytree(base, path)
        generator = torch.Generator().manual_seed(number)
        weights = load_file(base / "model.safetensors")
        noisy = {k: w + 0.02 * w.std() * torch.randn(w.shape, generator=generator) for k, w in weights.items()}
        save_file(noisy, path / "model.safetensors", {"format": "pt"})
        paths.append(path)
    return paths


def by_score(folder: Path, paths: list[Path], backend: str) -> dict[str, dict[str, float]]:
    """All of them in one process."""
    out = folder / f"scores-{backend}"
    command = [sys.executable, "-m", "retention_bench.cli", "score", *map(str, paths), "--out", str(out)]
    command += ["--facts", str(folder / "facts.jsonl"), "--backend", backend, "--device", "cpu", "--json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rates: dict[str, dict[str, float]] = {}
    for row in rows:
        rates.setdefault(row["checkpoint"], {})[row["task"]] = row["rate"]
    return rates


def by_lm_eval(folder: Path, paths: list[Path]) -> dict[str, dict[str, float]]:
    """A process for each."""
    tasks = [f"retention_{kind}" for kind in KINDS]
    rates = {}
    for path in paths:
        out = folder / "lm_eval" / path.name
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={path}"]
        command += ["--include_path", str(tasks_dir()), "--tasks", ",".join(tasks), "--output_path", str(out)]
        command += ["--metadata", json.dumps({"facts": str(folder / "facts.jsonl")})]
        command += ["--device", "cpu", "--batch_size", "64"]
        subprocess.run(command, check=True, capture_output=True)
        [found] = out.rglob("results_*.json")
        results = json.loads(found.read_text())["results"]
        rates[str(path)] = {task: results[task]["retention,none"] for task in tasks}
    return rates


def measure(model: str, checkpoints: int, facts: int, backends: Sequence[str], against: bool) -> None:
    """Time all ways for one size, and print a row for each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make(folder, model, checkpoints, facts)
        ways = {"lm_eval run": functools.partial(by_lm_eval, folder, paths)} if against else {}
        ways |= {f"score, {backend}": functools.partial(by_score, folder, paths, backend) for backend in backends}
        seconds, rates = {}, {}
        for way, run in ways.items():
            began = time.monotonic()
            rates[way] = run()
            seconds[way] = time.monotonic() - began
    for way, took in seconds.items():
        row = [checkpoints, f"{facts:,}", way, f"{took:.1f}", f"{60 * checkpoints / took:.1f}", "", ""]
        if against:
            plain = rates["lm_eval run"]
            apart = max(abs(rates[way][path][task] - plain[path][task]) for path in plain for task in plain[path])
            row[-2:] = f"{seconds['lm_eval run'] / took:.1f}", f"{100 * apart:.2f}"
            if apart > 0.02:
                sys.exit(f"{way} finds other rates than lm_eval run, by {100 * apart:.2f} points")
        print("|", " | ".join(map(str, row)), "|", flush=True)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="20x100,3x1000")
    parser.add_argument("--alone", default="3x10000")
    parser.add_argument("--backends", default="hf")
    parser.add_argument("--model", default="atlas-gpt2")
    args = parser.parse_args()
    print(f"{args.model}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| checkpoints | facts | way | s | checkpoints a minute | ratio | rates apart, points |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for sizes, against in ((args.sizes, True), (args.alone, False)):
        for size in filter(None, sizes.split(",")):
            checkpoints, facts = map(int, size.split("x"))
            measure(args.model, checkpoints, facts, args.backends.split(","), against)


if __name__ == "__main__":
    main()
