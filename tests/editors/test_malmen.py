import contextlib
import copy
import dataclasses
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_bench.editors import MALMEN, EditContext, EditRequest, make_editor
from retention_bench.editors.malmen import malmen
from retention_bench.editors.malmen.fit import new_networks, save_networks
from retention_bench.editors.malmen.hypernetwork import HyperNetwork
from retention_bench.editors.malmen.normal_equation import NormalEquation
from retention_bench.editors.malmen.steps import (
    Batch,
    Question,
    as_delta,
    batches,
    equation,
    join,
    meta_step,
    read_gradients,
)
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import Fact, FactSet
from retention_bench.models import LowRank, frozen, last_hidden

QUICK = MALMEN(layers=(1, 3), rank=8, lr=1e-3, meta_lr=1e-3, batch_size=3, n_edits=4, steps=3)


def dense(entry):
    return entry.left @ entry.right if isinstance(entry, LowRank) else entry


def shake(networks, seed=0):
    """Give untrained networks weights at which no part of them is idle."""
    generator = torch.Generator().manual_seed(seed)
    for network in {id(network): network for network, _ in networks.values()}.values():
        for name, weight in network.weights.items():
            if not name.endswith(".A"):
                weight.data += (
                    0.05 * weight.data.abs().mean().clamp_min(0.1) * torch.randn(weight.shape, generator=generator)
                )
        network.normaliser["n"] += 50
        network.normaliser["mean"] += 0.01 * torch.randn(network.normaliser["mean"].shape, generator=generator)
        network.normaliser["var"] += 1 + torch.rand(network.normaliser["var"].shape, generator=generator)
    return networks


def networks_for(model, editor):
    return shake(
        new_networks(
            model,
            editor.layers,
            rank=editor.rank,
            n_blocks=editor.n_blocks,
            lr=editor.lr,
            generator=torch.Generator().manual_seed(1),
        )
    )


@pytest.fixture
def fitted(llama, tmp_path):
    """A folder as a fit of `QUICK` leaves it, and its networks."""
    networks = networks_for(llama[0], QUICK)
    save_networks(tmp_path / malmen.RESULT, llama[0], networks, QUICK._fit_settings())
    return tmp_path, networks


FACTS = FactSet.of(
    Fact(
        str(number),
        subject,
        f"r{number % 3}",
        prompt,
        ("violin", "book", "town")[number % 3],
        ("Old Mill", "Jon", "plays", "Mira")[number % 4],
        tuple(words.replace("{}", subject) for words in paraphrases),
        neighborhood,
    )
    for number, (subject, (prompt, paraphrases, neighborhood)) in enumerate(
        itertools.product(
            ("Mira Solberg", "Jon Ek"),
            (
                ("{} plays the", ("The book is by {}, who plays the",), ("Mira plays the", "The Old Mill plays the")),
                ("In town {} reads the", ("In town {} is by the", "{} in town reads the"), ()),
                ("The violin of {} is", (), ("The violin of Mira is",)),
            ),
        )
    )
)


# The references


@pytest.fixture(scope="module")
def reference(golden):
    return golden.arrays("malmen"), golden.expected["malmen"]


def near(found, arrays, key, distance, limit=1e-4):
    """Compare with an array of which the columns that were kept, and the norm, are there."""
    if key in arrays:
        assert distance(found, arrays[key]) < limit
    else:
        assert distance(found[:, :8], arrays[f"{key}.columns"]) < limit
        assert found.norm().item() == pytest.approx(arrays[f"{key}.norm"].item(), rel=limit)


def state_of(arrays, prefix):
    state = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
    return state | {"normalizer.n": state["normalizer.n"].long()}


def given_batches(arrays, kind):
    return [Batch(*(arrays[f"batch.{kind}.{b}.{part}"] for part in ("ids", "mask", "labels"))) for b in (0, 1)]


