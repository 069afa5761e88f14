import copy
import json
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.pipeline import Cell, plan
from retention_bench.pipeline.suite import PACKAGED, Resolved, load_suite, suite_names
from retention_bench.registry import EDITORS
from retention_bench.store.fingerprints import model_fingerprint, source_fingerprint


def changed(tmp_path, change):
    parsed = yaml.safe_load((PACKAGED / "atlas.yaml").read_text())
    change(parsed)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(parsed))
    return str(path)


@pytest.mark.parametrize("name", suite_names())
def test_every_packaged_suite_is_valid(name):
    assert load_suite(name).name == name


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("./x", "suites/x"),
        ("../x", "x"),
        ("x.jsonl", "suites/x.jsonl"),
        ("data/x.csv.zst", "suites/data/x.csv.zst"),
        ("there", "suites/there"),
        ("link.jsonl", "suites/link.jsonl"),  # and not what it leads to, which may have another suffix
        ("/x", "/x"),
        ("~/x", "home/x"),
        ("owner/name", None),
        ("name", None),
    ],
)
def test_paths_are_seen_from_the_suites_file_and_those_that_are_set_from_here(tmp_path, monkeypatch, given, found):
    for folder in ("suites", "here"):
        (tmp_path / folder / "there").mkdir(parents=True)
        (tmp_path / folder / "link.jsonl").symlink_to("nothing")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def change(suite):
        suite["facts"]["source"] = suite["covariance"]["source"] = given
        for model in suite["models"].values():
            model["path"] = model["finetunes"]["tulu3"]["source"] = given

    def places(suite):
        models = [place for m in suite.models.values() for place in (m.path, m.finetunes["tulu3"]["source"])]
        return {suite.facts.source, suite.covariance.source, *models}

    path = changed(tmp_path / "suites", change)
    expected = given if found is None else str(tmp_path / found)
    assert places(load_suite(path)) == {expected}
    keys = ["facts.source", "covariance.source", "finetunes.tulu3.source"]
    keys += [f"models.{name}.path" for name in ("atlas-gpt2", "atlas-llama")]
    plain = changed(tmp_path / "suites", lambda suite: None)
    suite = load_suite(plain, [f"{key}={given}" for key in keys])
    assert places(suite) == {expected.replace("/suites/", "/here/")}


def test_what_is_set_goes_over_the_file_for_every_model_or_for_one():
    plain = load_suite("atlas")
    suite = load_suite("atlas", ["editors.ft.lr=1.0e-4", "models.atlas-llama.editors.ft.layer=2", "facts.edited=25"])
    assert (suite.facts.edited, suite.facts.intrinsic) == (25, plain.facts.intrinsic)
    gpt2, llama = (suite.models[name].editors["ft"] for name in ("atlas-gpt2", "atlas-llama"))
    before = plain.models["atlas-gpt2"].editors["ft"]
    assert gpt2 == before | {"lr": 1e-4}
    assert llama == before | {"lr": 1e-4, "layer": 2}
    assert suite.overrides == {"editors.ft.lr": 1e-4, "models.atlas-llama.editors.ft.layer": 2, "facts.edited": 25}
    assert not plain.overrides
    assert load_suite("atlas", {"facts.edited": "25"}).facts == load_suite("atlas", {"facts.edited": 25}).facts
    assert load_suite("atlas", ["facts.edited=3", "facts.edited=4"]).facts.edited == 4
    layers = load_suite("atlas", ["editors.alphaedit.layers=3-8"])
    found = layers.editor("alphaedit", layers.model(None)[1])
    assert EDITORS.make(found.registered, found.settings).layers == (3, 4, 5, 6, 7, 8)


