"""How the settings of suite atlas were chosen: editors over layers, limits and group sizes, in one run.

    python benchmarks/atlas_settings.py atlas-gpt2|atlas-llama|FOLDER grid
    python benchmarks/atlas_settings.py atlas-gpt2|atlas-llama|FOLDER seeds [EDITOR,...] [SEED,...]

Prints, for each setting, the share of 50 edits that took (efficacy), of their paraphrases, and of neighbouring and
intrinsic facts that the model still knows right after the edit: `grid` on the facts that one seed draws, `seeds` for
the suite's own settings on several draws from the same pool. benchmarks/README.md says which the settings were
chosen on.
"""

import itertools
import sys
import tempfile
import time
from pathlib import Path

import torch

from retention_bench.editors import (
    Covariance,
    EditContext,
    EditRequest,
    FittedEditor,
    collect_covariance,
    make_editor,
    sample_context_templates,
)
from retention_bench.errors import UsageError
from retention_bench.facts import Fact, FactSet, disjoint_split, knowledge, read_pool
from retention_bench.models import load_model
from retention_bench.pipeline import load_suite
from retention_bench.pipeline.rows import Texts
from retention_bench.scoring import scorable, score

GRID_SEED = 7
SHOWN = {
    "layers": "layers",
    "layer": "layer",
    "modules": "modules",
    "lr": "lr",
    "clamp_norm_factor": "clamp",
    "nullspace_threshold": "threshold",
    "mom2_update_weight": "lambda",
    "v_num_grad_steps": "steps",
    "edits_per_model": "group",
}
"""Settings that a line names, and how."""


def measure(
    model, tokenizer, editor, facts: FactSet, pool: list[Fact], covariance: Covariance, seed: int
) -> dict[str, float]:
    """Rates by kind of question after the edit, pooled over the editor's groups."""
    generator = torch.Generator().manual_seed(seed)
    templates = sample_context_templates(model, tokenizer, generator, lengths=editor.template_lengths)
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        context = EditContext(covariance, templates, generator, fitted=Path(folder))
        if isinstance(editor, FittedEditor):
            # As the pipeline does: on what is not about a subject that is edited or asked.
            drawn = {fact.subject.casefold() for fact in facts}
            others = FactSet.of(fact for fact in pool if fact.subject.casefold() not in drawn)
            editor.fit(model, tokenizer, others, Path(folder), context)
        return edit_and_score(model, tokenizer, editor, facts, context)


def edit_and_score(model, tokenizer, editor, facts: FactSet, context: EditContext) -> dict[str, float]:
    """Edit and score group after group, each in a fresh copy of the model."""
    size = editor.edits_per_model or len(facts.edited)
    hits: dict[str, list[bool]] = {}
    for start in range(0, len(facts.edited), size):
        group = FactSet.of([*facts.edited.facts[start : start + size], *facts.intrinsic])
        delta = editor.edit(model, tokenizer, [EditRequest.from_fact(f) for f in group.edited], context)
        with delta.applied(model):
            for sample in score(model, tokenizer, group):
                hits.setdefault(sample.kind, []).append(sample.hit)
    return {kind: sum(h) / len(h) for kind, h in hits.items()}


def main(name: str, table: str, editors: str = "", seeds: str = "0,1,2,3,4") -> None:
    """Measure one of the two tables on one model."""
    suite = load_suite("atlas")
    name, config = suite.model(name)
    model, tokenizer = load_model(config.path)
    pool, _ = scorable(read_pool(suite.facts.source), tokenizer)
    known = FactSet.of(k.fact for k in knowledge(model, tokenizer, pool) if k.margin >= suite.facts.margin)
    print(f"{name}: {len(known)} of {len(pool)} facts known")
    texts = Texts(suite.covariance.source, None, None, suite.covariance.texts)
    covariance = collect_covariance(model, tokenizer, texts, range(4), max_length=suite.covariance.max_length)
    for layer, moment in covariance.mom2.items():
        values = torch.linalg.eigvalsh(moment.double())
        free = ", ".join(f"{(values < limit).sum()} below {limit:g}" for limit in (0.02, 0.1))
        print(f"layer {layer}: of {len(values)} directions of the keys {free}")

    def show(entry: str, settings: dict, seed: int) -> None:
        began = time.monotonic()
        settings = dict(settings)
        editor = settings.pop("editor", entry)
        facts = disjoint_split(known, edited=suite.facts.edited, intrinsic=suite.facts.intrinsic, seed=seed)
        try:
            rates = measure(model, tokenizer, make_editor(editor, settings), facts, pool, covariance, seed)
            figures = "  ".join(f"{kind} {rate:.2f}" for kind, rate in rates.items())
        except UsageError as error:  # no direction of the keys is below the threshold
            figures = str(error)
        what = "  ".join(f"{short} {settings[setting]}" for setting, short in SHOWN.items() if setting in settings)
        print(f"seed {seed}  {entry:9}  {what:60}  {figures}  ({time.monotonic() - began:.0f} s)", flush=True)

    if table == "seeds":
        for seed, editor in itertools.product(seeds.split(","), editors.split(",") if editors else config.editors):
            show(editor, config.editors[editor], int(seed))
        return
    alphaedit, ft, lora, memit, rome = (config.editors[n] for n in ("alphaedit", "ft", "lora", "memit", "rome"))
    for clamp, threshold in itertools.product((0.75, 2.0), (0.02, 0.1)):
        show("alphaedit", alphaedit | {"clamp_norm_factor": clamp, "nullspace_threshold": threshold}, GRID_SEED)
    for layers in ([0], [0, 1, 2], [1, 2], [2, 3]):
        show("alphaedit", alphaedit | {"layers": layers}, GRID_SEED)
    for group in (10, 50):
        show("alphaedit", alphaedit | {"edits_per_model": group}, GRID_SEED)
    for layer, lr in itertools.product((0, 1, 2), (5e-4, 1e-3, 2e-3)):
        show("ft", ft | {"layer": layer, "lr": lr}, GRID_SEED)
    show("ft", ft | {"lr": 5e-5}, GRID_SEED)  # the paper's
    for lr in (1e-3, 2e-3, 5e-3):
        show("lora", lora | {"modules": "projection", "lr": lr}, GRID_SEED)
    for layers in ([0, 1], [1]):
        show("lora", lora | {"modules": "projection", "layers": layers, "lr": 5e-3}, GRID_SEED)
    for lr in (1e-3, 5e-3):
        show("lora", lora | {"modules": "all-linear", "lr": lr}, GRID_SEED)
    for weight in (20_000.0, 1000.0, 100.0):
        show("memit", memit | {"mom2_update_weight": weight}, GRID_SEED)
    for clamp, group in ((0.75, 10), (2.0, 10), (2.0, 25)):
        show("memit", memit | {"clamp_norm_factor": clamp, "edits_per_model": group}, GRID_SEED)
    for layer in (0, 1, 2):
        show("rome", rome | {"layer": layer}, GRID_SEED)
    show("rome", rome | {"mom2_adjustment": False}, GRID_SEED)


if __name__ == "__main__":
    main(*sys.argv[1:])
