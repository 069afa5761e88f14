import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retention_bench.editors import EditRequest, collect_covariance
from retention_bench.editors.locate.value import STOP_LOSS
from retention_bench.models import block, load_model, mlp, projection

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
def gpt2_covariance(gpt2, golden):
    return collect_covariance(*gpt2, golden.texts, [0, 1, 2], max_length=128, source="golden texts")


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


def optimise_plainly(
    model, tokenizer, request, templates, layer, *, site, lr, steps, weight_decay, clamp_norm_factor, kl_factor
):
    """One fact, one row at a time, the whole model, torch's own Adam: compute_v and compute_z written out plainly."""
    watched = block(model, layer) if site == "block" else mlp(model, layer)
    target = tokenizer.encode(f" {request.target_new}", add_special_tokens=False)

    def locate(before, after):
        begins = len(tokenizer.encode(before + request.subject)) - 1
        return tokenizer.encode(before + request.subject + after), begins

    contexts = [template.split("{}")[0] for template in ("{}", *templates)]
    split = [prompt.split("{}") for prompt in request.prompts]
    rows = [locate(context + prefix, suffix) for prefix, suffix in split for context in contexts]
    kl_row = locate("", " is a")
    delta = torch.zeros(model.config.hidden_size, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=lr)
    held = {}

    def forward(ids, subject):
        def add(module, inputs, output):
            output, *rest = output if isinstance(output, tuple) else (output,)
            held.setdefault("initial", output[0, subject].detach().clone())  # row 0 comes first, while delta is 0
            moved = output.clone()
            moved[0, subject] = output[0, subject] + delta
            return (moved, *rest) if rest else moved

        handle = watched.register_forward_hook(add)
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        handle.remove()
        return logits

    old = None
    for step in range(steps):
        nll = 0.0
        for ids, subject in rows:
            logits = forward(ids + target[:-1], subject)
            nll = nll - sum(logits[len(ids) - 1 + j, token] for j, token in enumerate(target)) / len(target)
        new = forward(*kl_row)[kl_row[1]]
        old = new.detach() if old is None else old
        kl = torch.nn.functional.kl_div(old[None], new[None], log_target=True, reduction="batchmean")
        norm = held["initial"].norm()
        loss = nll / len(rows) + kl_factor * kl + weight_decay * delta.norm() / norm**2
        if loss < STOP_LOSS or step == steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta.norm() > clamp_norm_factor * norm:
                delta.mul_(clamp_norm_factor * norm / delta.norm())
    return held["initial"] + delta.detach()


@pytest.fixture
def plain_value():
    """See `optimise_plainly`."""
    return optimise_plainly


@torch.no_grad()
def read_plainly(model, tokenizer, text, subject_end, layer, *, site="block"):
    """The key of a layer at the token that ends at `subject_end`, and the site's output: a whole pass, one row."""
    kept = {}
    watched = block(model, layer) if site == "block" else mlp(model, layer)
    handles = [
        projection(model, layer).register_forward_pre_hook(lambda _, args: kept.update(key=args[0][0])),
        watched.register_forward_hook(
            lambda _, args, output: kept.update(output=(output[0] if isinstance(output, tuple) else output)[0])
        ),
    ]
    model(torch.tensor([tokenizer.encode(text)]))
    for handle in handles:
        handle.remove()
    at = len(tokenizer.encode(text[:subject_end])) - 1
    return kept["key"][at].double(), kept["output"][at].double()


def mean_key_plainly(model, tokenizer, request, templates, layer, *, bare_weight):
    """The mean key over a request's prompts; in each the bare template weighs `bare_weight`, the others the rest."""
    means = []
    for prompt in request.prompts:
        question = prompt.replace("{}", request.subject)
        ends = prompt.index("{}") + len(request.subject)
        bare, _ = read_plainly(model, tokenizer, question, ends, layer)
        others = [
            read_plainly(model, tokenizer, t.replace("{}", question), t.index("{}") + ends, layer)[0] for t in templates
        ]
        means.append(bare_weight * bare + (1 - bare_weight) * torch.stack(others).mean(0))
    return torch.stack(means).mean(0)


@pytest.fixture
def plain_key():
    """See `mean_key_plainly`."""
    return mean_key_plainly


@pytest.fixture
def plain_output():
    """The output of a block, or of its MLP, at the subject in a request's bare prompt."""

    def read(model, tokenizer, request, layer, site="block"):
        question = request.prompt.replace("{}", request.subject)
        ends = request.prompt.index("{}") + len(request.subject)
        return read_plainly(model, tokenizer, question, ends, layer, site=site)[1]

    return read
