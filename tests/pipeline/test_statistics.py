"""`retention-bench statistics`, without the command line around it."""

import dataclasses
import json
import os
from pathlib import Path

import datasets
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


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("mine"),
        lambda path: path.write_bytes(b""),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to("/dev/null"),
    ],
)
def test_a_file_that_holds_no_key_statistics_is_not_written_over(request_, measured, tmp_path, make):
    make(tmp_path / "out")
    kind = os.lstat(tmp_path / "out").st_mode
    with pytest.raises(UsageError, match="out, which is there and holds no key statistics|out is no file"):
        answer(dataclasses.replace(request_, out=tmp_path / "out"), measured[0])
    with pytest.raises(UsageError, match="File name too long"):
        answer(dataclasses.replace(request_, out=tmp_path / ("x" * 300)), measured[0])
    assert os.lstat(tmp_path / "out").st_mode == kind
    assert not (tmp_path / "out").is_file() or (tmp_path / "out").read_text() in ("mine", "")
    for _ in range(2):  # what we wrote is written over
        answer(dataclasses.replace(request_, out=tmp_path / "own.safetensors"), measured[0])


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
        ({"layers": "0-99999999999"}, "--layers is '0-99999999999'. Give numbers from 0 to 9999"),
        ({"layers": "9" * 5000}, "--layers is '9999.*[.]{3}. Give numbers"),
        ({"layers": "-1"}, "--layers is '-1'"),
        ({"layers": "\u0663"}, "--layers is"),
        ({"samples": 0}, "--samples is 0. Give a whole number from 1"),
        ({"samples": 10**30}, "--samples is 10+. Give a whole number from 1"),
        ({"samples": 1.5}, "--samples is 1.5"),
        ({"max_length": -1}, "--max-length is -1"),
        ({"max_length": 10**30}, "--max-length is 10+"),
        ({"memory": float("nan")}, "--memory is nan. Give GiB, above 0"),
        ({"memory": float("inf")}, "--memory is inf"),
        ({"memory": 1e300}, "--memory is 1e.300"),
        ({"memory": 0}, "--memory is 0"),
        ({"dtype": "float64"}, "Unknown dtype 'float64'.*Allowed: bfloat16, float16, float32"),
        ({"device": "tpu"}, "Unknown device 'tpu'"),
        ({"shard": "1/9999999999"}, "--shard is '1/9999999999', and there are 200 texts. Give at most as many"),
        ({"shard": "1/" + "9" * 5000}, "--shard is '1/999.*[.]{3}. Of N shards"),
        ({"shard": "-1/2"}, "--shard is '-1/2'"),
        ({"model": "x" * 5000}, "--model is 'xxx.*no such folder"),
        ({"corpus": "x" * 5000}, "no data file at xxx"),
        ({"corpus": "/dev/zero"}, "/dev/zero is a pipe or a device"),
        ({"corpus": "/"}, "/ is a folder, where a data file is needed"),
        ({"out": Path("/")}, "/ is no file|cannot be written"),
        ({"out": Path("/dev/null")}, "/dev/null is no file"),
        ({"out": Path(__file__)}, "which is there and holds no key statistics. Give another"),
        ({"out": Path(__file__) / "x"}, "its folder cannot be made"),
        ({"out": Path("x" * 300)}, "cannot be written: File name too long"),
        ({"out": Path("b"), "inspect": Path("b")}, "--inspect and --out were given together"),
        ({"inspect": Path("/dev/zero")}, "/dev/zero is a pipe or a device"),
        ({"from_npz": ("99999999999=a",)}, "--from-npz is '99999999999=a'"),
        ({"from_npz": ("99=/dev/null",)}, "no layer 99"),
        ({"from_npz": ("0=/dev/zero",)}, "/dev/zero is a pipe or a device"),
        ({"max_length": 4096}, "--max-length is 4096; the model has"),
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
def test_what_cannot_be_done_is_refused_in_one_line(request_, tmp_path, monkeypatch, change, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RetentionBenchError, match=why) as error:
        answer(dataclasses.replace(request_, **change), Store(tmp_path / "store"))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 6000


MOMENT = torch.diag(torch.arange(1.0, 9.0)) + 1


@pytest.fixture
def merged_(request_, measured, tmp_path):
    """Merge statistics like the measured ones, whose moments, and what is kept beside them, are others."""
    whole = KeyStatistics.load(measured[1])

    def merge(moments=None, inputs=None, **changes):
        changed = {layer: torch.eye(8) for layer in whole.moments} if moments is None else moments
        settings = {**whole.measured.settings, "inputs": {**whole.measured.settings["inputs"], **(inputs or {})}}
        measured = dataclasses.replace(whole.measured, **({"settings": settings} | changes))
        KeyStatistics(changed, whole.tokens, "", {}, measured).save(tmp_path / "s.safetensors")
        store = Store(tmp_path / "store")
        try:
            return answer(Request(merge=(tmp_path / "s.safetensors",)), store)["file"]
        finally:
            refused = not list(store.root.rglob("*.safetensors"))
            merge.refused = refused

    return merge