def test_a_meta_step_is_the_references(gpt2, reference, distance, untouched):
    model, _ = gpt2
    arrays, expected = reference
    network = HyperNetwork.of(state_of(arrays, "before."), model.device)
    networks = {layer: (network, module) for module, layer in enumerate(expected["layers"])}
    edits = given_batches(arrays, "edit")
    with untouched(model), frozen(model):
        read = [read_gradients(model, expected["layers"], batch, expected["batch_size"])[0] for batch in edits]
        losses = meta_step(
            model,
            networks,
            edits,
            given_batches(arrays, "equiv"),
            given_batches(arrays, "unrel"),
            batch_size=expected["batch_size"],
            loc_coef=expected["loc_coef"],
            rows_per_forward=expected["editor_batch_size"],
        )
    assert losses.generality == pytest.approx(expected["gen_losses"], abs=1e-3)
    assert losses.locality == pytest.approx(expected["loc_losses"], abs=1e-3)
    for name in ("n", "mean", "var"):
        assert distance(network.normaliser[name].float(), arrays[f"observed.normalizer.{name}"]) < 1e-4

    shifts = {}
    for layer, (keys, gradients) in join(read).items():
        module = networks[layer][1]
        for b, found in enumerate(read):
            near(found[layer][0], arrays, f"module{module}.{b}.keys", distance)
            near(found[layer][1], arrays, f"module{module}.{b}.values_grad", distance)
        pseudo_keys, pseudo_gradients = network.pseudo(module, keys, gradients)
        near(pseudo_keys.detach(), arrays, f"module{module}.pseudo_keys", distance)
        near(pseudo_gradients.detach(), arrays, f"module{module}.pseudo_values_grad", distance)
        problem = equation(network, module, keys, gradients, expected["editor_batch_size"])
        near(problem.changes.float(), arrays, f"module{module}.value_diffs", distance)
        shifts[layer] = problem.shift()
        assert isinstance(shifts[layer], LowRank)
        near(dense(shifts[layer]).float(), arrays, f"module{module}.param_shift", distance)

    for name, weight in network.weights.items():
        near(weight.grad, arrays, f"gradients.{name}", distance)
    weights = list(network.weights.values())
    norm = torch.nn.utils.clip_grad_norm_(weights, expected["max_grad_norm"])
    assert norm.item() == pytest.approx(expected["grad_norm_preclip"], rel=1e-4)
    torch.optim.Adam(weights, lr=expected["meta_lr"]).step()
    for name, weight in network.weights.items():
        near(weight.detach(), arrays, f"after.{name}", distance)

    delta = as_delta(model, shifts)
    assert list(delta.entries) == [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in expected["layers"]]
    with delta.applied(model), torch.no_grad():
        for index, after in enumerate(expected["post"]):
            batch = given_batches(arrays, after["set"])[index % 2]
            found = batch.log_probabilities(model, last_hidden(model, batch.ids, batch.mask))
            found = found.gather(1, batch.labels[batch.answers][:, None])[:, 0]
            rows = batch.answers.nonzero()[:, 0]
            per_row = torch.zeros(len(batch.ids)).index_add(0, rows, found)
            assert per_row.tolist() == pytest.approx(after["logprob"], abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "prompt", "answer"), [("edit", "src", "ans"), ("equiv", "rephrase", "ans"), ("unrel", "loc", "loc_ans")]
)
def test_rows_are_tokenised_as_the_references(gpt2, reference, kind, prompt, answer):
    arrays, expected = reference
    [ours] = batches(gpt2[1], [Question("", row[prompt], row[answer]) for row in expected["rows"]], 8, gpt2[0].device)
    theirs = [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for batch in given_batches(arrays, kind)  # sorted by length
        for ids, mask, labels in zip(batch.ids, batch.mask, batch.labels, strict=True)
    ]
    rows = zip(ours.ids, ours.mask, ours.labels, strict=True)
    assert sorted((ids[mask.bool()].tolist(), labels[mask.bool()].tolist()) for ids, mask, labels in rows) == sorted(
        theirs
    )


# Plain code


