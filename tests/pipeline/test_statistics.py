"""`retention-bench statistics`, without the command line around it."""

import dataclasses
import json

import numpy
import pytest
import torch
import yaml

from retention_bench.editors import KeyStatistics
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.pipeline import Cell, Store, load_suite, plan
from retention_bench.pipeline import statistics as module
from retention_bench.pipeline.statistics import Request, answer


@pytest.fixture(scope="module")
def request_(small_suite):
    """What the small suite's statistics are, asked for by options."""
    suite = yaml.safe_load(small_suite.read_text())
    return Request(
        model=suite["models"]["atlas-gpt2"]["path"],
        layers="0-1",
        corpus=suite["statistics"]["source"],
        samples=suite["statistics"]["texts"],
        max_length=suite["statistics"]["max_length"],
    )


@pytest.fixture(scope="module")
def measured(request_, tmp_path_factory):
    """A store in which they were measured, and the file."""
    store = Store(tmp_path_factory.mktemp("store"))
    return store, answer(request_, store)["file"]


def test_evaluate_finds_what_was_measured(small_suite, measured):
    store, file = measured
    stage = plan(Cell(load_suite(str(small_suite)), None, "alphaedit", "tulu3", 0, "cpu"), store).statistics
    assert str(store.find(stage.name, stage.inputs) / "statistics.safetensors") == file


def test_the_key_names_the_projections(small_suite, tmp_path):
    cell = Cell(load_suite(str(small_suite)), "atlas-llama", "alphaedit", "tulu3", 0, "cpu")
    assert plan(cell, Store(tmp_path)).statistics.inputs["modules"] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_what_the_store_holds_is_not_measured_again(request_, measured, monkeypatch, tmp_path):
    store, file = measured
    monkeypatch.setattr(module, "load", None)
    announced = []
    found = answer(
        dataclasses.replace(request_, out=tmp_path / "a" / "s.safetensors"),
        store,
        announce=lambda *a: announced.append(a),
    )
    assert (found["file"], announced) == (file, [("key statistics", True)])
    assert KeyStatistics.load(tmp_path / "a" / "s.safetensors").measured.texts == 200
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["s.safetensors"]


def test_a_dry_run_says_where_and_writes_nothing(request_, measured, tmp_path):
    store, file = measured
    assert answer(dataclasses.replace(request_, dry_run=True), store) == {"file": file, "in_store": True}
    found = answer(dataclasses.replace(request_, dry_run=True, samples=9), Store(tmp_path / "s"))
    assert not found["in_store"]
    assert not (tmp_path / "s").exists()


def test_a_run_that_was_cut_off_goes_on_from_the_scratch_folder(request_, measured, tmp_path, monkeypatch):
    from retention_bench import editors

    def often(*args, **kwargs):
        return collect(*args, **kwargs, checkpoint_every=0)

    collect = editors.collect_key_statistics
    monkeypatch.setattr(editors, "collect_key_statistics", often, raising=False)
    store, seen = Store(tmp_path), []

    def cut(stage, done, total, figures=None):
        if done > 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(request_, store, progress=cut)
    file = answer(request_, store, progress=lambda stage, done, total, figures=None: seen.append((done, total)))["file"]
    assert seen[0][0] > 100
    assert seen[-1] == (200, 200)
    first, again = (KeyStatistics.load(path) for path in (measured[1], file))
    assert all(torch.equal(again.moments[layer], moment) for layer, moment in first.moments.items())
    assert not list(tmp_path.rglob("*.work"))


def test_shards_from_elsewhere_become_the_whole_that_evaluate_finds(request_, measured, tmp_path):
    parts = []
    for index in (0, 1):
        out = tmp_path / f"{index}.safetensors"
        answer(dataclasses.replace(request_, shard=f"{index}/2", out=out), Store(tmp_path / f"machine{index}"))
        parts.append(out)
    store = Store(tmp_path / "here")
    file = answer(Request(merge=tuple(parts), out=tmp_path / "whole.safetensors"), store)["file"]
    assert file == measured[1].replace(str(measured[0].root), str(store.root))
    whole, merged = KeyStatistics.load(measured[1]), KeyStatistics.load(tmp_path / "whole.safetensors")
    assert (merged.tokens, merged.measured, merged.source) == (whole.tokens, whole.measured, whole.source)
    for layer, moment in whole.moments.items():
        torch.testing.assert_close(merged.moments[layer], moment, rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match="shards 0/2 are not the whole"):
        answer(Request(merge=(parts[0],)), store)


