"""How far the editors' numbers are from those of their authors' code, on the reference runs in tests/golden.

    python benchmarks/parity.py [--device cpu|cuda]

Prints for every run the largest relative error of what the run's file holds (values, directions, weight changes) and
the largest difference of a target's probability after the edit. The tests hold these to the tolerances that
retention_bench/editors/README.md gives; this shows how much of each tolerance is used.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from retention_bench.editors import (
    EditContext,
    EditRequest,
    collect_covariance,
    edit_sequentially,
    make_editor,
)
from retention_bench.models import load_model

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative distance."""
    return ((found - expected).norm() / expected.norm()).item()


def dense(entry) -> torch.Tensor:
    """A delta's entry as one matrix."""
    return entry if isinstance(entry, torch.Tensor) else entry.left @ entry.right


def change_errors(delta, arrays, keys) -> float:
    """The largest relative error of weight changes, over the columns that were kept and the norm of the whole."""
    worst = 0.0
    for entry, key in zip(delta.entries.values(), keys, strict=True):
        change = dense(entry)
        if change.dim() == 1:
            worst = max(worst, relative(change, arrays[key]))
            continue
        columns = arrays[f"{key}.columns"]
        worst = max(worst, relative(change[:, : columns.shape[1]], columns))
        worst = max(worst, abs(change.norm().item() / arrays[f"{key}.norm"].item() - 1))
    return worst


@torch.no_grad()
def probabilities(model, tokenizer, requests) -> list[float]:
    """The probability of every request's target."""
    found = []
    for request in requests:
        prompt = tokenizer.encode(request.prompt.replace("{}", request.subject))
        target = tokenizer.encode(f" {request.target_new}", add_special_tokens=False)
        logits = (
            model(torch.tensor([prompt + target], device=model.device)).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        )
        found.append(logits[range(len(target)), target].sum().exp().item())
    return found


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = parser.parse_args().device
    expected = json.loads((GOLDEN / "expected.json").read_text())
    model, tokenizer = load_model(str(GOLDEN / "model-gpt2"), device=device)
    requests = [EditRequest(**request) for request in expected["requests"]]
    texts = json.loads((GOLDEN / "stats_texts.json").read_text())
    covariance = collect_covariance(model, tokenizer, texts, [0, 1, 2], max_length=128)
    context = EditContext(covariance=covariance, templates=tuple(expected["templates"]))
    rome_context = EditContext(covariance=covariance, templates=tuple(expected["rome_templates"]))
    print("| editor | run | weight change, direction: largest relative error | probability: largest difference |")
    print("|---|---|---|---|")

    def show(editor: str, run: str, error: float, delta, asked, wanted) -> None:
        with delta.applied(model):
            found = probabilities(model, tokenizer, asked)
        apart = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
        print(f"| {editor} | {run} | {error:.1e} | {apart:.1e} |", flush=True)

    arrays = load_file(GOLDEN / "rome.safetensors")
    for run, reference in expected["rome"].items():
        editor = make_editor("rome", reference["settings"])
        if run == "sequential":
            delta = editor.edit(model, tokenizer, requests, rome_context)
            show(
                "rome",
                run,
                change_errors(delta, arrays, [f"{run}.delta_w"]),
                delta,
                requests,
                reference["probabilities"],
            )
            continue
        worst, apart = 0.0, 0.0
        for number, request in enumerate(requests):
            delta = editor.edit(model, tokenizer, [request], rome_context)
            [entry] = delta.entries.values()
            worst = max(worst, relative(entry.left[:, 0], arrays[f"{run}.{number}.left_u"]))
            worst = max(worst, relative(entry.right[0], arrays[f"{run}.{number}.right_r"]))
            with delta.applied(model):
                [found] = probabilities(model, tokenizer, [request])
            apart = max(apart, abs(found - reference["probabilities"][number]))
        print(f"| {reference['settings']['variant']} | {run} | {worst:.1e} | {apart:.1e} |", flush=True)

    arrays = load_file(GOLDEN / "memit.safetensors")
    for run, reference in expected["memit"].items():
        editor = make_editor("memit", reference["settings"])
        asked = requests[: reference["requests"]]
        delta = editor.edit(model, tokenizer, asked, context)
        error = change_errors(delta, arrays, [f"{run}.layer{layer}.delta_w" for layer in editor.layers])
        show("memit", run, error, delta, asked, reference["probabilities"])

    arrays = load_file(GOLDEN / "alphaedit.safetensors")
    for run in ("batch5", "seq2"):
        reference = expected["alphaedit"][run]
        groups = [[request for request in requests if request.fact_id in ids] for ids in reference["batches"]]
        editor = make_editor("alphaedit", {"layers": [0, 1, 2], "L2": 0.1})
        deltas = edit_sequentially(editor, model, tokenizer, groups, context)
        error = max(
            change_errors(delta, arrays, [f"{run}.b{number}.layer{layer}.delta_w" for layer in range(3)])
            for number, delta in enumerate(deltas)
        )
        show("alphaedit", run, error, sum(deltas[1:], deltas[0]), requests, reference["probabilities"])

    arrays = load_file(GOLDEN / "ft.safetensors")
    for run, reference in expected["ft"].items():
        given = reference["hparams"]
        editor = make_editor(
            "ft",
            {
                "layer": given["layers"][0],
                "lr": given["lr"],
                "objective": "target" if run.startswith("easyedit") else "prompt_last",
                "norm_constraint": given["norm_constraint"] or None,
            },
        )
        worst, apart = 0.0, 0.0
        for number, each in enumerate(reference["runs"]):
            asked = [request for request in requests if request.fact_id in each["requests"]]
            delta = editor.edit(model, tokenizer, asked, context)
            worst = max(worst, change_errors(delta, arrays, [f"{run}.{number}.delta.{name}" for name in delta.entries]))
            with delta.applied(model):
                found = probabilities(model, tokenizer, asked)
            apart = max(apart, *(abs(a - b) for a, b in zip(found, each["probabilities"], strict=True)))
        print(f"| ft | {run} | {worst:.1e} | {apart:.1e} |", flush=True)


if __name__ == "__main__":
    main()
