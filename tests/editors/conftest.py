import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retention_bench.editors import EditRequest, collect_key_statistics
from retention_bench.models import load_model

GOLDEN = Path(__file__).parent.parent / "golden"


class Golden:
    """The reference runs in tests/golden."""

    def __init__(self):
        self.expected = json.loads((GOLDEN / "expected.json").read_text())
        self.requests = [EditRequest(**request) for request in self.expected["requests"]]
        self.templates = tuple(self.expected["templates"])
        self.texts = json.loads((GOLDEN / "stats_texts.json").read_text())

    def arrays(self, name):
        return load_file(GOLDEN / f"{name}.safetensors")

    def pick(self, ids):
        return [request for request in self.requests if request.fact_id in ids]


@pytest.fixture(scope="session")
def golden():
    return Golden()


@pytest.fixture(scope="session")
def gpt2():
    """The reference runs' GPT-2 and its tokenizer; tests leave it as it is."""
    return load_model(str(GOLDEN / "model-gpt2"))


@pytest.fixture(scope="session")
def gpt2_statistics(gpt2, golden):
    return collect_key_statistics(*gpt2, golden.texts, [0, 1, 2], max_length=128, source="golden texts")


SUBJECTS = ["Mira Solberg", "Jon Ek", "The Old Mill", "Mira"]


@pytest.fixture(scope="session")
def llama(make_tokenizer, make_model):
    """A random Llama with grouped heads, and a tokenizer that begins every text with <|begin|>."""
    texts = [f"In town {name} plays the violin. The book is by {name}." for name in SUBJECTS]
    tokenizer = make_tokenizer("llama", texts, pad="<|end|>", vocab_size=330)
    return make_model("llama", tokenizer, layers=4, std=0.2), tokenizer


@pytest.fixture(scope="session")
def llama_requests():
    """Single- and multi-token targets; subjects in front, within, twice in the prompt, and one inside another."""
    return [
        EditRequest("a", "{} plays the", "Mira Solberg", "violin"),
        EditRequest("b", "In town {} reads the book by Jon Ek and", "Jon Ek", "The Old Mill"),
        EditRequest("c", "Mira says that {} is", "Mira", "zither"),
    ]


def state(model):
    """Everything that an edit must leave as it was."""
    return {
        "bits": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "forwards": ["forward" in vars(module) for module in model.modules()],
    }


@pytest.fixture
def untouched():
    """Checks that a model is left as it was: `with untouched(model): ...`, whether or not the block raises."""

    @contextlib.contextmanager
    def watch(model):
        before = state(model)
        try:
            yield
        finally:
            after = state(model)
            assert all(torch.equal(after["bits"][name], tensor) for name, tensor in before.pop("bits").items())
            assert {key: after[key] for key in before} == before

    return watch


def relative(found, expected):
    """Relative distance of two tensors."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def distance():
    return relative


@pytest.fixture
def probabilities():
    """The probability of every request's target after its prompt, one request at a time."""

    @torch.no_grad()
    def ask(model, tokenizer, requests):
        found = []
        for request in requests:
            prompt = tokenizer.encode(request.prompt.replace("{}", request.subject))
            target = tokenizer.encode(f" {request.target_new}", add_special_tokens=False)
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(logits[range(len(target)), target].sum().exp().item())
        return found

    return ask