def test_what_may_be_something_else_is_not_merged_into_the_store(measured, tmp_path):
    whole = KeyStatistics.load(measured[1])
    settings = whole.measured.settings
    other = {**settings, "versions": {**settings["versions"], "torch": "1.0"}}
    for changed, why in [(other, "other versions .torch 1.0, here 2"), ({}, "does not say what model and corpus")]:
        path = tmp_path / "s.safetensors"
        dataclasses.replace(whole, measured=dataclasses.replace(whole.measured, settings=changed)).save(path)
        with pytest.raises(UsageError, match=why):
            answer(Request(merge=(path,)), Store(tmp_path / "store"))


def test_files_of_the_references_are_imported(request_, measured, tmp_path):
    whole = KeyStatistics.load(measured[1])
    for layer, moment in whole.moments.items():
        arrays = {"mom2.mom2": moment.numpy() * whole.tokens, "mom2.count": numpy.array(whole.tokens)}
        numpy.savez(tmp_path / f"{layer}.npz", **arrays)
    asked = Request(model=request_.model, from_npz=tuple(f"{layer}={tmp_path}/{layer}.npz" for layer in whole.moments))
    found = KeyStatistics.load(answer(asked, Store(tmp_path / "store"))["file"])
    assert (found.tokens, found.source) == (whole.tokens, "0.npz, 1.npz")
    for layer, moment in whole.moments.items():
        torch.testing.assert_close(found.moments[layer], moment)
        assert torch.equal(found.probe[layer], whole.probe[layer])
    swapped = dataclasses.replace(asked, from_npz=(f"0={tmp_path}/1.npz",), corpus=request_.corpus)
    with pytest.raises(UsageError, match="layer 0 is not this model's"):
        answer(swapped, Store(tmp_path / "store"))


def test_a_file_is_inspected(measured):
    found = answer(Request(inspect=measured[1]), measured[0])
    assert json.loads(json.dumps(found)) == found
    assert (found["texts"], found["max_length"], found["dtype"], found["shard"]) == (200, 128, "float32", None)
    assert found["source"] == "the first 200 texts of corpus.jsonl.gz"
    assert found["probe"]
    layer = found["layers"]["1"]
    assert (layer["module"], layer["size"]) == ("transformer.h.1.mlp.c_proj", 1024)
    assert layer["trace"] == pytest.approx(KeyStatistics.load(measured[1]).moments[1].trace().item(), rel=1e-4)
    assert 0 < layer["below"] < layer["size"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": None}, "--model is missing"),
        ({"layers": None}, "--layers is missing"),
        ({"corpus": None}, "--corpus is missing"),
        ({"layers": "3-1"}, "--layers is '3-1'. Give numbers"),
        ({"layers": "a"}, "--layers is 'a'"),
        ({"layers": "0,"}, "--layers is '0,'"),
        ({"layers": "99"}, "no layer 99"),
        ({"max_length": 4096}, "max_length is 4096; the model has"),
        ({"shard": "2/2"}, "--shard is '2/2'. Of N shards"),
        ({"shard": "1"}, "--shard is '1'"),
        ({"memory": 1e-6}, "take .* bytes, and memory is 1073"),
        ({"corpus": "there/is/none.jsonl"}, "no data file at .*none.jsonl"),
        ({"corpus": "some/dataset"}, "'some/dataset' needs a `revision`"),
        ({"model": "/there/is/no/model"}, "model"),
        ({"from_npz": ("0",)}, "--from-npz is '0'. Give LAYER=FILE"),
        ({"from_npz": ("0=a", "0=b")}, "names layer 0 twice"),
        ({"from_npz": ("0=/no/such.npz",)}, "There is no .npz file at /no/such.npz"),
        ({"from_npz": ("0=a",), "inspect": "b"}, "--inspect and --from-npz were given together"),
        ({"inspect": "b", "dry_run": True}, "--dry-run and --inspect were given together"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(request_, tmp_path, change, why):
    with pytest.raises(RetentionBenchError, match=why):
        answer(dataclasses.replace(request_, **change), Store(tmp_path))
