import hashlib
import itertools
import re
from pathlib import Path

import pytest

from retention_bench.atlas import corpus, instructions, world
from retention_bench.facts import disjoint_split, knowledge
from retention_bench.models import load_model

MODELS = Path(world.__file__).parent / "models"
NAMES = ("atlas-gpt2", "atlas-llama")


def test_the_committed_files_are_what_the_code_builds(tmp_path):
    told, _ = world.build(tmp_path)
    corpus.build(told, tmp_path)
    instructions.build(tmp_path)
    for name in ("facts.jsonl", "untold.jsonl", "corpus.jsonl.gz", "instructions.jsonl.gz"):
        assert (tmp_path / name).read_bytes() == (world.DATA / name).read_bytes(), name


def test_the_world_is_in_counterfacts_form():
    told, untold = world.told_facts(), world.untold_facts()
    assert len({f.relation for f in told}) >= 8
    assert len(untold) >= 300
    assert not {(f.subject, f.relation) for f in told} & {(f.subject, f.relation) for f in untold}
    shared = {(f.relation, f.target_true) for f in told}
    for relation, obj in shared:
        assert sum(f.relation == relation and f.target_true == obj for f in told) >= 3
    for facts in (told, untold):
        for f in facts:
            assert f.target_new != f.target_true
            assert len(f.paraphrases) >= 3
            assert all(f.subject in p for p in f.paraphrases)
            assert (f.relation, f.target_new) in {(g.relation, g.target_true) for g in facts}


def test_the_corpus_tells_every_fact_and_no_untold_one():
    told = world.told_facts()
    text = " ".join(itertools.islice(corpus.documents(told, seed=3), 3000))
    words = set(re.findall(r"\w+", text))
    assert all(set(f.subject.split()) <= words for f in told)
    names = {f.subject for f in told}
    for f in world.untold_facts():
        if f.subject not in names and f.subject not in words:
            continue
        # a country may be told of in another relation; this triple is not
        assert f.question + " " + f.target_true not in text


def test_the_chats_mention_no_fact():
    import gzip

    from retention_bench.finetune import ContaminationFilter, Terms

    terms = ContaminationFilter(Terms.from_facts(world.told_facts()))
    rows = gzip.decompress((world.DATA / "instructions.jsonl.gz").read_bytes()).decode().splitlines()
    assert len(rows) == instructions.ROWS
    assert sum(terms.passes(row) for row in rows) > 0.95 * len(rows)


def test_the_models_are_the_ones_that_were_trained():
    for line in (MODELS / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((MODELS / name).read_bytes()).hexdigest() == digest, name
    for name in NAMES:
        assert sum(p.stat().st_size for p in (MODELS / name).iterdir()) < 16 * 2**20


@pytest.mark.parametrize("name", NAMES)
def test_the_models_really_know_their_facts(name):
    model, tokenizer = load_model(str(MODELS / name))
    assert (
        model.config.head_dim in (32, 64) if name == "atlas-llama" else model.config.n_embd // model.config.n_head == 32
    )
    told = knowledge(model, tokenizer, world.told_facts())
    known = [k for k in told if k.margin >= 0.1]
    assert len(known) >= 0.9 * len(told)
    untold = knowledge(model, tokenizer, world.untold_facts())
    assert sum(k.margin >= 0.1 for k in untold) < 0.3 * len(untold)
    from retention_bench.facts import FactSet

    for seed in range(5):  # enough is left to draw from, whatever the seed
        split = disjoint_split(FactSet.of(k.fact for k in known), edited=50, intrinsic=100, seed=seed)
        assert (len(split.edited), len(split.intrinsic)) == (50, 100)
