import dataclasses
import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from retention_bench.editors import Covariance, collect_covariance, null_space_projector
from retention_bench.editors.covariance import Measurement, check_file
from retention_bench.editors.locate.linalg import not_positive_semidefinite
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import WeightDelta, load_model, projection

GOLDEN = Path(__file__).parent.parent / "golden"

TEXTS = [
    "Mira plays the violin.",
    "In the old town",
    "",
    "The book is by Jon Ek, who plays the violin in the old mill.",
    "A",
]


def test_covariances_are_the_references(gpt2_covariance, golden, distance):
    expected = golden.arrays("statistics")
    assert gpt2_covariance.tokens == 17604
    for layer in range(3):
        moment = gpt2_covariance.mom2[layer]
        assert distance(moment[:, :8], expected[f"layer{layer}.columns"]) < 1e-5
        assert moment.trace().item() == pytest.approx(expected[f"layer{layer}.trace"].item(), rel=1e-5)


def test_projectors_are_the_references(gpt2_covariance, golden, distance):
    expected = golden.arrays("alphaedit")
    for layer, directions in enumerate(golden.expected["alphaedit"]["batch5"]["null_dims"]):
        projector = null_space_projector(gpt2_covariance.mom2[layer], 2e-2)
        assert projector.trace().item() == pytest.approx(directions, abs=1e-6)
        assert distance(projector.float()[:, :8], expected[f"projector.layer{layer}.columns"]) < 1e-3


def test_projectors_are_made_once_for_each_layer_and_threshold(monkeypatch):
    mom2 = {layer: torch.diag(torch.tensor([0.01, 0.1, 1.0]) * (layer + 1)) for layer in (0, 3)}
    covariance, cpu, made = Covariance(mom2, 1), torch.device("cpu"), []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: made.append(matrix) or eigh(matrix))
    for _ in range(2):  # two edits
        for layer, threshold, directions in [(0, 0.2, 2), (3, 0.2, 1), (0, 0.05, 1)]:
            assert covariance.projector(layer, threshold, cpu).trace().item() == pytest.approx(directions)
    assert len(made) == 3


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_batches_and_padding_have_no_part(llama, untouched, batch_tokens):
    model, tokenizer = llama
    keys = {0: [], 2: []}
    for layer, found in keys.items():
        projection(model, layer).register_forward_pre_hook(lambda _, args, found=found: found.append(args[0][0]))
    with torch.no_grad():
        for text in TEXTS:  # one text at a time, BOS and all, cut at 12 tokens
            model(torch.tensor([tokenizer.encode(text)[:12]]))
    expected = {layer: torch.cat(found).double() for layer, found in keys.items()}
    with untouched(model):
        found = collect_covariance(model, tokenizer, TEXTS, [2, 0], max_length=12, batch_tokens=batch_tokens)
    for layer, rows in expected.items():
        assert found.tokens == len(rows)
        torch.testing.assert_close(found.mom2[layer], (rows.T @ rows / len(rows)).float(), rtol=1e-4, atol=1e-6)


def test_saving_and_loading_keeps_every_bit(tmp_path, gpt2, gpt2_covariance):
    path = tmp_path / "s.safetensors"
    gpt2_covariance.save(path)
    loaded = Covariance.load(path)
    assert (loaded.tokens, loaded.source) == (17604, "golden texts")
    for part in ("mom2", "fingerprint"):
        assert list(getattr(loaded, part)) == [0, 1, 2]
        assert all(torch.equal(getattr(loaded, part)[k], v) for k, v in getattr(gpt2_covariance, part).items())
    assert loaded.measured == gpt2_covariance.measured
    assert (loaded.measured.texts, loaded.measured.max_length, loaded.measured.dtype) == (1400, 128, "float32")
    assert loaded.measured.modules[2] == "transformer.h.2.mlp.c_proj"
    loaded.check(gpt2[0], [0, 1, 2])
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]


def test_files_that_hold_no_covariance_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(RetentionBenchError, match="no file"):
        Covariance.load(path)
    WeightDelta({"w": torch.ones(1)}).save(path)
    with pytest.raises(RetentionBenchError, match="should hold a covariance of version 3.*holds 'weight delta'"):
        Covariance.load(path)


