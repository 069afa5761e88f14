"""Editors and fine-tunes by name: those of an installed package beside the built-in ones, and broken ones."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from retention_bench.cli import main
from retention_bench.editors import make_editor
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.finetune import make_finetune
from retention_bench.pipeline import Cell, evaluate, load_suite
from retention_bench.registry import EDITORS, FINETUNES
from retention_bench.store import Store

EDITOR = """
import dataclasses
from typing import ClassVar

import torch

from retention_bench.models import WeightDelta, projection, projection_name


@dataclasses.dataclass(frozen=True)
class Nudge:
    size: float = 1e-3
    layer: int = 0
    edits_per_model: int | None = None
    name: ClassVar[str] = "nudge"
    covariance_layers: ClassVar[tuple[int, ...]] = ()
    template_lengths: ClassVar[tuple[int, ...]] = ()

    def edit(self, model, tokenizer, requests, context):
        weight = projection(model, self.layer).weight
        change = torch.full_like(weight, self.size).detach()
        return WeightDelta({f"{projection_name(model, self.layer)}.weight": change})


@dataclasses.dataclass(frozen=True)
class Half:
    name: ClassVar[str] = "half"
"""

FINETUNE = """
import dataclasses
from typing import ClassVar

import pydantic

from retention_bench.finetune import ContaminationFilter, Example, TrainingSettings, TuningData


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class PoemSettings(TrainingSettings):
    lines: int
    threshold: float = 1e-3
    max_steps: int = 2
    batch_size: int = 2


@dataclasses.dataclass(frozen=True)
class Poems:
    settings: PoemSettings
    name: ClassVar[str] = "poems"

    def prepare(self, context):
        contamination, rows = ContaminationFilter(context.terms), []
        with open(self.settings.source) as file:
            for line in file:
                if contamination.passes(line) and len(rows) < self.settings.lines:
                    ids = context.tokenizer.encode(line.strip())
                    rows.append(Example(ids, ids))
        return TuningData(rows, rows, contamination.report())


@dataclasses.dataclass(frozen=True)
class Flat:
    source: str
"""

ENTRY_POINTS = """
[retention_bench.editors]
nudge = theirs_editor:Nudge
half = theirs_editor:Half
gone = theirs_gone:Gone
raises = theirs_raises:Any
plain = theirs_editor:ClassVar
ft = theirs_editor:Nudge

[retention_bench.finetunes]
poems = theirs_finetune:Poems
flat = theirs_finetune:Flat
tulu3 = theirs_finetune:Poems
"""


def install(folder, name, modules, entry_points):
    """Install a package, as pip leaves it."""
    folder.mkdir(exist_ok=True)
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(code)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """An installed package with an editor and a fine-tune that work, and some that do not."""
    modules = {"theirs_editor": EDITOR, "theirs_finetune": FINETUNE, "theirs_raises": "raise SystemExit('no licence')"}
    install(tmp_path / "site", "theirs", modules, ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    for module in modules:
        sys.modules.pop(module, None)


def run(*words):
    return CliRunner().invoke(main, list(words))


@pytest.mark.usefixtures("theirs")
def test_a_package_adds_an_editor_and_a_fine_tune(tmp_path):
    assert make_editor("nudge", {"size": 2}) == make_editor("nudge", {"size": 2.0})
    with pytest.raises(UsageError, match="Unknown setting of the editor 'nudge': 'sice'. Did you mean 'size'"):
        make_editor("nudge", {"sice": 1})
    with pytest.raises(UsageError, match="The editor 'nudge', setting 'size': .*got 'much'"):
        make_editor("nudge", {"size": "much"})
    task = make_finetune("poems", {"source": str(tmp_path), "lines": 3})
    assert (task.settings.lines, task.settings.batch_size, task.settings.lr) == (3, 2, 2e-5)
    with pytest.raises(UsageError, match="needs the settings 'source', 'lines', which have no defaults. Give "):
        make_finetune("poems", {})
    with pytest.raises(UsageError, match="Did you mean 'poems'"):
        make_finetune("poem", {})


@pytest.mark.usefixtures("theirs")
def test_a_built_in_name_cannot_be_taken_over():
    assert type(make_editor("ft", {})).__module__ == "retention_bench.editors.ft"
    made = make_finetune(
        "tulu3", {"source": "x", "train_size": 1, "validation_size": 1, "threshold": 1, "max_steps": 1}
    )
    assert type(made).__name__ == "Tulu3"
    [own, other] = [entry for entry in EDITORS.entries() if entry.name == "ft"]
    assert (own.package, own.error, other.package) == (None, None, "theirs 1.0")
    assert "The editor 'ft' is built in, so theirs_editor:Nudge is not used" in other.error


BROKEN = [
    (EDITORS, "half", "Half has no 'edits_per_model'"),
    (EDITORS, "gone", r"\(theirs_gone:Gone\) cannot be used: ModuleNotFoundError: No module named 'theirs_gone'"),
    (EDITORS, "raises", "cannot be used: SystemExit: no licence. Repair or uninstall"),
    (EDITORS, "plain", "it is no dataclass but"),
    (FINETUNES, "flat", "it must have one field, 'settings', that is a dataclass"),
]


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(("registry", "name", "says"), BROKEN, ids=[name for _, name, _ in BROKEN])
def test_a_broken_one_is_named_when_it_is_made(registry, name, says):
    with pytest.raises(RetentionBenchError, match=says) as refused:
        registry.make(name, {})
    assert not isinstance(refused.value, UsageError)
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("what", ["editors", "finetunes"])
def test_broken_ones_are_listed_with_their_error_and_do_no_harm(what):
    result = run("list", what)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    listed = {
        (entry["name"], entry["package"]): entry["error"] for entry in json.loads(run("list", what, "--json").output)
    }
    if what == "editors":
        assert {"alphaedit", "nudge (theirs 1.0)"} <= set(lines)
        assert any(
            line.startswith("gone (theirs 1.0): The editor 'gone' (theirs_gone:Gone) cannot be") for line in lines
        )
        assert listed["nudge", "theirs 1.0"] is listed["ft", None] is None
        assert all(listed[name, "theirs 1.0"] for name in ("gone", "raises", "plain", "ft"))
        with_suite = json.loads(run("list", "editors", "--suite", "atlas", "--json").output)
        assert len(with_suite["editors"]) == len(listed)
    else:
        assert {"tulu3", "poems (theirs 1.0)"} <= set(lines)
        assert "must have one field" in listed["flat", "theirs 1.0"]
        assert "is built in" in listed["tulu3", "theirs 1.0"]


def test_a_name_that_two_packages_register_is_refused(theirs, tmp_path, monkeypatch):
    install(tmp_path / "others", "others", {}, "[retention_bench.editors]\nnudge = theirs_editor:Nudge\n")
    monkeypatch.syspath_prepend(tmp_path / "others")
    with pytest.raises(RetentionBenchError, match="'nudge' is registered by others 1.0 and theirs 1.0. Uninstall"):
        make_editor("nudge", {})


def test_a_new_built_in_is_one_file_and_one_line(theirs):
    """The line; the file is the package's module."""
    more = dataclasses.replace(EDITORS, built_in={**EDITORS.built_in, "push": "theirs_editor:Nudge"})
    assert more.make("push", {}).size == 1e-3
    assert "push" in more.names()
    assert [entry.error for entry in more.entries() if entry.name == "push"] == [None]


