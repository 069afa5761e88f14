"""Covariance: five layers in one pass against passes as the references' `layer_stats` makes them.

    python benchmarks/covariance.py [THREADS]

A GPT-2 of the small one's shape with random weights; 100 texts of 50 to 600 random tokens, of which every sixth of the
references' batches is taken: 100 texts would take some ten minutes, and a few texts alone would pad more than 100 do.
A reference pass is for one layer: batches of texts of similar length, at most 3 * 1,024 tokens with padding, and a
mask; the forward pass is stopped at that layer, or runs to the logits; k^T k is added in float32. Passes to the logits
cost the same for each layer: one is measured, and counted five times. Every measurement has a process of its own, one
after the other, and a pass over two texts goes before each. Printed are seconds, seconds of processor time (with one
thread, the figure to trust where others use the machine), how many times ours they are, and the peak of the resident
memory.
"""

import contextlib
import json
import resource
import subprocess
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from retention_bench.editors import collect_covariance
from retention_bench.models import frozen, pad, projection

LAYERS = {"3-7": [3, 4, 5, 6, 7], "7-11": [7, 8, 9, 10, 11]}
WAYS = ("one pass", "pass a layer, stopped there", "pass a layer, whole model")
EVERY = 6

Row = list[int]


class Stop(Exception):  # noqa: N818 - no error
    """Ends a forward pass."""


def drawn_batches() -> list[list[Row]]:
    """Every sixth of the references' batches of 100 texts, the longest texts first."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(50, 601, (100,), generator=generator).tolist()
    found: list[list[Row]] = [[]]
    for length in sorted(lengths, reverse=True):
        if found[-1] and len(found[-1][0]) * (len(found[-1]) + 1) > 3 * 1024:
            found.append([])
        found[-1].append(torch.randint(50257, (length,), generator=generator).tolist())
    return found[EVERY // 2 :: EVERY]


def as_ids(texts: list[str], truncation: bool, max_length: int) -> dict[str, list[Row]]:
    """Stand in for a tokenizer, for texts that are token ids already."""
    return {"input_ids": [[int(token) for token in text.split()][:max_length] for text in texts]}


@torch.no_grad()
def reference(model, batches: list[list[Row]], layer: int, whole: bool) -> torch.Tensor:
    """The second moment of one layer, as `layer_stats` takes it."""
    held: list[torch.Tensor] = []

    def keep(module, inputs, output):
        held.append(inputs[0])
        if not whole:
            raise Stop

    handle = projection(model, layer).register_forward_hook(keep)
    total, tokens = torch.zeros(3072, 3072), 0
    for batch in batches:
        ids, mask = pad(batch, model.device)
        with contextlib.suppress(Stop):
            model(input_ids=ids, attention_mask=mask)
        keys = held.pop()[mask.bool()]
        total += keys.T @ keys
        tokens += len(keys)
    handle.remove()
    return total / tokens


def measure(way: str, layers: list[int], threads: int) -> dict[str, float]:
    """Seconds, peak memory, and a figure to compare results by."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()

    def run(batches: list[list[Row]], layers: list[int]) -> list[torch.Tensor]:
        if way == WAYS[0]:
            texts = [" ".join(map(str, row)) for batch in batches for row in batch]
            return list(collect_covariance(model, as_ids, texts, layers, max_length=1024).mom2.values())
        with frozen(model):
            return [reference(model, batches, layer, way == WAYS[2]) for layer in layers]

    batches = drawn_batches()
    run([batches[0][:2]], layers[:1])
    began, used = time.perf_counter(), time.process_time()
    moments = run(batches, layers)
    return {
        "seconds": time.perf_counter() - began,
        "processor": time.process_time() - used,
        "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "norm": sum(moment.norm().item() for moment in moments),
    }


def main(threads: int) -> None:
    """Measure everything and print a table row each."""
    batches = drawn_batches()
    tokens = sum(len(row) for batch in batches for row in batch)
    print(f"{sum(map(len, batches))} texts, {tokens} tokens, {threads} threads")
    print("| layers | way | seconds | ratio | processor seconds | ratio | peak MiB |\n|---|---|---|---|---|---|---|")
    whole = None
    for name, layers in LAYERS.items():
        ours = _in_a_process(WAYS[0], layers, threads)
        stopped = _in_a_process(WAYS[1], layers, threads)
        assert abs(stopped["norm"] / ours["norm"] - 1) < 1e-4, "the moments differ"
        whole = whole or _in_a_process(WAYS[2], layers[:1], threads)
        five = {**whole, **{kind: 5 * whole[kind] for kind in ("seconds", "processor")}}
        for way, found in zip(WAYS, (ours, stopped, five), strict=True):
            times = (f"{found[kind]:.1f} | {found[kind] / ours[kind]:.1f}" for kind in ("seconds", "processor"))
            print(f"| {name} | {way} | {' | '.join(times)} | {found['MiB']:.0f} |", flush=True)


def _in_a_process(way: str, layers: list[int], threads: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    asked = json.dumps([way, layers, threads])
    done = subprocess.run([sys.executable, __file__, asked], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("["):
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 2)