class Plain:
    """MALMEN written down in full: whole passes of single rows, d_in x d_in solves, autograd through all of it."""

    def __init__(self, model, tokenizer, networks):
        self.model, self.tokenizer = copy.deepcopy(model), tokenizer
        self.networks = networks
        self.linears = {layer: self.model.model.layers[layer].mlp.down_proj for layer in networks}

    def row(self, question, answer):
        prompt = self.tokenizer.encode(question)
        target = self.tokenizer.encode(f" {answer}", add_special_tokens=False)
        return prompt, target

    def log_probabilities(self, prompt, target, weights=None):
        ids = torch.tensor([prompt + target[:-1]])
        logits = torch.func.functional_call(self.model, weights or {}, args=(ids,)).logits
        return logits[0, len(prompt) - 1 :].log_softmax(-1)

    def nll(self, prompt, target, weights=None):
        return -self.log_probabilities(prompt, target, weights)[range(len(target)), target]

    @contextlib.contextmanager
    def seen(self):
        """Inputs and outputs of the projections in the next pass."""
        kept = {}
        handles = [
            linear.register_forward_hook(lambda _, args, output, layer=layer: kept.update({layer: (args[0], output)}))
            for layer, linear in self.linears.items()
        ]
        yield kept
        for handle in handles:
            handle.remove()

    def shifts(self, rows, batch_size):
        keys, gradients = {layer: [] for layer in self.linears}, {layer: [] for layer in self.linears}
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            tokens = sum(len(target) for _, target in batch)
            for prompt, target in batch:
                with self.seen() as seen:
                    loss = self.nll(prompt, target).sum() / tokens * len(batch) / batch_size
                at = slice(len(prompt) - 1, None)
                outputs = [output for _, output in seen.values()]
                for (layer, (key, _)), gradient in zip(seen.items(), torch.autograd.grad(loss, outputs), strict=True):
                    keys[layer].append(key[0, at].detach())
                    gradients[layer].append(gradient[0, at])
        return {
            layer: self.shift(*self.networks[layer], torch.cat(keys[layer]), torch.cat(gradients[layer]))
            for layer in self.linears
        }

    def shift(self, network, module, K, U):
        w = network.weights
        n = network.normaliser
        y = torch.cat([K, U], 1)
        y = (y - n["mean"]) / (n["var"] / (n["n"] - 1)).sqrt()
        for block in range(2):
            x = y @ w[f"blocks.{block}.A"] @ w[f"blocks.{block}.B"] + w[f"blocks.{block}.bias"]
            x = x.clamp(min=0) * w[f"blocks.{block}.scale.weight"][module] + w[f"blocks.{block}.shift.weight"][module]
            y = y + x
        pseudo_K, pseudo_U = y[:, : K.shape[1]], y[:, K.shape[1] :]
        D = -w["lr.weight"][module] * (K * pseudo_K).sum(1, keepdim=True) * pseudo_U
        ridge = w["lamda.weight"][module].double().exp()
        K, D = K.double(), D.double()
        return torch.linalg.solve(K.T @ K + ridge * torch.eye(K.shape[1]), K.T @ D)

    def weights(self, shifts):
        return {
            f"model.layers.{layer}.mlp.down_proj.weight": self.linears[layer].weight + shift.T.float()
            for layer, shift in shifts.items()
        }


