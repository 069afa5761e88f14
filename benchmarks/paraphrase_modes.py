"""Paraphrases of an edit as one request and as a request each, right after the edit, on suite atlas; a table row each.

    python benchmarks/paraphrase_modes.py EDITOR[,EDITOR] N[,N] [SEED] [SOURCE]

Only edits and scores are computed, with the store that `evaluate` uses. The paraphrases that are asked are those that
no arm was edited with, the same for all arms: template openings are never among a fact's own.
"""

import math
import sys

from retention_bench.pipeline import Bench, Cell, load_suite, plan
from retention_bench.store import Store, default_root

COLUMNS = (
    "editor | N | mode | requests a model | edits that took | probability of the new object | paraphrases | "
    "locality | intrinsic"
)


def row(bench: Bench, editor: str, count: int, mode: str, seed: int, source: str) -> str:
    """Edit and score one arm, and put it into a table row."""
    given = {"paraphrases": count, "paraphrase_source": source, "paraphrase_mode": mode} if count else {}
    last = plan(Cell(load_suite("atlas"), None, editor, "tulu3", seed, "cpu", **given))
    samples = [sample for e in last.experiments for sample in e.after_edit.read(bench)]

    def share(kind: str) -> str:
        hits = [sample.hit for sample in samples if sample.kind == kind]
        return f"{sum(hits)}/{len(hits)}"

    new = [math.exp(s.logprob) for s in samples if s.kind == "edited" and s.logprob is not None]
    facts = last.experiments[0].group.stop - last.experiments[0].group.start
    requests = facts * (1 + count) if mode == "separate" else facts
    return " | ".join(
        [
            editor,
            str(count),
            mode if count else "-",
            str(requests),
            share("edited"),
            f"{sum(new) / len(new):.3f}",
            *(share(kind) for kind in ("paraphrase", "locality", "intrinsic")),
        ]
    )


if __name__ == "__main__":
    editors, counts = sys.argv[1].split(","), [int(count) for count in sys.argv[2].split(",")]
    seed, source = int(dict(enumerate(sys.argv)).get(3, "0")), dict(enumerate(sys.argv)).get(4, "template")
    bench = Bench(Store(default_root()))
    print(f"| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}")
    for editor in editors:
        for count in counts:
            for mode in ("mean", "separate") if count else ("mean",):
                print(f"| {row(bench, editor, count, mode, seed, source)} |", flush=True)
