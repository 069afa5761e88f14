import pytest
import yaml

from retention_bench.errors import UsageError
from retention_bench.pipeline.suite import PACKAGED, load_suite, suite_names


def changed(tmp_path, change):
    parsed = yaml.safe_load((PACKAGED / "atlas.yaml").read_text())
    change(parsed)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(parsed))
    return str(path)


@pytest.mark.parametrize("name", suite_names())
def test_every_packaged_suite_is_valid(name):
    assert load_suite(name).name == name


def test_paths_are_seen_from_the_suites_file():
    suite = load_suite("atlas")
    assert suite.locate("../atlas/x") == str(PACKAGED.parent / "atlas" / "x")
    assert suite.locate("owner/name") == "owner/name"


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
    ],
)
def test_what_is_wrong_with_a_suite_is_said_in_one_line(tmp_path, change, says):
    with pytest.raises(UsageError) as caught:
        load_suite(changed(tmp_path, change))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


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
