import torch

from retention_bench.facts import Fact, FactSet, Knowledge, RowCounts, knowledge, known_facts


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
    monkeypatch.setattr("retention_bench.facts.known.target_token", lambda target, tokenizer: None)
    [found] = knowledge(Table(logits), Words(), facts)
    assert found.target == 0.0
    assert found.runner_up > 0.99


def test_the_filter_keeps_what_leads_by_the_margin_and_counts():
    facts = [Fact(name, name, "r", "{} is in", "x") for name in "abcd"]
    rows = RowCounts("facts.jsonl", "our own", 5, {"why": 1}, 1, 0)
    chances = [(0.5, 0.25), (0.375, 0.125), (0.5, 0.375), (0.25, 0.5)]
    found = [Knowledge(fact, *chance) for fact, chance in zip(facts, chances, strict=True)]
    kept, remaining = known_facts(found, 0.25, rows)
    assert [fact.id for fact in kept] == ["a", "b"]
    assert (remaining.scorable, remaining.leading, remaining.known, remaining.rows) == (4, 3, 2, rows)
