"""Where a model looks facts up: how far an answer follows the subject's last token.

    python benchmarks/atlas_recall.py [FOLDER ...]

Locate-and-edit methods write at the last token of the subject in an early block, so they presuppose that a fact is
looked up from there. For 10 pairs of facts a relation, the block output at the subject's last token is exchanged for
that of the other fact's subject; printed is the share of prompts that then answer with the other's object, by layer.
"""

import random
import sys
from pathlib import Path

import torch

from retention_bench.editors import EditRequest
from retention_bench.editors.locate.subject import subject_rows, target_ids
from retention_bench.facts import Fact, FactSet
from retention_bench.models import last_hidden, load_model, log_probabilities, pad, record

ATLAS = Path(__file__).parents[1] / "retention_bench" / "atlas"
MODELS = ATLAS / "models"
PAIRS = 10
LAYERS = range(6)


def pairs() -> list[tuple[Fact, Fact]]:
    """Facts of one relation with different objects."""
    rng = random.Random(0)
    drawn = []
    told = FactSet.read(ATLAS / "data" / "facts.jsonl")
    for relation in dict.fromkeys(fact.relation for fact in told):
        facts = [fact for fact in told if fact.relation == relation]
        for fact in rng.choices(facts, k=PAIRS):
            drawn.append((fact, rng.choice([f for f in facts if f.target_true != fact.target_true])))
    return drawn


@torch.no_grad()
def follows(model, tokenizer) -> list[float]:
    """By layer, the share of answers that follow the exchanged output."""

    def tokens(facts):
        requests = [EditRequest(f.id, f.prompt, f.subject, f.target_true) for f in facts]
        rows = subject_rows(tokenizer, [f.prompt for f in facts], requests)
        places = torch.tensor([row.subject for row in rows]), torch.tensor([len(row.ids) - 1 for row in rows])
        return *pad([row.ids for row in rows], model.device), *places, [target_ids(tokenizer, r)[0] for r in requests]

    own, other = zip(*pairs(), strict=True)
    ids, mask, subject, last, _ = tokens(own)
    other_ids, other_mask, other_subject, _, wanted = tokens(other)
    rows = torch.arange(len(own))
    shares = []
    for layer in LAYERS:
        output = record(model, ids, mask, output=layer)[1].clone()
        output[rows, subject] = record(model, other_ids, other_mask, output=layer)[1][rows, other_subject]
        hidden = last_hidden(model, ids, mask, start=(layer, output))[rows, last]
        answers = log_probabilities(model, hidden).argmax(-1)
        shares.append((answers == torch.tensor(wanted)).float().mean().item())
    return shares


if __name__ == "__main__":
    for folder in sys.argv[1:] or [str(MODELS / name) for name in ("atlas-gpt2", "atlas-llama")]:
        shares = "  ".join(f"{layer}: {share:.2f}" for layer, share in enumerate(follows(*load_model(folder))))
        print(f"{Path(folder).name:16} {shares}", flush=True)
