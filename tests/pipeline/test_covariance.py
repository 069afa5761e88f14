"""`retention-bench covariance`, and what stands behind it."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import datasets
import numpy
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

from retention_bench.cli import main
from retention_bench.editors import Covariance
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.pipeline import Bench, Cell, load_suite, plan
from retention_bench.pipeline import covariance as module
from retention_bench.store import Store


@pytest.fixture(scope="module")
def asked(small_suite):
    """What the small suite's covariance is measured on: options of `covariance measure`, by name."""
    suite = yaml.safe_load(small_suite.read_text())
    return {
        "model": suite["models"]["atlas-gpt2"]["path"],
        "layers": "0-1",
        "corpus": suite["covariance"]["source"],
        "samples": suite["covariance"]["texts"],
        "max-length": suite["covariance"]["max_length"],
        "device": "cpu",
    }


def words(command, options, *files):
    """The words of a command line; an option that is None is left out."""
    given = [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items() if value is not None
    ]
    return ["covariance", command, *given, *map(str, files)]


def run(line, root):
    """Call the command line with the store in a folder."""
    return CliRunner().invoke(main, line, env={"RETENTION_BENCH_STORE": str(root)})


def done(line, root):
    """The file that a command prints."""
    result = run(line, root)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def collect(asked, store, **more):
    """`covariance measure`, without the command line around it."""
    corpus = module.corpus_at(asked["corpus"], texts=asked["samples"], max_length=asked["max-length"])
    return module.collect(store, module.model_at(asked["model"]), "cpu", corpus, [0, 1], **more)


@pytest.fixture(scope="module")
def measured(asked, tmp_path_factory):
    """A store in which it was measured, and the file."""
    store = Store(tmp_path_factory.mktemp("store"))
    return store, done(words("measure", asked), store.root)


def test_evaluate_finds_what_was_measured(small_suite, measured):
    store, file = measured
    stage = (
        plan(Cell(load_suite(str(small_suite)), None, "alphaedit", "tulu3", 0, "cpu")).experiments[0].edit.covariance
    )
    assert str(store.find(stage) / "covariance.safetensors") == file


def test_the_key_names_the_projections(small_suite, tmp_path):
    cell = Cell(load_suite(str(small_suite)), "atlas-llama", "alphaedit", "tulu3", 0, "cpu")
    assert plan(cell).experiments[0].edit.covariance.inputs["modules"] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_a_file_serves_in_place_of_collecting_and_one_of_another_model_does_not(small_suite, measured, tmp_path):
    cell = Cell(load_suite(str(small_suite)), None, "alphaedit", "tulu3", 0, "cpu", covariance=measured[1])
    edit = plan(cell).experiments[0].edit
    bench = Bench(Store(tmp_path / "store"))
    assert torch.equal(edit.covariance.read(bench).mom2[0], Covariance.load(measured[1]).mom2[0])
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["covariance_file"]
    shutil.copy(measured[1], tmp_path / "elsewhere.safetensors")
    again = plan(dataclasses.replace(cell, covariance=str(tmp_path / "elsewhere.safetensors"))).experiments[0].edit
    assert again.key == edit.key
    with pytest.raises(UsageError, match="was measured on another model: the keys of its layer 0"):
        plan(dataclasses.replace(cell, model="atlas-llama"))
    with pytest.raises(UsageError, match="There is no covariance file"):
        plan(dataclasses.replace(cell, covariance=str(tmp_path / "none.safetensors")))


def test_what_the_store_holds_is_not_measured_again(asked, measured, monkeypatch, tmp_path):
    store, file = measured
    monkeypatch.setattr(module, "load", None)
    announced = []
    found = collect(asked, store, announce=lambda *a: announced.append(a))
    assert (str(found.file), announced) == (file, [("covariance", True)])
    assert done(words("measure", asked | {"out": tmp_path / "s.safetensors"}), store.root) == file
    assert Covariance.load(tmp_path / "s.safetensors").measured.texts == 200
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


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
def test_a_file_that_holds_no_covariance_is_not_written_over(measured, tmp_path, make):
    make(tmp_path / "out")
    kind = os.lstat(tmp_path / "out").st_mode
    with pytest.raises(UsageError, match="out, which is there and holds no covariance|out is no file"):
        module.check_out(tmp_path / "out")
    with pytest.raises(UsageError, match="File name too long"):
        module.check_out(tmp_path / ("x" * 300))
    assert os.lstat(tmp_path / "out").st_mode == kind
    assert not (tmp_path / "out").is_file() or (tmp_path / "out").read_text() in ("mine", "")
    for _ in range(2):  # what we wrote is written over
        module.check_out(tmp_path / "own.safetensors")
        module.copy_out(Path(measured[1]), tmp_path / "own.safetensors")
    with pytest.raises(UsageError, match="which is one of the files to merge"):
        module.check_out(tmp_path / "own.safetensors", [tmp_path / "own.safetensors"])


