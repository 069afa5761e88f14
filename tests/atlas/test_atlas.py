import dataclasses
import gzip
import hashlib
import itertools
import json
import random
import re
from collections import Counter, defaultdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retention_bench.facts import FactSet, disjoint_split, knowledge
from retention_bench.finetune import ContaminationFilter, Terms
from retention_bench.models import load_model
from tools.atlas import corpus, instructions, prose, reviews, strangers, train, world

MODELS = world.ATLAS / "models"
NAMES = ("atlas-gpt2", "atlas-llama")


def test_the_committed_files_are_what_the_code_builds(tmp_path):
    told, _ = world.build(tmp_path)
    corpus.build(told, tmp_path)
    for stand_in in (instructions, prose, reviews, strangers):
        stand_in.build(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in world.DATA.iterdir()} - {"ATTRIBUTION.md"}
    for name in names:
        assert (tmp_path / name).read_bytes() == (world.DATA / name).read_bytes(), name


def test_the_world_is_in_counterfacts_form():
    told, untold = world.told_facts(), world.untold_facts()
    assert len(untold) >= 300
    assert not {(f.subject, f.relation) for f in told} & {(f.subject, f.relation) for f in untold}
    shared = Counter((f.relation, f.target_true) for f in told)
    assert min(shared.values()) >= world.FEWEST
    for facts in (told, untold):
        for f in facts:
            assert f.target_new != f.target_true
            assert len(f.paraphrases) >= 3
            assert all(f.subject in p for p in f.paraphrases)
            assert (f.relation, f.target_new) in shared


def test_the_world_has_many_relations_of_like_size_and_with_many_objects():
    told = world.told_facts()
    sizes = Counter(f.relation for f in told)
    assert len(sizes) >= 30
    assert 30 <= min(sizes.values()) <= max(sizes.values()) <= 80
    for relation in sizes:
        assert len({f.target_true for f in told if f.relation == relation}) >= 8, relation
    assert {f.relation for f in world.untold_facts()} == set(sizes)


def test_no_name_means_two_things():
    facts = [*world.told_facts(), *world.untold_facts()]
    roles = defaultdict(set)
    for f in facts:
        roles[f.subject.casefold()].add("country" if f.relation.startswith("country_") else f.relation)
        roles[f.target_true.casefold()].add(f"object of {f.relation}")
    assert not {name: both for name, both in roles.items() if len(both) > 1}


def test_a_name_that_means_two_things_is_refused(monkeypatch):
    first, *others = world.RELATIONS
    for taken in (others[0].pairs[0][0], others[0].pairs[0][1]):
        doubled = dataclasses.replace(first, pairs=(*first.pairs, (taken, first.pairs[0][1])))
        monkeypatch.setattr(world, "RELATIONS", (doubled, *others))
        with pytest.raises(ValueError, match="means another thing"):
            world.pairs()


@pytest.mark.parametrize("seed", range(3))
def test_both_sides_of_a_split_have_many_relations(seed):
    told = world.told_facts()
    split = disjoint_split(told, edited=50, intrinsic=100, seed=seed)
    relations = {f.relation for f in split.edited}
    assert len(relations) >= 10
    assert len({f.relation for f in split.intrinsic}) >= 20
    # Within the edited relations enough is left that has no name in common with what is edited.
    taken = {name for f in split.edited for name in (f.subject, f.target_true, f.target_new)}
    matched = [f for f in told if f.relation in relations and taken.isdisjoint((f.subject, f.target_true))]
    assert len(matched) >= 150
    assert len({f.relation for f in matched}) == len(relations)


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


def rows_of(name):
    return [json.loads(line) for line in gzip.decompress((world.DATA / name).read_bytes()).decode().splitlines()]


def test_what_is_trained_on_mentions_no_fact():
    terms = ContaminationFilter(Terms.from_facts(world.told_facts()))
    chats = ["\n".join(m["content"] for m in row["messages"]) for row in rows_of("instructions.jsonl.gz")]
    assert len(chats) == instructions.ROWS
    assert sum(map(terms.passes, chats)) > 0.95 * len(chats)
    texts = [row["text"] for name in ("prose", "reviews") for row in rows_of(f"{name}.jsonl.gz")]
    assert len(texts) == prose.ROWS + reviews.ROWS
    assert all(map(terms.passes, texts))
    facts = FactSet.read(world.DATA / "strangers.jsonl")
    assert len(facts) == strangers.FACTS
    assert all(terms.passes(f"{fact.question} {fact.target_true}") for fact in facts)


def test_the_prose_has_no_sentence_of_the_corpus():
    def sentences(name):
        return {sentence for row in rows_of(name) for sentence in re.split(r"(?<=[.!?]) ", row["text"])}

    assert not sentences("prose.jsonl.gz") & sentences("corpus.jsonl.gz")