def test_an_entry_can_be_added_and_names_may_have_dots(tmp_path):
    def change(suite):
        suite["models"]["llama-3.1"] = suite["models"].pop("atlas-llama")

    path = changed(tmp_path, change)
    given = ["editors.ft-l.norm_constraint=0.001", "editors.ft-l.editor=ft", "models.llama-3.1.dtype=bfloat16"]
    suite = load_suite(path, [*given, "models.llama-3.1.editors.ft.layer=0"])
    name, model = suite.model("llama-3.1")
    assert (name, model.dtype, model.editors["ft"]["layer"]) == ("llama-3.1", "bfloat16", 0)
    found = suite.editor("ft-l", model)
    assert (found.name, found.registered, found.given_by) == ("ft-l", "ft", "its own defaults")
    assert found.settings == {"norm_constraint": 0.001}


def test_what_runs_with_its_own_defaults_says_so():
    suite = load_suite("atlas")
    _, model = suite.model(None)
    assert suite.editor("r-rome", model).registered == "rome"
    assert suite.editor("r-rome", model).given_by == suite.finetune("tulu3", model).given_by == "suite"
    bare = model.model_copy(update={"editors": {}, "finetunes": {}})
    assert suite.editor("ft", bare) == Resolved("ft", "ft", {}, "its own defaults")
    found = suite.finetune("path:owner/rows@abc", bare)
    assert found == Resolved("path", "path", {"source": "owner/rows", "revision": "abc"}, "its own defaults")
    with pytest.raises(
        UsageError, match="needs the setting 'layers', which has no default.*--set editors.alphaedit.la"
    ):
        EDITORS.make("alphaedit", suite.editor("alphaedit", bare).settings)
    with pytest.raises(UsageError, match="Unknown editor 'r-rme'. Did you mean 'r-rome'"):
        suite.editor("r-rme", model)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("x", "--set 'x' is no KEY=VALUE. Write it as in --set editors.alphaedit.layers=3-8"),
        ("=3", "is no KEY=VALUE"),
        ("facts.edited=", "--set facts.edited= has no value"),
        ("facts.edited=[", "--set facts.edited, line 1: not valid YAML"),
        ("facts.edited=lots", "facts.edited: Input should be a valid integer, got 'lots'"),
        ("facts.edted=3", "unknown key 'facts.edted'. Did you mean 'edited'?"),
        ("fact.edited=3", "Unknown key of a suite 'fact'. Did you mean 'facts'?"),
        ("facts=3", "facts: Input should be a valid dictionary"),
        ("facts.edited.x=3", "--set facts.edited.x: there is no 'x' in 50"),
        ("models.atlas-gtp2.path=x", "Unknown model of the suite 'atlas-gtp2'. Did you mean 'atlas-gpt2'"),
        ("models.atlas-gpt2=3", "--set models.atlas-gpt2 names no setting"),
        ("models.atlas-gpt2.pth=x", "unknown key 'models.atlas-gpt2.pth'. Did you mean 'path'?"),
        ("models.atlas-gpt2.editors=3", "names no setting"),
        ("editors.ft=3", "--set editors.ft names no setting"),
        ("editors.ftt.lr=3", "--set editors.ftt.lr: Unknown editor 'ftt'. Did you mean 'ft'?"),
        ("editors.ft.lrr=3", "Unknown setting of the editor 'ft': 'lrr'. Did you mean 'lr'?"),
        ("editors.mine.editor=ftt", "Unknown editor 'ftt'. Did you mean 'ft'?"),
        ("finetunes.tulu3.tresh=3", "Unknown setting of the fine-tune 'tulu3': 'tresh'. Did you mean 'threshold'?"),
        ("finetunes.tulu.lr=3", "Unknown fine-tune 'tulu'. Did you mean 'tulu3'?"),
        ("default_model=atlas", "default_model: Unknown model 'atlas'. Did you mean"),
    ],
)
def test_what_is_wrong_with_what_is_set_is_said_in_one_line(given, says):
    with pytest.raises(UsageError) as caught:
        load_suite("atlas", [given])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    st.sampled_from(["facts", "models", "editors", "finetunes", "name", "x"]),
    st.lists(
        st.sampled_from(["ft", "tulu3", "atlas-gpt2", "editors", "edited", "source", "lr", "", "\0", "é"]), max_size=4
    ),
    st.sampled_from(["3", "x", "[1, 2]", "{a: 1}", "null", "&a [*a]", "~", "~nobody/x", "./x", "'", "\0", "1:30"]),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_set_is_a_suite_or_an_error_in_one_line(first, more, value):
    try:
        suite = load_suite("atlas", [f"{'.'.join([first, *more])}={value}"])
    except UsageError as error:
        one_line = "\n" not in str(error)
        assert one_line
    else:
        assert suite.overrides


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(finetuness={}), "unknown key 'finetuness'"),
        (lambda s: s["facts"].update(margn=0.2), "unknown key 'facts.margn'. Did you mean 'margin'?"),
        (lambda s: s["models"]["atlas-gpt2"].update(editor={}), "'models.atlas-gpt2.editor'. Did you mean 'editors'?"),
        (lambda s: s["facts"].update(edited=0), "facts.edited"),
        (lambda s: s["facts"].update(margin="much"), "facts.margin"),
        (lambda s: s.update(default_model="atlas-gpt"), "Did you mean 'atlas-gpt2'?"),
        (lambda s: s.pop("facts"), "facts: Field required"),
        (lambda s: s.update(name="../up"), "name: a name becomes a folder, so it must be of up to 100 letters"),
        (lambda s: s.update(name="/tmp/there"), "name: a name becomes a folder"),
        (lambda s: s.update(name=".hidden"), "name: a name becomes a folder"),
        (lambda s: s.update(name="x" * 101), "name: a name becomes a folder"),
        (lambda s: s.update(name="a\nb"), "name: a name becomes a folder"),
        (lambda s: s.update(name=""), "name: a name becomes a folder"),
        (lambda s: s.update(name=None), "name: Input should be a valid string, got None"),
        (lambda s: s["models"].update({"a/b": s["models"]["atlas-gpt2"]}), "models.a/b: a name becomes a folder"),
        (lambda s: s["models"]["atlas-gpt2"]["editors"].update({"..": {}}), "editors...: a name becomes a folder"),
        (lambda s: s["models"]["atlas-gpt2"]["finetunes"].update({"a b": {}}), "finetunes.a b: a name becomes"),
        (lambda s: s["models"]["atlas-gpt2"].update(path="x" * 300), "path: no file or folder can have so long a name"),
        (
            lambda s: s["models"]["atlas-gpt2"]["finetunes"]["tulu3"].update(source="x" * 300),
            "the source of tulu3: no ",
        ),
        (lambda s: s["facts"].update(source=" "), "facts.source: a path or a Hub id must not be empty, got ' '"),
        (lambda s: s["facts"].update(revision=""), "facts.revision: it must not be empty, got ''"),
        (lambda s: s["models"]["atlas-gpt2"].update(revision=" "), "models.atlas-gpt2.revision: it must not be empty"),
        (lambda s: s["models"]["atlas-gpt2"].update(revision=1234567), "A text that looks like a number or like yes"),
        (lambda s: s["facts"].update(margin="1e-1"), "has a point in front of its exponent, as in 2.0e-5."),
        (lambda s: s["facts"].update(keywords={"r": ["good", ""]}), "facts.keywords.r.1: it must not be empty, got ''"),
        (lambda s: s["facts"].update(keywords="autos"), "facts.keywords: Input should be 'auto', got 'autos'"),
        (lambda s: s["facts"].update(keywords=["auto"]), "facts.keywords: Input should be a valid dict"),
        (lambda s: s["facts"].update(keywords={"r": "auto"}), "facts.keywords.r: Input should be a valid tuple"),
        (lambda s: s["facts"].update(edited=10**9), "facts.edited: Input should be less than or equal to 1000000"),
        (lambda s: s["facts"].update(edited=True), "facts.edited: Input should be a valid integer, got True"),
        (lambda s: s["facts"].update(margin=float("nan")), "facts.margin: Input should be"),
        (lambda s: s["covariance"].update(texts=2**40), "covariance.texts: Input should be less than"),
        (lambda s: s["covariance"].update(texts=10**30), "an integer is larger than any here may be"),
        (
            lambda s: s.update(statistics=dict(s["covariance"])),
            "`statistics` is the old name of `covariance`, and both are there",
        ),
        (lambda s: s["covariance"].update(file=""), "covariance.file: a path or a Hub id must not be empty, got ''"),
        (lambda s: s.update(directory="/"), "unknown key 'directory'"),
        (lambda s: s.update(notice={str(n): [n] * 9 for n in range(999)}), "got an object with 999 keys."),
        (lambda s: s.update(default_model="x" * 999), "default_model: Unknown model 'xxx"),
    ],
)
def test_what_is_wrong_with_a_suite_is_said_in_one_line(tmp_path, change, says):
    with pytest.raises(UsageError) as caught:
        load_suite(changed(tmp_path, change))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_an_unknown_suite_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match="Unknown suite 'atlsa'. Did you mean 'atlas'"):
        load_suite("atlsa")
    with pytest.raises(UsageError, match="no suite file"):
        load_suite(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_suite(str(tmp_path / "bad.yaml"))


def test_a_model_is_one_of_the_suites_or_a_folder_or_a_hub_id(tmp_path):
    suite = load_suite("atlas")
    assert suite.model(None)[0] == suite.default_model
    name, config = suite.model(str(tmp_path))
    assert (name, config.path) == (tmp_path.name, str(tmp_path))
    assert config.editors == suite.models[suite.default_model].editors
    assert suite.model("owner/model")[1].path == "owner/model"
    with pytest.raises(UsageError, match="Did you mean 'atlas-gpt2'"):
        suite.model("atlas-gtp2")


def test_a_folder_a_file_and_a_text_are_no_models_by_mistake(tmp_path, monkeypatch):
    suite = load_suite("atlas")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("file", "a b/c", "~/none", "a/b/c", "x" * 300, "owner/na\nme"):
        with pytest.raises(UsageError, match="Unknown model"):
            suite.model(name)
    with pytest.raises(UsageError, match="must not be empty"):
        suite.model("")
    (tmp_path / "ev\x1bil").mkdir()
    assert suite.model("ev\x1bil")[0] == "ev\\x1bil"


def test_more_facts_than_the_pool_has_are_refused_before_anything_is_laid_out(tmp_path):
    def cell(**facts):
        path = Path(changed(tmp_path, lambda s: s["facts"].update(facts)))
        path.write_text(path.read_text().replace("../atlas/", f"{PACKAGED.parent / 'atlas'}/"))
        return Cell(load_suite(str(path)), None, "ft", "tulu3", 0, "cpu")

    where = {"source": str(PACKAGED.parent / "atlas" / "data" / "facts.jsonl")}
    with pytest.raises(UsageError, match="1,000,000 edited and 100 intrinsic facts are wanted, and the pool .* lines"):
        plan(cell(edited=1_000_000, **where))
    several = tmp_path / "mquake.jsonl"  # a line holds several facts, so it is not known yet how many there are
    several.write_text('{"case_id": 1, "requested_rewrite": [{}, {}]}\n')
    plan(cell(edited=25, source=str(several)))
    began = time.monotonic()
    with pytest.raises(UsageError, match="1,000,000 with edits_per_model 25 makes 40,000 edited models"):
        plan(cell(edited=1_000_000, source="owner/pool", revision="abc"))
    assert time.monotonic() - began < 5


WHOLE = yaml.safe_load((PACKAGED / "atlas.yaml").read_text())
WHOLE["models"] = {"m": WHOLE["models"]["atlas-gpt2"]}
WHOLE["default_model"] = "m"


def places(value, path=()):
    """The paths to everything in a suite."""
    if isinstance(value, dict):
        return [path, *(p for key, inner in value.items() for p in places(inner, (*path, key)))]
    return [path]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**9, 10**40, -1, 0, "~/x", "../..", "/dev/zero", "a/b", "x" * 400, "ft", "2.0e-3", ".", "on"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(places(WHOLE)), st.sampled_from(["set", "add", "drop"]), VALUES), max_size=3
)


