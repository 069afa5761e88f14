"""Checkpoints a minute by `score` and by `lm_eval run` started anew for each; ratios of one run.

    python benchmarks/scoring.py [--checkpoints 20] [--facts 100] [--backends hf[,vllm]] [--model atlas-gpt2]

The checkpoints are a model of suite `atlas` with a little noise on its weights, each with noise of its own. Both ways
ask the same facts, half of them edited, in their own words; times are those of whole processes, with imports and, for
`score`, with the comparison with a fresh model. The script ends with an error if the two ways find different rates.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
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
    pool = read_pool(suite.locate(suite.facts.source), None, None)
    facts = [dataclasses.replace(fact, paraphrases=(), neighborhood=()) for fact in list(pool)[:count]]
    facts[1::2] = [dataclasses.replace(fact, target_new=None) for fact in facts[1::2]]
    FactSet.of(facts).write(folder / "facts.jsonl")
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


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--backends", default="hf")
    parser.add_argument("--model", default="atlas-gpt2")
    args = parser.parse_args()
    ways = {f"score, {backend}": backend for backend in args.backends.split(",")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make(folder, args.model, args.checkpoints, args.facts)
        seconds, rates = {}, {}
        began = time.monotonic()
        rates["lm_eval run"] = by_lm_eval(folder, paths)
        seconds["lm_eval run"] = time.monotonic() - began
        for way, backend in ways.items():
            began = time.monotonic()
            rates[way] = by_score(folder, paths, backend)
            seconds[way] = time.monotonic() - began
    print(f"{args.model}, {args.checkpoints} checkpoints, {args.facts} facts, torch {torch.__version__}\n")
    print("| way | s | checkpoints a minute | ratio |\n|---|---|---|---|")
    for way, took in seconds.items():
        ratio = seconds["lm_eval run"] / took
        print(f"| {way} | {took:.1f} | {60 * args.checkpoints / took:.1f} | {ratio:.1f} |")
    for way in ways:
        if rates[way] != rates["lm_eval run"]:
            sys.exit(f"{way} finds other rates than lm_eval run")


if __name__ == "__main__":
    main()
