"""What a GPU changes: the same answers as the CPU's, and how fast it scores and collects a covariance.

    python benchmarks/gpu.py answers [--facts N] [--device cuda|cpu]
    python benchmarks/gpu.py scoring [--shape gpt2-xl|gpt2] [--checkpoints 4] [--device cuda|cpu]
    python benchmarks/gpu.py covariance [--shape gpt2-xl|gpt2] [--layers 13-17] [--texts 200] [--device cuda|cpu]

"answers": both models of suite `atlas`, a noisy copy of each and one with an edit on top, asked all kinds of question
on the CPU and on the GPU, there in float32 and in bfloat16; `score` compares each first one with a fresh model.
"scoring": `score` of checkpoints with random weights of the shape, bfloat16 on disk and on the device, against an
`lm_eval run` for each; times are those of whole processes.
"covariance": the covariance of the keys of a model with random weights, float32, on texts of 1,024 random tokens.
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
from editing import make_facts, make_model
from safetensors.torch import load_file, save_file

from retention_bench.editors import collect_covariance
from retention_bench.facts import Fact, FactSet, read_pool
from retention_bench.models import WeightDelta
from retention_bench.pipeline.suite import load_suite
from retention_bench.scoring import tasks_dir


def where(device: str) -> str:
    """The device by name."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"


def score(names: list[str], facts: Path, out: Path, device: str, dtype: str, *more: str) -> tuple[list[dict], float]:
    """The rows of `score`, read from its file, and its seconds."""
    command = [sys.executable, "-m", "retention_bench.cli", "score", *names, "--facts", str(facts), "--out", str(out)]
    command += ["--backend", "hf", "--device", device, "--dtype", dtype, *more]
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    took = time.monotonic() - began
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()], took


def noisy(base: Path, path: Path) -> str:
    """A copy of a model's folder with a little noise on its weights, as `benchmarks/scoring.py` makes them."""
    shutil.copytree(base, path)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(base / "model.safetensors")
    changed = {k: w + 0.02 * w.std() * torch.randn(w.shape, generator=generator) for k, w in weights.items()}
    save_file(changed, path / "model.safetensors", {"format": "pt"})
    return str(path)


