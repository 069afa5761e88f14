"""How the settings of suite atlas were chosen: AlphaEdit and FT over layers, limits and group sizes, in one run.

    python benchmarks/atlas_settings.py [atlas-gpt2|atlas-llama]

Prints, for each setting, the share of 50 edits that took (efficacy), of their paraphrases, and of neighbouring and
intrinsic facts that the model still knows right after the edit.
"""

import itertools
import sys
import time

import torch

from retention_bench.editors import (
    EditContext,
    EditRequest,
    KeyStatistics,
    collect_key_statistics,
    make_editor,
    sample_context_templates,
)
from retention_bench.facts import FactSet, disjoint_split, knowledge, read_pool
from retention_bench.models import load_model
from retention_bench.pipeline import load_suite
from retention_bench.pipeline.rows import read_texts
from retention_bench.scoring import score


def measure(model, tokenizer, editor, facts: FactSet, context: EditContext) -> dict[str, float]:
    """Rates by kind of question after the edit, pooled over the editor's groups."""
    size = editor.edits_per_model or len(facts.edited)
    hits: dict[str, list[bool]] = {}
    for start in range(0, len(facts.edited), size):
        group = FactSet.of([*facts.edited.facts[start : start + size], *facts.intrinsic])
        delta = editor.edit(model, tokenizer, [EditRequest.from_fact(f) for f in group.edited], context)
        with delta.applied(model):
            for sample in score(model, tokenizer, group):
                hits.setdefault(sample.kind, []).append(sample.hit)
    return {kind: sum(h) / len(h) for kind, h in hits.items()}


def main(name: str) -> None:
    """Measure every setting on one model."""
    suite = load_suite("atlas")
    _, config = suite.model(name)
    model, tokenizer = load_model(config.path)
    known = [k for k in knowledge(model, tokenizer, read_pool(suite.locate(suite.facts.source))) if k.margin >= 0.1]
    facts = disjoint_split(FactSet.of(k.fact for k in known), edited=50, intrinsic=100, seed=0)
    print(f"{name}: {len(known)} facts known, base {measure_base(model, tokenizer, facts)}")
    texts = read_texts(suite.locate(suite.statistics.source), None, None, suite.statistics.texts)
    statistics: KeyStatistics = collect_key_statistics(
        model, tokenizer, texts, [0, 1, 2, 3], max_length=suite.statistics.max_length
    )
    context = EditContext(
        statistics=statistics,
        templates=sample_context_templates(model, tokenizer, torch.Generator().manual_seed(0)),
    )
    chosen = config.editors["alphaedit"]
    # The settings as shipped for large models beside the suite's, one and both; then the size of the groups.
    for clamp, threshold in itertools.product(
        (0.75, chosen["clamp_norm_factor"]), (0.02, chosen["nullspace_threshold"])
    ):
        settings = chosen | {"clamp_norm_factor": clamp, "nullspace_threshold": threshold}
        show("alphaedit", settings, model, tokenizer, facts, context)
    for group in {10, 25, 50} - {chosen["edits_per_model"]}:
        show("alphaedit", chosen | {"edits_per_model": group}, model, tokenizer, facts, context)
    for layer, lr in itertools.product((0, 1, 2), (5e-4, 1e-3, 2e-3)):
        show("ft", config.editors["ft"] | {"layer": layer, "lr": lr}, model, tokenizer, facts, context)


def measure_base(model, tokenizer, facts: FactSet) -> dict[str, float]:
    """Rates by kind of question before any edit."""
    samples = score(model, tokenizer, facts)
    kinds = dict.fromkeys(s.kind for s in samples)
    return {k: sum(s.hit for s in samples if s.kind == k) / sum(s.kind == k for s in samples) for k in kinds}


def show(name, settings, model, tokenizer, facts, context) -> None:
    """Measure one setting and print a line."""
    began = time.monotonic()
    rates = measure(model, tokenizer, make_editor(name, settings), facts, context)
    shown = ("layers", "layer", "lr", "clamp_norm_factor", "nullspace_threshold", "edits_per_model")
    what = ", ".join(f"{n} {settings[n]}" for n in shown if n in settings)
    figures = "  ".join(f"{kind} {rate:.2f}" for kind, rate in rates.items())
    print(f"{name:9} {what:86} {figures}  ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "atlas-gpt2")