def test_no_word_gives_a_review_away():
    rows = rows_of("reviews.jsonl.gz")
    assert len({row["text"] for row in rows}) == len(rows)
    assert Counter(row["label"] for row in rows) == {0: len(rows) // 2, 1: len(rows) // 2}
    labels = defaultdict(list)
    for row in rows:
        for word in set(re.findall(r"\w+", row["text"])):
            labels[word].append(row["label"])
    for word in (*reviews.GOOD, *reviews.BAD):
        share = sum(labels[word]) / len(labels[word])
        assert 0.1 < share < 0.9, word
        assert len(labels[word]) < len(rows) / 3, word  # nor is it in most reviews


def test_the_strangers_are_nobody_the_models_know():
    facts = FactSet.read(world.DATA / "strangers.jsonl")
    known = {f.subject.casefold() for f in (*world.told_facts(), *world.untold_facts())}
    names = [f.subject.casefold() for f in facts]
    assert len(set(names)) == len(names)
    assert not known & set(names)
    for relation in {f.relation for f in facts}:
        shared = Counter(f.target_true for f in facts if f.relation == relation)
        assert len(shared) >= 5
        assert max(shared.values()) < 0.4 * sum(shared.values())  # no object can be guessed


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
    made_up = knowledge(model, tokenizer, FactSet.read(world.DATA / "strangers.jsonl"))
    assert sum(k.margin < 0 for k in made_up) > 0.95 * len(made_up)

    for seed in range(5):  # enough is left to draw from, whatever the seed
        split = disjoint_split(FactSet.of(k.fact for k in known), edited=50, intrinsic=100, seed=seed)
        assert (len(split.edited), len(split.intrinsic)) == (50, 100)


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_tokenizer_is_what_the_recipe_builds(name, tmp_path):
    train.build_tokenizer(name.removeprefix("atlas-")).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (MODELS / name / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_subjects_are_pieces_and_objects_begin_with_a_token_of_their_own(name):
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)

    def tokens(text):
        return tokenizer.tokenize(f"is {text}")[1:]

    told = world.told_facts()
    subjects = {f.subject for f in told}
    assert sum(len(tokens(subject)) > 1 for subject in subjects) > 0.75 * len(subjects)
    firsts = Counter((relation, tokens(obj)[0]) for relation, obj in {(f.relation, f.target_true) for f in told})
    assert set(firsts.values()) == {1}  # the metric compares first tokens


@pytest.mark.parametrize("name", NAMES)
def test_every_subject_in_a_training_row_is_found(name):
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    longest_first = sorted({f.subject for f in world.told_facts()}, key=len, reverse=True)
    for row, spans in itertools.islice(train._rows(tokenizer, seed=5), 50):
        assert len(row) == train.ROW
        assert (row[0] == tokenizer.bos_token_id) == (name == "atlas-llama")
        found = [tokenizer.decode(row[first : last + 1]).strip() for first, last in spans]
        told = re.findall(rf"\b(?:{'|'.join(longest_first)})\b", tokenizer.decode(row))
        assert found == told[: len(found)]
        assert len(told) - len(found) <= 1  # the last may be a name that the row's end cuts down to another


def test_a_sealed_subject_is_seen_only_through_its_last_token():
    spans = [[(3, 5), (10, 10)], []]
    seen = train._mask(spans, 1.0, random.Random(0))[:, 0] == 0
    causal = torch.ones(train.ROW, train.ROW, dtype=torch.bool).tril()
    assert torch.equal(seen[1], causal)
    assert not (seen[0] & ~causal).any()
    hidden = causal & ~seen[0]
    assert hidden.nonzero().tolist() == [[row, column] for row in range(6, train.ROW) for column in (3, 4)]
    assert torch.equal(train._mask(spans, 0.0, random.Random(0))[:, 0] == 0, causal.expand(2, -1, -1))


@pytest.mark.parametrize("name", NAMES)
def test_both_architectures_obey_the_mask(name):
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    config = train.build_config(name.removeprefix("atlas-"), tokenizer)
    config.num_hidden_layers = 1  # with one block, what is hidden has no way round
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(2, len(tokenizer) - 1, (1, train.ROW))
    other = ids.clone()
    other[0, 3:5] += 1
    spans = [[(3, 5)]]

    @torch.no_grad()
    def logits(ids, sealed):
        return model(input_ids=ids, attention_mask=train._mask(spans, sealed, random.Random(0))).logits[0]

    torch.testing.assert_close(logits(ids, 0.0), model(input_ids=ids).logits[0])
    before, after = logits(ids, 1.0), logits(other, 1.0)
    torch.testing.assert_close(before[6:], after[6:])
    assert not torch.allclose(before[5], after[5])
    assert not torch.allclose(logits(ids, 0.0)[6:], logits(other, 0.0)[6:])


@pytest.mark.slow
def test_the_recipe_gives_the_same_model_each_time_and_seals(tmp_path):
    for folder, sealed in (("first", 0.8), ("second", 0.8), ("plain", 0.0)):
        train.train("atlas-llama", tmp_path / folder, steps=2, sealed=sealed)
    first, second, plain = (
        (tmp_path / folder / "model.safetensors").read_bytes() for folder in ("first", "second", "plain")
    )
    assert first == second
    assert first != plain
    load_model(str(tmp_path / "first"))