def test_a_dry_run_says_where_and_writes_nothing(asked, measured, tmp_path):
    store, file = measured
    assert done(words("measure", asked | {"dry-run": True}), store.root) == f"{file} (in the store)"
    found = run(words("measure", asked | {"dry-run": True, "samples": 9, "json": True}), tmp_path / "s")
    assert not json.loads(found.stdout)["in_store"]
    assert not (tmp_path / "s").exists()


def test_a_run_that_was_cut_off_goes_on_from_the_scratch_folder(asked, measured, tmp_path, monkeypatch):
    from retention_bench import editors

    def often(*args, **kwargs):
        return ours(*args, **kwargs, checkpoint_every=0)

    ours = editors.collect_covariance
    monkeypatch.setattr(editors, "collect_covariance", often, raising=False)
    store, seen = Store(tmp_path), []

    def cut(stage, done, total, figures=None):
        if done > 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(asked, store, progress=cut)
    file = collect(asked, store, progress=lambda stage, done, total, figures=None: seen.append((done, total))).file
    assert seen[0][0] > 100
    assert seen[-1] == (200, 200)
    first, again = (Covariance.load(path) for path in (measured[1], file))
    assert all(torch.equal(again.mom2[layer], matrix) for layer, matrix in first.mom2.items())
    assert not list(tmp_path.rglob("*.work"))


def test_shards_from_elsewhere_become_the_whole_that_evaluate_finds(asked, measured, tmp_path):
    parts = []
    for index in (0, 1):
        out = tmp_path / f"{index}.safetensors"
        done(words("measure", asked | {"shard": f"{index}/2", "out": out}), tmp_path / f"machine{index}")
        parts.append(out)
    store = Store(tmp_path / "here")
    file = done(words("merge", {"out": tmp_path / "whole.safetensors"}, *parts), store.root)
    assert file == measured[1].replace(str(measured[0].root), str(store.root))
    whole, merged = Covariance.load(measured[1]), Covariance.load(tmp_path / "whole.safetensors")
    assert (merged.tokens, merged.measured, merged.source) == (whole.tokens, whole.measured, whole.source)
    for layer, matrix in whole.mom2.items():
        torch.testing.assert_close(merged.mom2[layer], matrix, rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match="shards 0/2 are not the whole"):
        module.merge(store, parts[:1])


def test_what_may_be_something_else_is_not_merged_into_the_store(measured, tmp_path):
    whole = Covariance.load(measured[1])
    settings = whole.measured.settings
    other = {**settings, "versions": {**settings["versions"], "torch": "1.0"}}
    for changed, why in [(other, "other versions .torch 1.0, here 2"), ({}, "does not say what model and corpus")]:
        path = tmp_path / "s.safetensors"
        dataclasses.replace(whole, measured=dataclasses.replace(whole.measured, settings=changed)).save(path)
        with pytest.raises(UsageError, match=why):
            module.merge(Store(tmp_path / "store"), [path])