@pytest.mark.parametrize(
    ("moment", "why"),
    [
        (-MOMENT, "negative"),
        (MOMENT - 5 * torch.eye(8), "negative"),
        (MOMENT[:3], r"shape \[3, 8\] and is not square"),
        (MOMENT * float("nan"), "not finite"),
        (MOMENT.triu(), "not symmetric"),
        (MOMENT - MOMENT, "it is zero"),
    ],
)
def test_what_can_be_no_second_moment_is_not_merged(merged_, moment, why):
    with pytest.raises(RetentionBenchError, match=why):
        merged_({0: MOMENT, 1: moment})
    assert merged_.refused
    merged_({0: MOMENT, 1: MOMENT})
    assert not merged_.refused


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"moments": {0: MOMENT}}, r"for the layers \[0, 1\], and holds \[0\]"),
        ({"inputs": {"layers": [0]}}, r"for the layers \[0\], and holds \[0, 1\]"),
        ({"inputs": {"modules": ["a", "b"]}}, "for the modules"),
        ({"inputs": {"max_length": 7}}, "for the max_length 7, and holds 128"),
        ({"inputs": {"texts": 3}}, "for the texts 3, and holds 200"),
        ({"inputs": {"dtype": "float16"}}, "for the dtype float16, and holds float32"),
        ({"dtype": "float16"}, "for the dtype float32, and holds float16"),
        ({"texts": None}, "for the texts"),
        ({"settings": {"inputs": []}}, "settings: inputs: .*got a list of 0"),
        ({"settings": {"inputs": {}, "versions": {}}}, "settings: inputs.version"),
        ({"inputs": {"texts": "many"}}, "inputs.texts: .*got 'many'"),
        ({"inputs": {"model": None}}, "inputs.model: .*got None"),
        ({"inputs": {"more": 1}}, "inputs.more"),
    ],
)
def test_files_that_contradict_themselves_are_not_merged(merged_, change, why):
    with pytest.raises(RetentionBenchError, match=why):
        merged_(**change)
    assert merged_.refused


def test_one_file_given_twice_is_not_merged(measured, tmp_path):
    with pytest.raises(UsageError, match="is a whole measurement, not a shard. Give it alone"):
        answer(Request(merge=(measured[1], measured[1])), Store(tmp_path))
    with pytest.raises(UsageError, match="which is one of the files to merge"):
        answer(Request(merge=(Path(measured[1]),), out=Path(measured[1])), Store(tmp_path))


@pytest.mark.parametrize(
    ("changed", "options", "why"),
    [
        ("[]", {}, "config.json: .*got a list of 0"),
        ("{", {}, "config.json: not JSON"),
        (None, {"max_length": 4096}, "--max-length is 4096"),
        (None, {"layers": "2,99"}, "no layer 99"),
        (
            None,
            {"corpus": "some/corpus", "corpus_revision": "abc"},
            "'some/corpus' at revision abc, split 'train', cannot be read",
        ),
    ],
)
def test_what_can_be_known_is_known_before_the_model_is_loaded(request_, tmp_path, monkeypatch, changed, options, why):
    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(module, "load", None)
    config = (Path(request_.model) / "config.json").read_text()
    (tmp_path / "config.json").write_text(config if changed is None else changed)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(RetentionBenchError, match=why):
        answer(dataclasses.replace(request_, model=str(tmp_path), **options), Store(tmp_path / "store"))


def test_a_bad_row_is_found_before_the_model_is_loaded(request_, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load", None)
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a"}\n' * 300 + '{"text": 3}\n')
    with pytest.raises(RetentionBenchError, match="line 301: a corpus row needs a `text`"):
        answer(dataclasses.replace(request_, corpus=str(path), samples=400), Store(tmp_path / "store"))


def test_a_damaged_checkpoint_is_no_dead_end(request_, measured, tmp_path, monkeypatch, caplog):
    from retention_bench import editors

    collect = editors.collect_key_statistics
    monkeypatch.setattr(
        editors, "collect_key_statistics", lambda *a, **k: collect(*a, **k, checkpoint_every=0), raising=False
    )
    store = Store(tmp_path)

    def cut(stage, done, total, figures=None):
        if done > 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(request_, store, progress=cut)
    [checkpoint] = tmp_path.rglob("checkpoint.safetensors")
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    file = answer(request_, store)["file"]
    assert "set aside" in caplog.text
    assert Path(file).read_bytes() == Path(measured[1]).read_bytes()
    assert not list(tmp_path.rglob("*.work"))