def rewritten(path, change):
    """A file written anew, with something changed in its metadata and its tensors."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["retention_bench"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    save_file(change(about, tensors) or tensors, path, {"retention_bench": json.dumps(about)})


def as_version_2(about, tensors):
    """The names of the first format."""
    del about["sha256"]
    about |= {"kind": "set of key statistics", "version": 2}
    return {
        name.replace("mom2", "moment").replace("fingerprint", "probe"): tensor.clone()
        for name, tensor in tensors.items()
    }


def test_files_of_the_first_format_are_read(tmp_path, gpt2, gpt2_covariance):
    path = tmp_path / "s.safetensors"
    gpt2_covariance.save(path)
    rewritten(path, as_version_2)
    loaded = Covariance.load(path)
    assert all(torch.equal(loaded.mom2[layer], matrix) for layer, matrix in gpt2_covariance.mom2.items())
    assert loaded.measured == gpt2_covariance.measured
    loaded.check(gpt2[0], [0, 1, 2])
    rewritten(path, lambda about, tensors: about.update(kind="covariance", version=3))
    with pytest.raises(RetentionBenchError, match="named 'moment.0', where mom2.LAYER and fingerprint.LAYER"):
        Covariance.load(path)


MODULES = {layer: f"transformer.h.{layer}.mlp.c_proj" for layer in range(4)}


def test_a_file_for_a_model_is_checked_without_the_model(tmp_path, gpt2_covariance):
    path = tmp_path / "s.safetensors"
    gpt2_covariance.save(path)
    check_file(path, [0, 2], dtype="float32", modules=MODULES)
    for change, why in [
        ({"layers": [1, 3]}, r"covers the layers \[0, 1, 2\], and 3 is needed too"),
        (
            {"dtype": "bfloat16"},
            "on a model in float32, and the model is edited in bfloat16.*--dtype bfloat16",
        ),
        ({"modules": {0: "model.layers.0.mlp.down_proj"}}, r"another model: .* layer 0 go into .*h.0.mlp.c_proj"),
    ]:
        asked = {"layers": [0], "dtype": "float32", "modules": MODULES} | change
        with pytest.raises(UsageError, match=f"s.safetensors .*{why}"):
            check_file(path, asked.pop("layers"), **asked)
    dataclasses.replace(gpt2_covariance, measured=Measurement(shard=(1, 4))).save(path)
    with pytest.raises(UsageError, match="is the shard 1/4 .* Merge all 4 with `retention-bench covariance merge`"):
        check_file(path, [0], dtype="float32", modules=MODULES)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RetentionBenchError, match="is cut off"):
        check_file(path, [0], dtype="float32", modules=MODULES)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe is a pipe or a device"):
        check_file(tmp_path / "pipe", [0], dtype="float32", modules=MODULES)


def test_a_covariance_without_a_hash_proves_nothing(tmp_path, gpt2_covariance):
    path = tmp_path / "s.safetensors"
    gpt2_covariance.save(path)
    Covariance.load(path, proven=True)
    rewritten(path, lambda about, tensors: about.__delitem__("sha256"))
    assert Covariance.load(path).tokens == 17604
    for read in (lambda: Covariance.load(path, proven=True), lambda: check_file(path, [0], dtype="", modules=MODULES)):
        with pytest.raises(RetentionBenchError, match="s.safetensors has no hash of its matrices"):
            read()


def test_a_covariance_without_a_fingerprint_proves_no_model(tmp_path, gpt2_covariance):
    path = tmp_path / "s.safetensors"
    dataclasses.replace(gpt2_covariance, fingerprint={0: gpt2_covariance.fingerprint[0]}).save(path)
    for read in (lambda: Covariance.load(path, proven=True), lambda: check_file(path, [0], dtype="", modules=MODULES)):
        with pytest.raises(RetentionBenchError, match=r"no fingerprint of its model for the layers \[1, 2\]"):
            read()


def test_a_forged_hash_is_noticed(tmp_path, gpt2_covariance):
    path = tmp_path / "s.safetensors"
    gpt2_covariance.save(path)
    rewritten(path, lambda about, tensors: tensors.update({"mom2.0": 2 * tensors["mom2.0"]}))
    with pytest.raises(RetentionBenchError, match="damaged: its numbers are not those that were written"):
        Covariance.load(path, proven=True)


def test_a_covariance_of_another_shape_is_refused(llama, gpt2_covariance):
    with pytest.raises(UsageError, match="keys of size 512, the model's have 64: it belongs to another model"):
        gpt2_covariance.check(llama[0], [0])
    with pytest.raises(UsageError, match=r"covers layers \[0, 1, 2\], not layer 3"):
        gpt2_covariance.check(llama[0], [3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_the_same_model(gpt2_covariance, dtype):
    model, _ = load_model(str(GOLDEN / "model-gpt2"), dtype=dtype)
    gpt2_covariance.check(model, [0, 1, 2])


def test_a_covariance_of_another_model_of_the_shape_is_refused(gpt2, gpt2_covariance, untouched):
    torch.manual_seed(1)
    other = type(gpt2[0])(gpt2[0].config)  # in training mode, with dropout
    message = (
        r"measured on another model: its fingerprint of layer 1 differs by \d+\.\d % .*another dtype .* less than 2 %"
    )
    with untouched(other), pytest.raises(UsageError, match=message):
        gpt2_covariance.check(other, [1])
    gpt2_covariance.check(other, [1], edited=True)
    with pytest.raises(UsageError, match="not layer 3"):
        gpt2_covariance.check(other, [3], edited=True)


def test_an_edited_model_is_told_from_the_unedited_one_above_the_edit(gpt2, gpt2_covariance):
    model, _ = gpt2
    name = "transformer.h.1.mlp.c_proj.weight"
    weight = model.get_parameter(name)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with WeightDelta({name: 0.5 * noise * weight.norm() / noise.norm()}).applied(model):
        gpt2_covariance.check(model, [0, 1])  # their keys are what they were
        with pytest.raises(UsageError, match="fingerprint of layer 2 differs"):
            gpt2_covariance.check(model, [2])
    gpt2_covariance.check(model, [0, 1, 2])


def test_a_covariance_made_by_hand_is_compared_by_layers_and_sizes(gpt2):
    covariance = Covariance({0: torch.eye(512)}, 1)
    covariance.check(gpt2[0], [0])
    with pytest.raises(UsageError, match="not layer 1"):
        covariance.check(gpt2[0], [1])


def test_a_spectrum_counts_what_the_eigenvalues_are():
    values = torch.tensor([0.0, 1e-3, 1e-2, 1.0, 4.0])
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    moment = (basis * values.double()) @ basis.T
    found = Covariance({7: moment.float()}, 1).spectrum(7)
    assert (found.rank, found.below, found.condition) == (4, 3, float("inf"))
    assert (found.trace, found.largest) == pytest.approx((5.011, 4.0), rel=1e-5)
    assert Covariance({7: (moment + torch.eye(5)).float()}, 1).spectrum(7).condition == pytest.approx(5, rel=1e-5)


@pytest.mark.parametrize(
    ("texts", "layers", "max_length", "message"),
    [
        (["x"], [], 8, "No layers"),
        (["x"], [9], 8, "no layer 9"),
        (["x"], [0], 65, "max_length is 65; the model has 64 positions"),
        (["x"], [0], 0, "max_length is 0"),
        (["x"], [0], 10**30, "max_length is 10+;"),
        (["x"], [-1], 8, "no layer -1"),
        (["x"], range(10**9), 8, "1000000000 layers were given"),
    ],
)
def test_what_cannot_be_measured_is_refused(llama, texts, layers, max_length, message):
    with pytest.raises(UsageError, match=message):
        collect_covariance(*llama, texts, layers, max_length=max_length)


def test_texts_without_tokens_are_refused(gpt2):
    with pytest.raises(RetentionBenchError, match="hold no token"):
        collect_covariance(*gpt2, ["", ""], [0], max_length=8)


def test_progress_counts_texts(llama):
    seen = []
    collect_covariance(*llama, TEXTS, [0], max_length=12, batch_tokens=20, progress=lambda *args: seen.append(args[:3]))
    assert seen[-1] == ("covariance", 5, 5)
    assert len(seen) > 1


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.integers(1, 20), st.floats(1e-3, 1.0), st.integers(0, 2**31))
def test_a_projector_keeps_only_what_text_hardly_uses(size, samples, threshold, seed):
    keys = torch.randn(samples, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moment = keys.T @ keys / samples
    values = torch.linalg.eigvalsh(moment)
    if (values < threshold).sum() == 0:
        with pytest.raises(UsageError, match="Raise the threshold"):
            null_space_projector(moment, threshold)
        return
    projector = null_space_projector(moment, threshold)
    torch.testing.assert_close(projector @ projector, projector)
    torch.testing.assert_close(projector, projector.T)
    assert projector.trace().item() == pytest.approx((values < threshold).sum().item())
    assert torch.linalg.eigvalsh(projector @ moment @ projector).max() < threshold + 1e-9


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 60), st.floats(-18, 15), st.floats(0, 6), st.integers(0, 2**31))
def test_every_real_covariance_is_one(size, tokens, scale, spread, seed):
    """Few tokens or many, summed in float32, neurons of very different scales, some of which never fire."""
    generator = torch.Generator().manual_seed(seed)
    neurons = torch.logspace(scale, scale - spread, size) * (torch.rand(size, generator=generator) > 0.2)
    neurons[0] = 10.0**scale
    keys = torch.randn(tokens, size, generator=generator) * neurons
    total = torch.zeros(size, size)
    for key in keys:
        total += torch.outer(key, key)
    assert not_positive_semidefinite(total / tokens) is None


MOMENT = torch.diag(torch.tensor([4.0, 1.0, 0.0])) + 1


@pytest.mark.parametrize(
    ("moment", "why"),
    [
        (-MOMENT, "on its diagonal is negative"),
        (MOMENT - 3 * torch.eye(3), "on its diagonal is negative"),
        (MOMENT.fill_diagonal_(1.0) + torch.ones(3, 3).tril(-1), "not symmetric"),
        (torch.eye(3) + 2 * torch.ones(3, 3).fill_diagonal_(0), "an eigenvalue below"),
        (torch.eye(3) * float("nan"), "not finite"),
        (torch.eye(3) * float("inf"), "not finite"),
        (torch.zeros(3, 3), "zero"),
        (torch.ones(3, 4), r"shape \[3, 4\] and is not square"),
        (torch.ones(9), r"shape \[9\]"),
        (torch.ones(2, 2, 2), r"shape \[2, 2, 2\]"),
        (torch.ones(0, 0), r"shape \[0, 0\]"),
        (torch.tensor([[1.0, 3e38], [-3e38, 1.0]]), "not symmetric"),
    ],
)
def test_what_is_no_covariance_is_told(tmp_path, moment, why):
    assert re.search(why, not_positive_semidefinite(moment))
    if moment.numel():
        Covariance({3: moment}, 5).save(tmp_path / "s")
        with pytest.raises(RetentionBenchError, match=f"mom2.3'? (is no covariance.*{why}|has .* not finite)"):
            Covariance.load(tmp_path / "s")


def test_tensors_that_do_not_belong_together_are_refused(tmp_path):
    path = tmp_path / "s"
    for covariance, why in [
        (Covariance({}, 5), "holds no matrix of a layer"),
        (Covariance({0: torch.eye(2)}, 5, "", {1: torch.ones(2)}), "fingerprint.1 is no key of that layer"),
        (Covariance({0: torch.eye(2)}, 5, "", {0: torch.ones(3)}), r"fingerprint.0 .* its shape is \[3\]"),
        (Covariance({10_000: torch.eye(2), 0: torch.eye(2)}, 5), "named 'mom2.10000', where mom2.LAYER"),
        (Covariance({-1: torch.eye(2), 0: torch.eye(2)}, 5), "named 'mom2.-1'"),
    ]:
        covariance.save(path)
        with pytest.raises(RetentionBenchError, match=why):
            Covariance.load(path)


@pytest.mark.slow
def test_wide_matrices_are_checked_in_seconds():
    size = 4096
    keys = torch.randn(64, size) * torch.logspace(0, -4, size)
    moment, began = keys.T @ keys / 64, time.monotonic()
    assert not_positive_semidefinite(moment) is None
    assert time.monotonic() - began < 10
    away = torch.ones(size) / size**0.5
    assert "eigenvalue" in not_positive_semidefinite(
        moment + moment.norm() * (torch.eye(size) - 1.1 * torch.outer(away, away))
    )
