import pytest
import torch

from retention_bench.facts import Fact, FactSet, FirstTokens, Knowledge, RowCounts, knowledge, known_facts


class Table(torch.nn.Module):
    """A stand-in model: the next token's logits depend on the last token alone."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.device = torch.device("cpu")

    def forward(self, input_ids, **_):
        return type("Output", (), {"logits": self.logits[input_ids]})()


class Words:
    """A stand-in tokenizer: a token a word."""

    words = ("<end>", "Lyon", "Rome", "is", "in", "France", "Italy")

    def encode(self, text, add_special_tokens=True):
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(self.words[i] for i in ids)


def test_probabilities_of_target_and_runner_up_come_in_the_facts_order():
    logits = torch.full((7, 7), -100.0)
    logits[4, 5], logits[4, 6] = torch.tensor([0.6, 0.4]).log()
    logits[3, 6] = 0.0
    facts = FactSet.of(
        [
            Fact("a", "Lyon", "r", "{} is in", "France"),
            Fact("b", "Rome", "r", "{} is", "Italy"),
            Fact("c", "Rome", "r", "{} is in", "Italy"),
        ]
    )
    found = knowledge(Table(logits), Words(), facts, batch_size=1)
    assert [k.fact.id for k in found] == ["a", "b", "c"]
    expected = [(0.6, 0.4), (1.0, 0.0), (0.4, 0.6)]
    for k, (target, second) in zip(found, expected, strict=True):
        assert abs(k.target - target) < 1e-6
        assert abs(k.runner_up - second) < 1e-6
    assert abs(found[2].margin + 0.2) < 1e-6


def test_a_target_without_a_token_is_not_known_at_all(monkeypatch):
    logits = torch.zeros(7, 7)
    logits[4, 5] = 9.0
    facts = FactSet.of([Fact("a", "Lyon", "r", "{} is in", "France")])
    monkeypatch.setattr("retention_bench.facts.known.first_tokens", lambda target, tokenizer: FirstTokens((), None))
    [found] = knowledge(Table(logits), Words(), facts)
    assert found.target == 0.0
    assert found.runner_up > 0.99


class Pieces(Words):
    """Cuts a number into digits behind a lone space, which is a token of its own."""

    words = ("<end>", "Lyon", "is", "in", " ", "1", "9", "Rome")

    def encode(self, text, add_special_tokens=True):
        pieces = [f" {word}" if word.isdigit() else word for word in text.split()]
        return [self.words.index(piece) for word in pieces for piece in (word if word[0] == " " else [word])]

    def decode(self, ids, **_):
        return "".join(self.words[i] for i in ids)


@pytest.mark.parametrize(
    ("space", "digit", "margin"),
    [
        ((0.75, 0.25), (0.625, 0.375), 0.25),  # the digit decides
        ((0.625, 0.375), (0.875, 0.125), 0.25),  # the space does: what is answered is a number, but only just
        ((0.25, 0.75), (1.0, 0.0), -0.5),  # a place is answered, and a year only if one is asked for
        ((1.0, 0.0), (0.25, 0.75), -0.5),
    ],
)
def test_a_number_behind_a_lone_space_is_asked_behind_the_space(space, digit, margin):
    logits = torch.full((8, 8), -100.0)
    logits[3, [4, 7]], logits[4, [5, 6]] = torch.tensor([space, digit]).log().clamp(min=-100)
    facts = FactSet.of([Fact("a", "Lyon", "r", "{} is in", "19"), Fact("b", "Lyon", "r", "{} is in", "Rome")])
    for batch_size in (1, 64):
        year, place = knowledge(Table(logits), Pieces(), facts, batch_size=batch_size)
        assert (year.fact.id, place.fact.id) == ("a", "b")
        assert (year.target, year.runner_up) == pytest.approx(digit, abs=1e-6)
        assert year.margin == pytest.approx(margin, abs=1e-6)
        assert (place.target, place.runner_up, place.lead) == pytest.approx((space[1], space[0], 1.0), abs=1e-6)


def test_a_prompt_longer_than_the_context_is_not_known(make_tokenizer, make_model):
    tokenizer = make_tokenizer("gpt2", ["Lyon is in France"])
    model = make_model("gpt2", tokenizer)
    long, short = (Fact(str(n), "Lyon", "r", "is in " * n + "{} is in", "France") for n in (100, 1))
    alone = knowledge(model, tokenizer, FactSet.of([short]))
    assert knowledge(model, tokenizer, FactSet.of([long, short])) == [Knowledge(long, 0.0, 1.0), *alone]


def test_the_filter_keeps_what_leads_by_the_margin_and_counts():
    facts = [Fact(name, name, "r", "{} is in", "x") for name in "abcd"]
    rows = RowCounts("facts.jsonl", "our own", 5, {"why": 1}, 1, 0)
    chances = [(0.5, 0.25), (0.375, 0.125), (0.5, 0.375), (0.25, 0.5)]
    found = [Knowledge(fact, *chance) for fact, chance in zip(facts, chances, strict=True)]
    kept, remaining = known_facts(found, 0.25, rows)
    assert [fact.id for fact in kept] == ["a", "b"]
    assert (remaining.scorable, remaining.leading, remaining.known, remaining.rows) == (4, 3, 2, rows)
    assert "4 facts have objects that the metric can tell; of 3" in str(remaining)
    _, remaining = known_facts(found, 0.25, rows, "2 facts are left out (why)")
    assert "can tell (2 facts are left out (why)); of 3" in str(remaining)