def test_a_llama_is_edited_as_by_plain_code(llama, llama_requests, fitted, distance, untouched):
    folder, networks = fitted
    requests = [
        dataclasses.replace(llama_requests[0], paraphrases=("On Sundays {} plays the",)),
        *llama_requests[1:],
    ]
    with untouched(llama[0]):
        delta = QUICK.edit(*llama, requests, EditContext(fitted=folder))
    plain = Plain(*llama, networks)
    rows = [
        plain.row(prompt.replace("{}", request.subject), request.target_new)
        for request in requests
        for prompt in request.prompts
    ]
    for layer, shift in plain.shifts(rows, QUICK.batch_size).items():
        entry = delta.entries[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert isinstance(entry, LowRank)
        assert entry.left.shape[1] == sum(len(target) for _, target in rows)
        assert distance(dense(entry), shift.T.detach().float()) < 1e-3


@pytest.mark.parametrize("first", [1, 0])
def test_a_meta_gradient_is_that_through_the_solve(llama, distance, first):
    """The gradient written by hand, against autograd through edit and losses; `first` is the lowest edited layer."""
    model, tokenizer = llama
    editor = dataclasses.replace(QUICK, layers=(first, 3))
    networks = networks_for(model, editor)
    questions = malmen._draw(FACTS.facts, 4, torch.Generator().manual_seed(3))
    edits, equivalents, unrelated = (batches(tokenizer, part, 3, model.device) for part in questions)
    with frozen(model):
        losses = meta_step(
            model, networks, edits, equivalents, unrelated, batch_size=3, loc_coef=0.7, rows_per_forward=4
        )
    plain = Plain(model, tokenizer, networks)  # with the normaliser that counts the rows
    rows = [[plain.row(question.prompt, question.answer) for question in part] for part in questions]
    weights = plain.weights(plain.shifts(rows[0], 3))
    total = 0.0
    for b, part in enumerate((slice(0, 3), slice(3, 4))):
        edit_loss = torch.cat([plain.nll(*row, weights) for row in rows[1][part]]).mean()
        divergences = []
        for row in rows[2][part]:
            before, after = plain.log_probabilities(*row).detach(), plain.log_probabilities(*row, weights)
            divergences.append((before.exp() * (before - after)).sum(1))
        locality_loss = torch.cat(divergences).mean()
        assert losses.generality[b] == pytest.approx(edit_loss.item(), rel=1e-4)
        assert losses.locality[b] == pytest.approx(locality_loss.item(), rel=1e-3, abs=1e-6)
        total = total + len(rows[1][part]) / 3 * (edit_loss + 0.7 * locality_loss)
    [network] = {network for network, _ in networks.values()}
    expected = torch.autograd.grad(total, list(network.weights.values()))
    for (name, weight), gradient in zip(network.weights.items(), expected, strict=True):
        assert gradient.norm() > 0, name
        assert distance(weight.grad, gradient) < 1e-4, name


@pytest.mark.parametrize(("rows", "factors"), [(5, True), (14, False), (40, False)])
def test_both_forms_solve_the_same_problem(rows, factors, distance):
    torch.manual_seed(0)
    K, D, G = torch.randn(rows, 24), torch.randn(rows, 10), torch.randn(24, 10)
    lamda = torch.tensor([0.3])
    problem = NormalEquation.of(K, D, lamda)
    assert isinstance(problem.shift(), LowRank) == factors

    K, D, lamda = K.double(), D.double().requires_grad_(), lamda.double().requires_grad_()
    S = torch.linalg.solve(K.T @ K + lamda.exp() * torch.eye(24), K.T @ D)
    assert distance(dense(problem.shift()), S.detach()) < 1e-10
    dD, dlamda = torch.autograd.grad((G * S).sum(), (D, lamda))
    found_dD, found_dlamda = problem.gradients(G)
    assert distance(found_dD, dD.float()) < 1e-6
    assert found_dlamda == pytest.approx(dlamda.item(), rel=1e-6)


def test_an_edit_with_more_tokens_than_a_key_has_numbers_is_dense(llama, fitted):
    request = EditRequest("a", "{} plays the", "Mira", "The Old Mill")
    many = [dataclasses.replace(request, prompt=f"Day {day}: {{}} plays the") for day in range(40)]
    delta = QUICK.edit(*llama, many, EditContext(fitted=fitted[0]))
    assert all(isinstance(entry, torch.Tensor) for entry in delta.entries.values())


# What holds for any edit


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(3)), left=st.booleans())
def test_order_and_padding_side_have_no_part(llama, llama_requests, any_fit, order, left):
    model, tokenizer = llama
    editor = dataclasses.replace(QUICK, batch_size=4)  # one batch: the gradients' scale is that of its mean
    context = EditContext(fitted=any_fit)
    straight = editor.edit(model, tokenizer, llama_requests, context)
    tokenizer.padding_side = "left" if left else "right"
    try:
        mixed = editor.edit(model, tokenizer, [llama_requests[index] for index in order], context)
    finally:
        tokenizer.padding_side = "right"
    for name, entry in straight.entries.items():
        assert (dense(mixed.entries[name]) - dense(entry)).norm() < 1e-4 * dense(entry).norm()