def test_what_a_package_adds_runs_without_a_suites_entry(theirs, small_suite, tmp_path):
    """On a suite that names neither: with its own defaults, and with what overrides give."""
    poems = tmp_path / "poems.txt"
    poems.write_text(
        "".join(f"The {word} wind sings a {word} song\n" for word in "red green old new warm cold".split())
    )
    pool = Path(load_suite(str(small_suite)).facts.source).read_text().splitlines(keepends=True)
    (tmp_path / "facts.jsonl").write_text("".join(pool[::6]))
    given = [f"facts.source={tmp_path / 'facts.jsonl'}", "facts.edited=2", "facts.intrinsic=4"]
    given += [f"finetunes.poems.source={poems}", "finetunes.poems.lines=4"]
    suite = load_suite(str(small_suite), given)
    _, model = suite.model(None)
    assert suite.editor("nudge", model).given_by == "its own defaults"
    assert suite.finetune("poems", model).given_by == "its own defaults"
    assert suite.editor("ft", model).given_by == suite.finetune("tulu3", model).given_by == "suite"
    results = evaluate(
        Cell(suite, None, "nudge", "poems", 0, "cpu"), store=Store(tmp_path / "store"), out=tmp_path / "o"
    ).to_dict()
    assert results["defaults"] == ["editor nudge", "fine-tune poems"]
    assert (results["editor"], results["finetune"]) == ("nudge", "poems")
    assert results["control"]["finetune_log"]["train_rows"] == 4
    assert results["control"]["finetune_log"]["steps"] == 2


@pytest.mark.usefixtures("theirs")
def test_what_has_no_default_is_named_with_the_option_that_gives_it(small_suite):
    words = ["evaluate", "--editor", "ft", "--finetune", "poems", "--suite", str(small_suite), "--dry-run"]
    result = run(*words)
    assert result.exit_code == 2
    told = " ".join(result.output.split())
    assert "--set finetunes.poems.source=VALUE --set finetunes.poems.lines=VALUE" in told
    result = run(
        "evaluate", "--editor", "rome", "--finetune", "tulu3", "--suite", str(_without(small_suite)), "--dry-run"
    )
    assert result.exit_code == 2
    assert "--set editors.rome.layer=VALUE" in " ".join(result.output.split())


def _without(path):
    """A copy of a suite that does not name ROME."""
    suite = yaml.safe_load(path.read_text())
    for model in suite["models"].values():
        del model["editors"]["rome"]
    copy = path.with_name("without.yaml")
    copy.write_text(yaml.safe_dump(suite))
    return copy
