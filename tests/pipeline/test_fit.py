"""An editor that trains before it edits: a package of its own, since none of the built-in ones is as quick."""

import json
import sys

import pytest
import yaml

from retention_bench.editors import FittedEditor, make_editor
from retention_bench.errors import RetentionBenchError
from retention_bench.facts import FactSet, read_pool
from retention_bench.pipeline import Cell, evaluate, load_suite, plan
from retention_bench.store import Store

PACKAGE = """
import dataclasses
import json
from typing import ClassVar

from retention_bench.errors import RetentionBenchError


@dataclasses.dataclass(frozen=True)
class Pupil:
    lessons: int
    edits_per_model: int | None = None
    name: ClassVar[str] = "pupil"
    covariance_layers: ClassVar[tuple[int, ...]] = ()
    template_lengths: ClassVar[tuple[int, ...]] = ()

    def fit(self, model, tokenizer, facts, folder, context):
        checkpoint = folder / "checkpoint.json"
        begun = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
        drawn = context.generator.initial_seed()
        checkpoint.write_text(json.dumps([*begun, drawn]))
        context.progress("lesson", len(begun) + 1, self.lessons)
        if len(begun) + 1 < self.lessons:
            raise RetentionBenchError("cut off")
        facts.write(folder / "facts.jsonl")

    def edit(self, model, tokenizer, requests, context):
        raise RetentionBenchError(f"edits with {context.fitted}")
"""


@pytest.fixture
def pupil(tmp_path, monkeypatch, small_suite):
    """A cell of an editor that an installed package registers, and whose training is cut off after its first lesson."""
    (tmp_path / "pupils.py").write_text(PACKAGE)
    about = tmp_path / "pupils-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pupils\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[retention_bench.editors]\npupil = pupils:Pupil\n")
    monkeypatch.syspath_prepend(tmp_path)
    suite = yaml.safe_load(small_suite.read_text())
    suite["facts"]["intrinsic_matched"] = 0
    suite["models"]["atlas-gpt2"]["editors"]["diligent"] = {"editor": "pupil", "lessons": 2}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    yield Cell(load_suite(str(path)), None, "diligent", "tulu3", 3, "cpu")
    sys.modules.pop("pupils", None)


def test_an_editor_is_trained_once_goes_on_where_it_was_cut_off_and_edits_with_what_it_wrote(pupil, tmp_path):
    store, out = Store(tmp_path / "store"), tmp_path / "out"
    planned = plan(pupil)
    assert isinstance(make_editor("pupil", {"lessons": 2}), FittedEditor)
    with pytest.raises(RetentionBenchError, match="cut off"):
        evaluate(pupil, store=store, out=out)
    assert store.find(planned.experiments[0].edit.fit) is None
    assert [p.suffix for p in (tmp_path / "store" / "fit").iterdir() if p.is_dir()] == [".work"]

    titles = []
    for _ in range(2):  # the second time it is not trained again
        with pytest.raises(RetentionBenchError, match="edits with ") as caught:
            evaluate(pupil, store=store, out=out, announce=lambda title, cached: titles.append((title, cached)))
        folder = store.find(planned.experiments[0].edit.fit)
        assert str(caught.value) == f"edits with {folder}"
    assert [cached for title, cached in titles if title == "diligent training"] == [False, True]
    assert json.loads((folder / "checkpoint.json").read_text()) == [3, 3]
    assert not list((tmp_path / "store").rglob("*.work"))
    assert [s.title() for s in planned.plan()][:7] == [
        "what the base model knows",
        "known-fact filter and split",
        "score the base model",
        "tulu3 fine-tune, unedited control",
        "score the control",
        "diligent training",
        "diligent edit, model 1 of 1",
    ]

    trained = FactSet.read(folder / "facts.jsonl")
    drawn = FactSet.read(store.find(planned.base.facts) / "facts.jsonl")
    subjects = {fact.subject for fact in drawn}
    assert not {fact.subject for fact in trained} & subjects
    pool = read_pool(pupil.suite.facts.source)
    assert len(trained) == sum(fact.subject not in subjects for fact in pool) < len(pool)
    assert len(trained.edited) == len(trained)


def test_what_an_editor_was_trained_with_is_a_part_of_its_edits_keys(pupil, tmp_path):
    Store(tmp_path / "store")
    first = plan(pupil)
    pupil.suite.models["atlas-gpt2"].editors["diligent"]["lessons"] = 3
    second = plan(pupil)
    one, two = (p.experiments[0].edit for p in (first, second))
    assert one.fit.key != two.fit.key
    assert one.inputs["fit"] == one.fit.key
    other = plan(Cell(pupil.suite, None, "ft", "tulu3", 3, "cpu"))
    assert other.experiments[0].edit.fit is None


def test_a_pool_without_facts_to_train_on_is_refused_with_that_reason(pupil, tmp_path):
    # As many facts are drawn as there are.
    pool = read_pool(pupil.suite.facts.source)
    store = Store(tmp_path / "store")
    with pytest.raises(RetentionBenchError, match="cut off"):
        evaluate(pupil, store=store, out=tmp_path / "out")
    planned = plan(pupil)
    drawn = FactSet.read(store.find(planned.base.facts) / "facts.jsonl")
    ids = {fact.id for fact in drawn}
    suite = yaml.safe_load((tmp_path / "suite.yaml").read_text())
    suite["facts"]["source"] = str(tmp_path / "few.jsonl")
    FactSet.of(fact for fact in pool if fact.id in ids).write(tmp_path / "few.jsonl")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    cell = Cell(load_suite(str(tmp_path / "suite.yaml")), None, "diligent", "tulu3", 3, "cpu")
    with pytest.raises(RetentionBenchError, match="diligent trains before it edits, and of the .* none is left"):
        evaluate(cell, store=store, out=tmp_path / "out")