def answers(options: argparse.Namespace, folder: Path) -> None:
    """Every question on the CPU and on the device."""
    suite = load_suite("atlas")
    pool = list(read_pool(suite.facts.source, None, None))[: options.facts]
    facts = [dataclasses.replace(f, target_new=None) if n % 2 else f for n, f in enumerate(pool)]
    FactSet.of(facts).write(folder / "facts.jsonl")
    names = []
    for model in ("atlas-gpt2", "atlas-llama"):
        base = Path(suite.model(model)[1].path)
        names += [str(base), noisy(base, folder / f"{model}-noisy")]
        weights = load_file(base / "model.safetensors")
        name = next(n for n in weights if n.endswith(("h.1.mlp.c_proj.weight", "layers.1.mlp.down_proj.weight")))
        weight = weights[name]
        change = weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        WeightDelta({name: change}).save(folder / f"{model}.delta.safetensors")
        names.append(f"{base}+{folder / model}.delta.safetensors")
    runs = {("cpu", "float32"): score(names, folder / "facts.jsonl", folder / "cpu", "cpu", "float32")}
    for dtype in ("float32", "bfloat16"):
        runs[options.device, dtype] = score(
            names, folder / "facts.jsonl", folder / f"device-{dtype}", options.device, dtype
        )
    print(f"{where(options.device)}, torch {torch.__version__}, {len(facts)} facts, {len(names)} checkpoints\n")
    print(
        "| checkpoint | dtype | questions | hits, CPU | hits | other hits | other ids | logprob apart, mean | largest |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    wanted = {(row["checkpoint"], row["task"]): row for row in runs["cpu", "float32"][0]}
    for (device, dtype), (rows, _) in runs.items():
        if (device, dtype) == ("cpu", "float32"):
            continue
        for name in names:
            pairs = [
                (a, b)
                for row in rows
                if row["checkpoint"] == name
                for a, b in zip(wanted[name, row["task"]]["samples"], row["samples"], strict=True)
            ]
            assert all((a["fact_id"], a["prompt"]) == (b["fact_id"], b["prompt"]) for a, b in pairs)
            apart = [abs(a["logprob"] - b["logprob"]) for a, b in pairs]
            short = name.replace(str(folder), "").rsplit("/", 1)[-1]
            print(
                f"| {short} | {dtype} | {len(pairs)} | {sum(a['hit'] for a, _ in pairs)} "
                f"| {sum(b['hit'] for _, b in pairs)} | {sum(a['hit'] != b['hit'] for a, b in pairs)} "
                f"| {sum(a['token_ids'] != b['token_ids'] for a, b in pairs)} | {sum(apart) / len(apart):.1e} "
                f"| {max(apart):.1e} |"
            )
    for (device, dtype), (rows, took) in runs.items():
        parity = {json.dumps({k: v for k, v in row["parity"].items() if k != "checkpoint"}) for row in rows}
        print(f"\n{device}, {dtype}: {took:.1f} s; compared with a fresh model: {', '.join(sorted(parity))}")


def scoring(options: argparse.Namespace, folder: Path) -> None:
    """Many checkpoints by `score` and by `lm_eval run`."""
    tokenizer, requests, _ = make_facts(100)
    facts = [
        Fact(f"f{n}", r.subject, "P0", r.prompt, f"w{n}", f"w{n + 1000}" if n % 2 else None)
        for n, r in enumerate(requests)
    ]
    FactSet.of(facts).write(folder / "facts.jsonl")
    tokenizer.add_special_tokens({"eos_token": ".", "pad_token": "."})
    model = make_model(options.shape, options.device).to(torch.bfloat16)
    paths = []
    began = time.monotonic()
    for number in range(options.checkpoints):
        model.transformer.ln_f.bias.data.fill_(0.01 * number)  # enough to be another checkpoint
        path = folder / f"checkpoint-{number}"
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        paths.append(path)
    size = sum(file.stat().st_size for file in paths[0].iterdir()) / 2**30
    print(f"{len(paths)} checkpoints of {size:.2f} GiB written in {time.monotonic() - began:.1f} s", flush=True)
    del model
    if options.device == "cuda":
        torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {"score, hf": [], "lm_eval run": []}
    rates: dict[str, dict] = {"score, hf": {}, "lm_eval run": {}}
    rows, took = score(list(map(str, paths)), folder / "facts.jsonl", folder / "scores", options.device, "bfloat16")
    seconds["score, hf"] = [took]
    rates["score, hf"] = {(row["checkpoint"], row["task"]): row["rate"] for row in rows}
    for path in paths:
        out = folder / "lm_eval" / path.name
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
        command += ["--model_args", f"pretrained={path},dtype=bfloat16", "--include_path", str(tasks_dir())]
        command += ["--tasks", "retention_edited,retention_intrinsic", "--output_path", str(out), "--batch_size", "64"]
        command += ["--metadata", json.dumps({"facts": str(folder / "facts.jsonl")}), "--device", options.device]
        began = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        seconds["lm_eval run"].append(time.monotonic() - began)
        [found] = out.rglob("results_*.json")
        results = json.loads(found.read_text())["results"]
        rates["lm_eval run"] |= {(str(path), task): results[task]["retention,none"] for task in results}
    print(
        f"{options.shape}-shaped random weights in bfloat16, {where(options.device)}, {len(paths)} checkpoints, ",
        end="",
    )
    print(f"{len(facts)} facts, torch {torch.__version__}\n")
    print("| way | s | checkpoints a minute | ratio |\n|---|---|---|---|")
    for way, took in seconds.items():
        ratio = sum(seconds["lm_eval run"]) / sum(took)
        print(f"| {way} | {sum(took):.1f} | {60 * len(paths) / sum(took):.1f} | {ratio:.1f} |")
    print(f"\nEach lm_eval run: {', '.join(f'{took:.1f}' for took in seconds['lm_eval run'])} s")
    if rates["score, hf"] != rates["lm_eval run"]:
        sys.exit("score finds other rates than lm_eval run")


def covariance(options: argparse.Namespace, folder: Path) -> None:
    """Tokens a second."""
    model = make_model(options.shape, options.device)
    generator = torch.Generator().manual_seed(0)
    texts = [
        " ".join(map(str, row.tolist())) for row in torch.randint(50257, (options.texts, 1024), generator=generator)
    ]

    def as_ids(texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(token) for token in text.split()][:max_length] for text in texts]}

    def run(texts: list[str]) -> int:
        return collect_covariance(model, as_ids, texts, options.layers, max_length=1024).tokens

    run(texts[:8])
    began = time.perf_counter()
    tokens = run(texts)  # ends with the matrices on the CPU
    took = time.perf_counter() - began
    print(f"{options.shape}-shaped random model in float32, {where(options.device)}, torch {torch.__version__}")
    print(f"layers {options.layers}: {tokens} tokens in {took:.2f} s, {tokens / took:.0f} tokens a second")
    print(f"100,000 texts of 1,024 tokens would take {100_000 * 1024 / tokens * took / 3600:.2f} h")
    if options.device == "cuda":
        print(f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of tensors on the GPU")


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["answers", "scoring", "covariance"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--shape", choices=["gpt2", "gpt2-xl"], default="gpt2-xl")
    parser.add_argument("--facts", type=int, help="only the first of the atlas facts")
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--layers", default="13-17")
    options = parser.parse_args()
    first, _, last = options.layers.partition("-")
    options.layers = list(range(int(first), int(last or first) + 1))
    with tempfile.TemporaryDirectory() as folder:
        {"answers": answers, "scoring": scoring, "covariance": covariance}[options.part](options, Path(folder))


if __name__ == "__main__":
    main()