def test_what_nothing_proves_is_not_merged_into_the_store(measured, tmp_path):
    """Forged matrices with the metadata of a real measurement, but without its hash or its fingerprint."""
    whole, store = Covariance.load(measured[1]), Store(tmp_path / "store")
    forged = {layer: torch.eye(len(matrix)) for layer, matrix in whole.mom2.items()}
    path = tmp_path / "s.safetensors"
    dataclasses.replace(whole, mom2=forged, fingerprint={}).save(path)
    with pytest.raises(RetentionBenchError, match=r"no fingerprint of its model for the layers \[0, 1\]"):
        module.merge(store, [path])
    dataclasses.replace(whole, mom2=forged).save(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["retention_bench"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    save_file(tensors, path, {"retention_bench": json.dumps({k: v for k, v in about.items() if k != "sha256"})})
    with pytest.raises(RetentionBenchError, match="no hash of its matrices"):
        module.merge(store, [path])
    assert not list(store.root.rglob("*.safetensors"))


def test_files_of_the_references_are_imported(asked, measured, tmp_path):
    whole = Covariance.load(measured[1])
    for layer, matrix in whole.mom2.items():
        arrays = {"mom2.mom2": matrix.numpy() * whole.tokens, "mom2.count": numpy.array(whole.tokens)}
        numpy.savez(tmp_path / f"{layer}.npz", **arrays)
    model = {"model": asked["model"], "device": "cpu"}
    files = [f"{layer}={tmp_path}/{layer}.npz" for layer in whole.mom2]
    found = Covariance.load(done(words("import", model, *files), tmp_path / "store"))
    assert (found.tokens, found.source) == (whole.tokens, "0.npz, 1.npz")
    for layer, matrix in whole.mom2.items():
        torch.testing.assert_close(found.mom2[layer], matrix)
        assert torch.equal(found.fingerprint[layer], whole.fingerprint[layer])
    swapped = run(words("import", model | {"corpus": asked["corpus"]}, f"0={tmp_path}/1.npz"), tmp_path / "store")
    assert swapped.exit_code == 2
    assert "layer 0 is not this model's" in swapped.stderr


def test_a_file_is_inspected(measured):
    line = words("inspect", {"json": True}, measured[1])
    found = json.loads(done(line, measured[0].root))
    assert found["file"] == measured[1]
    assert (found["texts"], found["max_length"], found["dtype"], found["shard"]) == (200, 128, "float32", None)
    assert found["source"] == "the first 200 texts of corpus.jsonl.gz"
    assert found["fingerprint"]
    layer = found["layers"]["1"]
    assert (layer["module"], layer["size"]) == ("transformer.h.1.mlp.c_proj", 1024)
    assert layer["trace"] == pytest.approx(Covariance.load(measured[1]).mom2[1].trace().item(), rel=1e-4)
    assert 0 < layer["below"] < layer["size"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": None}, "Missing option '--model'"),
        ({"layers": None}, "Missing option '--layers'"),
        ({"corpus": None}, "Missing option '--corpus'"),
        ({"layers": "3-1"}, "'3-1'. Give numbers"),
        ({"layers": "a"}, "'--layers': 'a'"),
        ({"layers": "0,"}, "'0,'. Give numbers"),
        ({"layers": "99"}, "no layer 99"),
        ({"layers": "0-99999999999"}, "'0-99999999999'. Give numbers from 0 to 9999"),
        ({"layers": "9" * 5000}, "'9999.*[.]{3}. Give numbers"),
        ({"layers": "-1"}, "'-1'. Give numbers"),
        ({"layers": "\u0663"}, "Give numbers"),
        ({"samples": 0}, "'--samples'"),
        ({"samples": 10**30}, "'--samples'"),
        ({"samples": 1.5}, "'--samples': '1.5'"),
        ({"max-length": -1}, "'--max-length'"),
        ({"max-length": 10**30}, "'--max-length'"),
        ({"memory": float("nan")}, "nan is not a number to count with"),
        ({"memory": float("inf")}, "inf is not a number to count with"),
        ({"memory": 1e300}, "--memory is 1e.300 GiB. Give up to"),
        ({"memory": 0}, "'--memory'"),
        ({"dtype": "float64"}, "'float64' is not one of 'float32', 'bfloat16', 'float16'"),
        ({"device": "tpu"}, "'tpu' is not one of"),
        ({"shard": "1/9999999999"}, "shard is 1/9999999999, and there are 200 texts. Give at most as many"),
        ({"shard": "1/" + "9" * 5000}, "'1/999.*[.]{3}. Of N shards"),
        ({"shard": "-1/2"}, "'-1/2'. Of N shards"),
        ({"shard": "2/2"}, "'2/2'. Of N shards"),
        ({"shard": "1"}, "'1'. Of N shards"),
        ({"model": "x" * 5000}, "model is 'xxx.*no such folder"),
        ({"corpus": "x" * 5000}, "no data file at xxx"),
        ({"corpus": "/dev/zero"}, "/dev/zero is a pipe or a device"),
        ({"corpus": "/"}, "/ is a folder, where a data file is needed"),
        ({"out": "/"}, "/ is a folder|/ is no file|cannot be written"),
        ({"out": "/dev/null"}, "/dev/null is no file|/dev/null is a pipe or a device"),
        ({"out": __file__}, "which is there and holds no covariance. Give another"),
        ({"out": Path(__file__) / "x"}, "its folder cannot be made|is a file|no folder"),
        ({"out": "x" * 300}, "so long a name|File name too long"),
        ({"max-length": 4096}, "--max-length is 4096; the model has"),
        ({"memory": 1e-6}, "take .* bytes, and memory is 1073"),
        ({"corpus": "there/is/none.jsonl"}, "no data file at .*none.jsonl"),
        ({"corpus": "some/dataset"}, "'some/dataset' needs a `revision`"),
        ({"model": "/there/is/no/model"}, "model"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(asked, tmp_path, monkeypatch, change, why):
    monkeypatch.chdir(tmp_path)
    refused(words("measure", asked | change), tmp_path / "store", why)


def refused(line, root, why):
    """A command ends with one line that says why, and without a traceback."""
    result = run(line, root)
    assert (result.exit_code in (1, 2), result.stdout) == (True, "")
    assert isinstance(result.exception, SystemExit)
    errors = [line for line in result.stderr.splitlines() if line != "[1/1] covariance"]
    assert len(errors) == 1
    assert re.search(why, errors[0]), errors[0][:2000]
    assert len(errors[0]) < 6000


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (["99999999999=a"], "'99999999999=a'. Give LAYER=FILE"),
        (["99=/dev/null"], "no layer 99"),
        (["0=/dev/zero"], "/dev/zero is a pipe or a device"),
        (["0"], "'0'. Give LAYER=FILE"),
        (["0=a", "0=b"], "Layer 0 is named twice"),
        (["0=/no/such.npz"], "There is no .npz file at /no/such.npz"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(asked, tmp_path, files, why):
    refused(words("import", {"model": asked["model"], "device": "cpu"}, *files), tmp_path / "store", why)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("covariance inspect /dev/zero", "/dev/zero is a pipe or a device"),
        ("covariance inspect b --out b", "No such option"),
        ("covariance inspect b --dry-run", "No such option"),
        ("covariance merge", "Missing argument"),
        ("covariance merge none", "There is no file with a covariance at none"),
        ("covariance nothing", "No such command 'nothing'"),
    ],
)
def test_what_is_no_file_is_refused_in_one_line(tmp_path, monkeypatch, line, why):
    monkeypatch.chdir(tmp_path)
    refused(line.split(), tmp_path / "store", why)


def test_the_old_name_says_what_it_is_called_now(asked, measured, tmp_path):
    store, file = measured
    old = ["statistics", *words("measure", asked)[2:]]
    result = run(old, store.root)
    assert (result.exit_code, result.stdout.strip()) == (0, file)
    assert "`retention-bench statistics` is now called `retention-bench covariance measure`" in result.stderr
    shown = run(["statistics", f"--inspect={file}", "--json"], store.root)
    assert json.loads(shown.stdout)["texts"] == 200
    merged = run(["statistics", "--merge", file], tmp_path / "here")
    assert merged.stdout.strip() == file.replace(str(store.root), str(tmp_path / "here"))
    for line, why in [
        (["--inspect", "b", "--from-npz", "0=a"], "--inspect and --from-npz were given together"),
        (["--merge"], "--merge needs a value"),
    ]:
        result = run(["statistics", *line], tmp_path / "store")
        assert (result.exit_code, result.stdout) == (2, "")
        assert why in result.stderr.splitlines()[-1]
    assert "measure" in run(["statistics", "--help"], tmp_path).stdout
    assert "statistics" not in run(["--help"], tmp_path).stdout


MATRIX = torch.diag(torch.arange(1.0, 9.0)) + 1


@pytest.fixture
def merged_(measured, tmp_path):
    """Merge a covariance like the measured one, with other matrices and other metadata."""
    whole = Covariance.load(measured[1])

    def merge(mom2=None, inputs=None, **changes):
        changed = {layer: torch.eye(8) for layer in whole.mom2} if mom2 is None else mom2
        settings = {**whole.measured.settings, "inputs": {**whole.measured.settings["inputs"], **(inputs or {})}}
        measured = dataclasses.replace(whole.measured, **({"settings": settings} | changes))
        keys = {layer: torch.ones(len(matrix)) for layer, matrix in changed.items()}
        Covariance(changed, whole.tokens, "", keys, measured).save(tmp_path / "s.safetensors")
        store = Store(tmp_path / "store")
        try:
            return module.merge(store, [tmp_path / "s.safetensors"])
        finally:
            refused = not list(store.root.rglob("*.safetensors"))
            merge.refused = refused

    return merge


@pytest.mark.parametrize(
    ("matrix", "why"),
    [
        (-MATRIX, "negative"),
        (MATRIX - 5 * torch.eye(8), "negative"),
        (MATRIX[:3], r"shape \[3, 8\] and is not square"),
        (MATRIX * float("nan"), "not finite"),
        (MATRIX.triu(), "not symmetric"),
        (MATRIX - MATRIX, "it is zero"),
    ],
)
def test_what_can_be_no_covariance_is_not_merged(merged_, matrix, why):
    with pytest.raises(RetentionBenchError, match=why):
        merged_({0: MATRIX, 1: matrix})
    assert merged_.refused
    merged_({0: MATRIX, 1: MATRIX})
    assert not merged_.refused


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"mom2": {0: MATRIX}}, r"for the layers \[0, 1\], and holds \[0\]"),
        ({"inputs": {"layers": [0]}}, r"for the layers \[0\], and holds \[0, 1\]"),
        ({"inputs": {"modules": ["a", "b"]}}, "for the modules"),
        ({"inputs": {"max_length": 7}}, "for the max_length 7, and holds 128"),
        ({"inputs": {"texts": 3}}, "for the texts 3, and holds 200"),
        ({"inputs": {"dtype": "float16"}}, "inputs.dtype"),
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
        module.merge(Store(tmp_path), [measured[1], measured[1]])


@pytest.mark.parametrize(
    ("changed", "options", "why"),
    [
        ("[]", {}, "config.json: .*got a list of 0"),
        ("{", {}, "config.json: not JSON"),
        (None, {"max-length": 4096}, "--max-length is 4096"),
        (None, {"layers": "2,99"}, "no layer 99"),
        (
            None,
            {"corpus": "some/corpus", "corpus-revision": "abc"},
            "'some/corpus' at revision abc, split 'train', cannot be read",
        ),
    ],
)
def test_what_can_be_known_is_known_before_the_model_is_loaded(asked, tmp_path, monkeypatch, changed, options, why):
    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(module, "load", None)
    config = (Path(asked["model"]) / "config.json").read_text()
    (tmp_path / "config.json").write_text(config if changed is None else changed)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    result = run(words("measure", asked | {"model": tmp_path} | options), tmp_path / "store")
    assert result.exit_code in (1, 2)
    assert re.search(why, result.stderr.splitlines()[-1])


def test_a_bad_row_is_found_before_the_model_is_loaded(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load", None)
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a"}\n' * 300 + '{"text": 3}\n')
    with pytest.raises(RetentionBenchError, match="line 301: a corpus row needs a `text`"):
        collect(asked | {"corpus": str(path), "samples": 400}, Store(tmp_path / "store"))


def test_a_damaged_checkpoint_is_no_dead_end(asked, measured, tmp_path, monkeypatch, caplog):
    from retention_bench import editors

    ours = editors.collect_covariance
    monkeypatch.setattr(editors, "collect_covariance", lambda *a, **k: ours(*a, **k, checkpoint_every=0), raising=False)
    store = Store(tmp_path)

    def cut(stage, done, total, figures=None):
        if done > 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(asked, store, progress=cut)
    [checkpoint] = tmp_path.rglob("checkpoint.safetensors")
    os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    file = collect(asked, store).file
    assert "set aside" in caplog.text
    assert Path(file).read_bytes() == Path(measured[1]).read_bytes()
    assert not list(tmp_path.rglob("*.work"))