def suite_text(changes):
    """The suite with some of it changed, as YAML."""
    suite = copy.deepcopy(WHOLE)
    for path, how, value in changes:
        parent = suite
        for key in path[:-1]:
            parent = parent.get(key) if isinstance(parent, dict) else None
        if not path or not isinstance(parent, dict) or path[-1] not in parent:
            continue
        if how == "drop":
            del parent[path[-1]]
        elif how == "set":
            parent[path[-1]] = value
        else:
            parent[json.dumps(value)[:40]] = value
    return yaml.safe_dump(suite).encode("utf-8", "surrogatepass")


def load_whatever(folder, data):
    """Read a suite and lay out a cell of it: a plan, or an error in one line."""
    path = folder / "x.yaml"
    path.write_bytes(data.replace(b"../atlas/", f"{PACKAGED.parent / 'atlas'}/".encode()))
    began = time.monotonic()
    try:
        plan(Cell(load_suite(str(path)), None, "ft", "tulu3", 0, "cpu"))
        said = ""
    except RetentionBenchError as error:
        said = str(error)
    assert "\n" not in said.strip()
    assert len(said) < 3000
    assert time.monotonic() - began < 5


FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
SUITES = (
    CHANGES.map(suite_text)
    | st.binary(max_size=100)
    | st.text(alphabet="a:{}[],&*!<- \n\"'|?#%@1.", max_size=60).map(str.encode)
)