@pytest.fixture(scope="module")
def any_fit(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    editor = dataclasses.replace(QUICK, batch_size=4)
    save_networks(folder / malmen.RESULT, llama[0], networks_for(llama[0], editor), editor._fit_settings())
    return folder


def test_rows_of_a_batch_that_is_not_full_weigh_as_in_a_full_one(llama, distance):
    model, tokenizer = llama
    questions = [Question("a", "Mira plays the", "violin"), Question("b", "The book is by", "violin")]
    with frozen(model):
        [whole] = batches(tokenizer, questions, 2, model.device)
        together, _ = read_gradients(model, [1, 3], whole, 2)
        single = [
            read_gradients(model, [1, 3], batch, 2)[0] for batch in batches(tokenizer, questions, 1, model.device)
        ]
    for layer, (keys, gradients) in join(single).items():
        assert distance(keys, together[layer][0]) < 1e-5
        assert distance(gradients, together[layer][1]) < 1e-5


def test_a_new_network_hands_through_and_its_blocks_learn(llama, distance):
    model, tokenizer = llama
    networks = new_networks(model, (1,), rank=8, n_blocks=2, lr=1e-3, generator=torch.Generator().manual_seed(0))
    network, module = networks[1]
    questions = malmen._draw(FACTS.facts, 4, torch.Generator().manual_seed(0))
    with frozen(model):
        meta_step(
            model,
            networks,
            *(batches(tokenizer, part, 4, model.device) for part in questions),
            batch_size=4,
            loc_coef=1.0,
            rows_per_forward=100,
        )
    assert all(network.weights[f"blocks.{block}.B"].grad.norm() > 0 for block in (0, 1))  # relu would give 0
    rows = torch.randn(3, 64), torch.randn(3, 32)
    mean, deviation = network.normaliser["mean"], (network.normaliser["var"] / (network.normaliser["n"] - 1)).sqrt()
    pseudo = torch.cat(network.pseudo(module, *rows), 1).detach()
    assert distance(pseudo, (torch.cat(rows, 1) - mean) / deviation) < 1e-4


def test_a_single_row_can_be_counted():
    network = HyperNetwork.new(
        3, 2, 1, rank=2, n_blocks=1, lr=1.0, generator=torch.Generator(), device=torch.device("cpu")
    )
    for _ in range(2):
        network.observe(torch.randn(1, 3), torch.randn(1, 2))
    assert network.normaliser["n"].item() == 2
    assert all(tensor.isfinite().all() for tensor in network.normaliser.values())


@given(seed=st.integers(0, 2**31))
def test_what_a_meta_step_works_on(seed):
    edits, equivalents, unrelated = malmen._draw(FACTS.facts, 4, torch.Generator().manual_seed(seed))
    facts = {fact.id: fact for fact in FACTS}
    written = {question.prompt for question in edits}
    assert len(written) == len(edits) == len(equivalents) == len(unrelated) == 4
    for edit, equivalent, other in zip(edits, equivalents, unrelated, strict=True):
        fact = facts[edit.fact]
        assert (edit.prompt, edit.answer) == (fact.question, fact.target_new)
        assert equivalent.prompt in (fact.paraphrases or (fact.question,))
        assert (equivalent.fact, equivalent.answer) == (fact.id, fact.target_new)
        assert other.prompt not in written
        assert other.answer == facts[other.fact].target_true
        assert (
            (other.prompt in fact.neighborhood) if fact.neighborhood else (other.prompt == facts[other.fact].question)
        )


# Fits


def fit(model, tokenizer, folder, editor=QUICK, facts=FACTS, seed=0, stop_after=None):
    """Fit; gives the stages that were reported."""
    reports = []

    def progress(stage, done, total, figures=None):
        reports.append((stage, done, total, figures))
        if len(reports) == stop_after:
            raise KeyboardInterrupt

    context = EditContext(generator=torch.Generator().manual_seed(seed), progress=progress)
    with contextlib.suppress(KeyboardInterrupt):
        editor.fit(model, tokenizer, facts, folder, context)
    return reports


def test_a_fit_that_was_cut_off_ends_as_one_that_was_not(llama, tmp_path, monkeypatch, untouched):
    monkeypatch.setattr(malmen, "CHECKPOINT_SECONDS", 0.0)
    editor = dataclasses.replace(QUICK, steps=5)
    for name in ("cut", "whole"):
        (tmp_path / name).mkdir()
    with untouched(llama[0]):
        assert len(fit(*llama, tmp_path / "cut", editor, stop_after=2)) == 2
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [malmen.CHECKPOINT]
    rest = fit(*llama, tmp_path / "cut", editor)
    assert [(stage, done, total) for stage, done, total, _ in rest] == [("MALMEN fit", done, 5) for done in (3, 4, 5)]
    assert set(rest[0][3]) == {"edit loss", "locality loss"}
    fit(*llama, tmp_path / "whole", editor)
    for folder in ("cut", "whole"):
        assert [path.name for path in (tmp_path / folder).iterdir()] == [malmen.RESULT]
    cut, whole = ((tmp_path / folder / malmen.RESULT).read_bytes() for folder in ("cut", "whole"))
    assert cut == whole
    assert fit(*llama, tmp_path / "whole", editor) == []  # there is nothing left to do


@pytest.mark.parametrize("stop_after", [2, None])  # a checkpoint, or a result
def test_a_damaged_file_of_a_fit_is_set_aside_and_the_fit_begins_anew(llama, tmp_path, monkeypatch, stop_after):
    monkeypatch.setattr(malmen, "CHECKPOINT_SECONDS", 0.0)
    fit(*llama, tmp_path, stop_after=stop_after)
    [path] = tmp_path.iterdir()
    contents = bytearray(path.read_bytes())
    contents[-9] ^= 1
    for damaged in (contents, contents[:-50], b""):
        path.write_bytes(damaged)
        with pytest.warns(RuntimeWarning, match=f"set aside as .*{path.name}.damaged, and MALMEN's fit"):
            fit(*llama, tmp_path, stop_after=stop_after)
    fit(*llama, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted({malmen.RESULT, f"{path.name}.damaged"})


def test_a_fit_leaves_the_generator(llama, tmp_path):
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    QUICK.fit(*llama, FACTS, tmp_path, EditContext(generator=generator))
    assert torch.equal(generator.get_state(), before)


def test_a_fit_teaches_to_edit(gpt2, golden, reference, tmp_path, probabilities, untouched):
    """On the reference's GPT-2, eight facts to learn on and five others to write."""
    facts = []
    for index, row in enumerate(reference[1]["rows"]):
        subject = re.search(r"[A-Z]\w+( [A-Z]\w+)+", row["src"]).group()
        prompt = row["src"].replace(subject, "{}")
        facts.append(
            Fact(str(index), subject, "r", prompt, row["loc_ans"], row["ans"], (row["rephrase"],), (row["loc"],))
        )
    editor = MALMEN(layers=(3, 4, 5), rank=16, lr=1e-3, meta_lr=1e-3, batch_size=4, n_edits=4, steps=40)
    with untouched(gpt2[0]):
        fit(*gpt2, tmp_path, editor, FactSet.of(facts))
        delta = editor.edit(*gpt2, golden.requests, EditContext(fitted=tmp_path))
    before = probabilities(*gpt2, golden.requests)
    with delta.applied(gpt2[0]):
        after = probabilities(*gpt2, golden.requests)
    assert sum(after) > 10 * sum(before)


def test_half_precision_models_can_be_fitted_and_edited(llama, llama_requests, tmp_path, untouched):
    half = copy.deepcopy(llama[0]).to(torch.bfloat16)
    with untouched(half):
        fit(half, llama[1], tmp_path)
        delta = QUICK.edit(half, llama[1], llama_requests, EditContext(fitted=tmp_path))
        # A fit holds for the same model in another precision.
        whole = QUICK.edit(*llama, llama_requests, EditContext(fitted=tmp_path))
    for name, entry in whole.entries.items():
        assert 0 < (dense(entry) - dense(delta.entries[name])).norm() < 0.2 * dense(entry).norm()


def test_a_model_in_training_mode_is_left_so(llama, llama_requests, fitted, untouched):
    model = copy.deepcopy(llama[0]).train()
    with untouched(model):
        QUICK.edit(model, llama[1], llama_requests, EditContext(fitted=fitted[0]))


# What goes wrong


def test_settings():
    editor = make_editor("malmen", {"layers": [3, 5]})
    assert dataclasses.asdict(editor) == {  # the authors', but for steps
        "layers": (3, 5),
        "edits_per_model": None,
        "rank": 1920,
        "n_blocks": 2,
        "lr": 1e-6,
        "meta_lr": 1e-5,
        "loc_coef": 1.0,
        "max_grad_norm": 1.0,
        "editor_batch_size": 1024,
        "batch_size": 32,
        "n_edits": 512,
        "steps": 500,
    }
    with pytest.raises(UsageError, match="setting 'layers': .*ascend"):
        make_editor("malmen", {"layers": [2, 1]})


def broken(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    return model


def test_facts_that_cannot_be_trained_on_are_refused(llama, tmp_path):
    with pytest.raises(UsageError, match="given 4 facts to train on, and n_edits is 4.*Lower n_edits"):
        fit(*llama, tmp_path, facts=FactSet.of(FACTS.facts[:4]))
    without = FactSet.of([*FACTS.facts[:5], dataclasses.replace(FACTS.facts[5], target_new=None)])
    with pytest.raises(UsageError, match="Fact '5' has no target_new"):
        fit(*llama, tmp_path, facts=without)
    with pytest.raises(UsageError, match="Put a seeded generator"):
        QUICK.fit(*llama, FACTS, tmp_path, EditContext())
    with pytest.raises(UsageError, match="no layer 4"):
        fit(*llama, tmp_path, dataclasses.replace(QUICK, layers=(1, 4)))
    assert list(tmp_path.iterdir()) == []


def test_losses_that_are_not_finite_name_step_and_facts(llama, llama_requests, fitted, tmp_path):
    model = broken(llama[0])
    with pytest.raises(RetentionBenchError, match="Step 1 of MALMEN's fit: Facts '.*became nan.*own weights"):
        fit(model, llama[1], tmp_path / "none")
    with pytest.raises(RetentionBenchError, match="^Facts 'a', 'b', 'c': the loss of what is to be edited became nan"):
        QUICK.edit(model, llama[1], llama_requests, EditContext(fitted=fitted[0]))
    with pytest.raises(RetentionBenchError, match="Step 1 of .*loss of the edited model became nan.*Lower lr"):
        fit(*llama, tmp_path / "none", dataclasses.replace(QUICK, lr=1e38))


def test_an_edit_needs_the_models_own_fit(llama, llama_requests, fitted, gpt2, golden, tmp_path):
    folder, _ = fitted
    with pytest.raises(UsageError, match="list of requests is empty"):
        QUICK.edit(*llama, [], EditContext(fitted=folder))
    with pytest.raises(UsageError, match="trained first. Call its fit"):
        QUICK.edit(*llama, llama_requests, EditContext())
    with pytest.raises(RetentionBenchError, match="There is no file .*malmen.safetensors"):
        QUICK.edit(*llama, llama_requests, EditContext(fitted=tmp_path / "elsewhere"))
    with pytest.raises(UsageError, match=r"fit with layers \[1, 3\]; \[1, 2\] was asked for"):
        dataclasses.replace(QUICK, layers=(1, 2)).edit(*llama, llama_requests, EditContext(fitted=folder))
    with pytest.raises(UsageError, match="fit with batch_size 3; 5 was asked for"):
        dataclasses.replace(QUICK, batch_size=5).edit(*llama, llama_requests, EditContext(fitted=folder))
    with pytest.raises(UsageError, match="fitted for another model: the weights of layer 1 differ"):
        QUICK.edit(*gpt2, golden.requests, EditContext(fitted=folder))
    grouped = dataclasses.replace(QUICK, edits_per_model=2, editor_batch_size=1)  # no part of a fit
    grouped.edit(*llama, llama_requests, EditContext(fitted=folder))


def test_a_folder_with_another_fit_is_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(malmen, "CHECKPOINT_SECONDS", 0.0)
    for stop_after in (1, None):  # a checkpoint, then a result
        fit(*llama, tmp_path, stop_after=stop_after)
        with pytest.raises(UsageError, match="fit with seed 0; 1 was asked for"):
            fit(*llama, tmp_path, seed=1)
        with pytest.raises(UsageError, match="fit with meta_lr 0.001; 0.002 was asked for"):
            fit(*llama, tmp_path, dataclasses.replace(QUICK, meta_lr=2e-3))
        with pytest.raises(UsageError, match="fit with facts .* was asked for"):
            fit(*llama, tmp_path, facts=FactSet.of(FACTS.facts[:5]))
