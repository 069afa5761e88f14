import copy
import json
import random
from dataclasses import replace

import pytest
import torch

from retention_bench.facts import Fact, FactSet, first_tokens, knowledge, target_token
from retention_bench.scoring import Follower, judge_ids, score

KINDS = ("edited", "intrinsic", "intrinsic_matched")
OBJECTS = {"capital": ["Paris", "Rome", "Berlin", "Italy"], "born": ["Italy", "Guinea"], "other": ["Japan"]}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_look_says_what_the_metric_says_and_where_the_probability_is(name, request, facts):
    model, tokenizer = request.getfixturevalue(name), request.getfixturevalue(f"{name}_tokenizer")
    samples = {s.fact_id: s for s in score(model, tokenizer, facts, kinds=KINDS, objects=OBJECTS)}
    points = Follower(model, tokenizer, facts, OBJECTS).look()
    assert [point.fact_id for point in points] == [fact.id for fact in facts]
    for fact, point in zip(facts, points, strict=True):
        assert (point.kind, point.hit) == (samples[fact.id].kind, samples[fact.id].hit)
        assert point.outcome == samples[fact.id].outcome
        with torch.no_grad():
            row = model(torch.tensor([tokenizer.encode(fact.question)])).logits[0, -1].softmax(-1)
        tokens = {text: target_token(text, tokenizer) for texts in OBJECTS.values() for text in texts}
        own = {fact.target_true, fact.target_new}
        related = {tokens[text] for text in OBJECTS.get(fact.relation, ()) if text not in own}
        related -= {tokens.get(text) for text in own}
        assert point.true == pytest.approx(row[target_token(fact.target_true, tokenizer)].item(), rel=1e-4)
        if fact.target_new is None:
            assert point.edited is None
        else:
            assert point.edited == pytest.approx(row[tokens[fact.target_new]].item(), rel=1e-4)
        assert point.related == pytest.approx(sum(row[token].item() for token in related), rel=1e-4, abs=1e-9)
        assert point.true + (point.edited or 0) + point.related + point.other == pytest.approx(1.0)
        assert [value for _, value in point.top] == pytest.approx(row.topk(5).values.tolist(), rel=1e-4)
        assert point.top[0][0] == tokenizer.decode([row.argmax().item()])
    assert points[0].related > 0
    assert points[3].related == 0  # no objects are known for its relation


@pytest.mark.parametrize(
    ("true", "new"), [("1984", "Paris"), ("Paris", "1984"), ("1984", "75"), ("Paris", "Rome"), ("1984", None)]
)
def test_a_lone_space_is_passed_over_and_the_classes_still_add_up_to_one(digit_tokenizer, make_model, true, new):
    tokenizer = digit_tokenizer
    model = make_model("llama", tokenizer, std=0.5)
    fact = Fact("f", "France", "born", "{} was born in", true, target_new=new)
    [point] = Follower(model, tokenizer, [fact], {"born": ["1984", "1985", "2001", "Berlin"]}).look()
    prompt = tokenizer.encode(fact.question)
    [space] = {first_tokens(text, tokenizer).lead for text in ("1984", "75")}

    def row(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].softmax(-1)

    behind, further = row(prompt), row([*prompt, *space])

    def chance(text):
        token = first_tokens(text, tokenizer).token
        return (behind[token] + behind[space[0]] * further[token]).item()

    assert point.true == pytest.approx(chance(true), rel=1e-4)
    assert point.edited == (None if new is None else pytest.approx(chance(new), rel=1e-4))
    begun = {text[0] if text[0].isdigit() else text: text for text in ("1985", "2001", "Berlin")}  # one for each token
    others = [text for begins, text in begun.items() if not any(own and own.startswith(begins) for own in (true, new))]
    assert point.related == pytest.approx(sum(map(chance, others)), rel=1e-4)
    assert point.true + (point.edited or 0) + point.related + point.other == pytest.approx(1.0)
    [sample] = score(
        model, tokenizer, FactSet.of([replace(fact, target_true="Rome", target_new=None)]), kinds=["intrinsic"]
    )
    assert point.hit == judge_ids(sample.token_ids, fact.target, tokenizer).hit


def test_a_lone_space_that_is_passed_over_is_not_among_the_most_probable(digit_tokenizer, scripted):
    model = scripted(digit_tokenizer, {" in": " ", " ": "1"})
    model.lm_head.weight.data *= 100
    fact = Fact("f", "France", "born", "{} was born in", "1984", "2001")
    [point] = Follower(model, digit_tokenizer, [fact], {}).look()
    assert point.top[0] == ("1", pytest.approx(1.0))
    assert (point.hit, point.true, point.edited) == (False, pytest.approx(1.0), pytest.approx(0.0, abs=1e-6))


@pytest.mark.parametrize(
    ("script", "hit"),
    [
        ({" in": " ", " ": "1"}, True),
        ({" in": " ", " ": "2"}, False),
        ({" in": " Paris", " ": "1"}, False),  # a year only if one is asked for
        ({" in": "1"}, True),  # without a space, as behind a prompt in Chinese
    ],
)
def test_the_filter_knows_what_the_metric_answers(digit_tokenizer, scripted, script, hit):
    model = scripted(digit_tokenizer, script)
    fact = Fact("f", "France", "born", "{} was born in", "1984")
    [known] = knowledge(model, digit_tokenizer, FactSet.of([fact]))
    [point] = Follower(model, digit_tokenizer, [fact], {}).look()
    assert (known.margin > 0) is hit
    assert point.hit is hit


def test_a_look_leaves_training_as_it_was(gpt2, gpt2_tokenizer, facts):
    follower = Follower(gpt2.train(), gpt2_tokenizer, facts, OBJECTS)
    states = torch.get_rng_state(), random.getstate()
    follower.look()
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
    points = Follower(broken, gpt2_tokenizer, facts, OBJECTS).look()
    assert {(p.true, p.edited, p.related, p.other, p.top) for p in points} == {(None, None, None, None, ())}
    json.dumps([p.to_json() for p in points], allow_nan=False)
