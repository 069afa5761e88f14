"""How the settings of suite atlas were chosen: AlphaEdit and FT over layers, limits and group sizes, in one run.

    python benchmarks/atlas_settings.py atlas-gpt2|atlas-llama|FOLDER grid|seeds

Prints, for each setting, the share of 50 edits that took (efficacy), of their paraphrases, and of neighbouring and
intrinsic facts that the model still knows right after the edit: `grid` on the facts that one seed draws, `seeds` for
the suite's own settings on several draws from the same pool. benchmarks/README.md says which the settings were
chosen on.
"""

import itertools
import sys
import time

import torch

from retention_bench.editors import (
    EditContext,
    EditRequest,
    collect_key_statistics,
    make_editor,
    sample_context_templates,
)
from retention_bench.errors import UsageError
from retention_bench.facts import FactSet, disjoint_split, knowledge, read_pool
from retention_bench.models import load_model
from retention_bench.pipeline import load_suite
from retention_bench.pipeline.rows import Texts
from retention_bench.scoring import is_scorable, score

GRID_SEED = 7
SEEDS = range(5)
SHOWN = {
    "layers": "layers",
    "layer": "layer",
    "lr": "lr",
    "clamp_norm_factor": "clamp",
    "nullspace_threshold": "threshold",
    "v_num_grad_steps": "steps",
    "edits_per_model": "group",
}
"""Settings that a line names, and how."""


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


def main(name: str, table: str) -> None:
    """Measure one of the two tables on one model."""
    suite = load_suite("atlas")
    name, config = suite.model(name)
    model, tokenizer = load_model(config.path)
    pool = [
        fact
        for fact in read_pool(suite.locate(suite.facts.source))
        if is_scorable(fact.target_true, tokenizer) and is_scorable(fact.target_new, tokenizer)
    ]
    known = FactSet.of(k.fact for k in knowledge(model, tokenizer, FactSet.of(pool)) if k.margin >= suite.facts.margin)
    print(f"{name}: {len(known)} of {len(pool)} facts known")
    texts = Texts(suite.locate(suite.statistics.source), None, None, suite.statistics.texts)
    statistics = collect_key_statistics(model, tokenizer, texts, range(4), max_length=suite.statistics.max_length)
    for layer, moment in statistics.moments.items():
        values = torch.linalg.eigvalsh(moment.double())
        free = ", ".join(f"{(values < limit).sum()} below {limit:g}" for limit in (0.02, 0.1))
        print(f"layer {layer}: of {len(values)} directions of the keys {free}")

    def show(editor: str, settings: dict, seed: int) -> None:
        began = time.monotonic()
        facts = disjoint_split(known, edited=suite.facts.edited, intrinsic=suite.facts.intrinsic, seed=seed)
        templates = sample_context_templates(model, tokenizer, torch.Generator().manual_seed(seed))
        context = EditContext(statistics=statistics, templates=templates)
        try:
            rates = measure(model, tokenizer, make_editor(editor, settings), facts, context)
            figures = "  ".join(f"{kind} {rate:.2f}" for kind, rate in rates.items())
        except UsageError as error:  # no direction of the keys is below the threshold
            figures = str(error)
        what = "  ".join(f"{short} {settings[setting]}" for setting, short in SHOWN.items() if setting in settings)
        print(f"seed {seed}  {editor:9}  {what:60}  {figures}  ({time.monotonic() - began:.0f} s)", flush=True)

    alphaedit, ft = config.editors["alphaedit"], config.editors["ft"]
    if table == "seeds":
        for seed in SEEDS:
            show("alphaedit", alphaedit, seed)
            show("ft", ft, seed)
        return
    for clamp, threshold in itertools.product((0.75, 2.0), (0.02, 0.1)):
        show("alphaedit", alphaedit | {"clamp_norm_factor": clamp, "nullspace_threshold": threshold}, GRID_SEED)
    for layers in ([0], [0, 1, 2], [1, 2], [2, 3]):
        show("alphaedit", alphaedit | {"layers": layers}, GRID_SEED)
    for group in (10, 50):
        show("alphaedit", alphaedit | {"edits_per_model": group}, GRID_SEED)
    for layer, lr in itertools.product((0, 1, 2), (5e-4, 1e-3, 2e-3)):
        show("ft", ft | {"layer": layer, "lr": lr}, GRID_SEED)
    show("ft", ft | {"lr": 5e-5}, GRID_SEED)  # the paper's


if __name__ == "__main__":
    main(*sys.argv[1:])
