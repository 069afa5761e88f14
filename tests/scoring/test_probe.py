import copy
import json
import random

import pytest
import torch

from retention_bench.facts import target_token
from retention_bench.scoring import Prober, score

OBJECTS = {"capital": ["Paris", "Rome", "Berlin", "Italy"], "born": ["Italy", "Guinea"], "other": ["Japan"]}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_look_says_what_the_metric_says_and_where_the_probability_is(name, request, facts):
    model, tokenizer = request.getfixturevalue(name), request.getfixturevalue(f"{name}_tokenizer")
    samples = {s.fact_id: s for s in score(model, tokenizer, facts, kinds=("edited", "intrinsic"))}
    probes = Prober(model, tokenizer, facts, OBJECTS).look()
    assert [probe.fact_id for probe in probes] == [fact.id for fact in facts]
    for fact, probe in zip(facts, probes, strict=True):
        assert (probe.kind, probe.hit) == (samples[fact.id].kind, samples[fact.id].hit)
        with torch.no_grad():
            row = model(torch.tensor([tokenizer.encode(fact.question)])).logits[0, -1].softmax(-1)
        tokens = {text: target_token(text, tokenizer) for texts in OBJECTS.values() for text in texts}
        own = {fact.target_true, fact.target_new}
        related = {tokens[text] for text in OBJECTS.get(fact.relation, ()) if text not in own}
        related -= {tokens.get(text) for text in own}
        assert probe.true == pytest.approx(row[target_token(fact.target_true, tokenizer)].item(), rel=1e-4)
        if fact.target_new is None:
            assert probe.edited is None
        else:
            assert probe.edited == pytest.approx(row[tokens[fact.target_new]].item(), rel=1e-4)
        assert probe.related == pytest.approx(sum(row[token].item() for token in related), rel=1e-4, abs=1e-9)
        assert probe.true + (probe.edited or 0) + probe.related + probe.other == pytest.approx(1.0)
        assert [value for _, value in probe.top] == pytest.approx(row.topk(5).values.tolist(), rel=1e-4)
        assert probe.top[0][0] == tokenizer.decode([row.argmax().item()])
    assert probes[0].related > 0
    assert probes[3].related == 0  # no objects are known for its relation


def test_a_look_leaves_training_as_it_was(gpt2, gpt2_tokenizer, facts):
    prober = Prober(gpt2.train(), gpt2_tokenizer, facts, OBJECTS)
    states = torch.get_rng_state(), random.getstate()
    prober.look()
    assert gpt2.training
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    ids = torch.tensor([gpt2_tokenizer.encode("The city of Paris")])
    gpt2(input_ids=ids, labels=ids).loss.backward()  # nothing that a look has left behind stands in the way
    gpt2.zero_grad()
    gpt2.eval()


def test_a_model_that_puts_out_no_numbers_has_no_probabilities(gpt2, gpt2_tokenizer, facts):
    broken = copy.deepcopy(gpt2)
    broken.transformer.ln_f.weight.data.fill_(float("nan"))
    probes = Prober(broken, gpt2_tokenizer, facts, OBJECTS).look()
    assert {(p.true, p.edited, p.related, p.other, p.top) for p in probes} == {(None, None, None, None, ())}
    json.dumps([p.to_json() for p in probes], allow_nan=False)