@settings(max_examples=30, **FUZZ)
@given(data=SUITES)
def test_any_suite_is_planned_or_refused(tmp_path, data):
    load_whatever(tmp_path, data)


@pytest.mark.slow
@settings(max_examples=300, **FUZZ)
@given(data=SUITES)
def test_many_suites_are_planned_or_refused(tmp_path, data):
    load_whatever(tmp_path, data)


@pytest.mark.parametrize(
    ("make", "data", "model"),
    [
        (lambda path: None, "There is no data file at", "There is no model folder at"),
        (lambda path: path.mkdir(), "is no file, where a data file is needed", "holds no model"),
        (os.mkfifo, "is no file, where a data file is needed", "There is no model folder at"),
        (lambda path: path.symlink_to(path.name), "There is no data file at", "There is no model folder at"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS", "no model folder"),
    ],
    ids=["nothing", "folder", "pipe", "link in circles", "pointer"],
)
def test_what_a_suite_names_and_is_not_there_is_said_in_one_line(tmp_path, make, data, model):
    make(tmp_path / "given")

    def cell(change):
        path = Path(changed(tmp_path, change))
        path.write_text(path.read_text().replace("../atlas/", f"{PACKAGED.parent / 'atlas'}/"))
        return Cell(load_suite(str(path)), None, "ft", "tulu3", 0, "cpu")

    with pytest.raises(RetentionBenchError, match=data):
        plan(cell(lambda s: s["facts"].update(source="./given")))
    with pytest.raises(RetentionBenchError, match=model):
        plan(cell(lambda s: s["models"]["atlas-gpt2"].update(path="./given")))


def test_a_name_without_a_file_is_a_hub_id(tmp_path):
    with pytest.raises(UsageError, match="no file owner/pool, and the Hub data set 'owner/pool' needs a `revision`"):
        source_fingerprint("owner/pool", None)


def test_a_model_without_weights_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RetentionBenchError, match="holds no model"):
        model_fingerprint(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(RetentionBenchError, match=r"model\.safetensors is a Git LFS pointer"):
        model_fingerprint(str(tmp_path), None)


def test_the_old_name_of_the_covariance_section_still_works_and_is_said(tmp_path, caplog):
    path = changed(tmp_path, lambda s: s.update(statistics=s.pop("covariance")))
    assert load_suite(str(path)).covariance.texts == load_suite("atlas").covariance.texts
    assert "the section `statistics` is now called `covariance`. Rename it." in caplog.text
