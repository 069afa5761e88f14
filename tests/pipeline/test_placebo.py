"""Placebo editors as parts of a cell: what they are made of, and what that makes of the answers."""

import math

import pytest
from safetensors.torch import load_file

from retention_bench.errors import UsageError
from retention_bench.models import WeightDelta
from retention_bench.pipeline import Bench, Cell, load_suite, plan
from retention_bench.store import Store


def planned(suite, editor, overrides=(), **settings):
    return plan(Cell(load_suite(str(suite), overrides), None, editor, "tulu3", 0, "cpu", **settings))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(Store(tmp_path_factory.mktemp("placebo") / "store"))


def deltas(bench, last):
    return [WeightDelta.load(e.edit.file(bench)) for e in last.experiments]


def test_a_placebo_shares_the_groups_and_the_edits_of_the_other_editor(small_suite):
    whole = planned(small_suite, "alphaedit")
    for editor in ("random:alphaedit", "scaled:0.5:alphaedit", "scaled:0.5:random:alphaedit"):
        last = planned(small_suite, editor)
        assert last.editor == editor
        assert [e.group for e in last.experiments] == [e.group for e in whole.experiments]
        assert {e.edit.key for e in whole.experiments} < {stage.key for stage in last.plan()}
        assert last.control.key == whole.control.key
        assert last.defaults == ()


def test_settings_of_the_other_editor_count(small_suite):
    changed = planned(small_suite, "scaled:0.5:ft", ["editors.ft.layer=2"])
    assert changed.experiments[0].edit.of.settings["layer"] == 2
    assert changed.experiments[0].edit.key != planned(small_suite, "scaled:0.5:ft").experiments[0].edit.key


def test_an_entry_of_the_suite_can_be_a_placebo(small_suite):
    given = ["editors.half.editor=scaled", "editors.half.of=ft", "editors.half.factor=0.5"]
    edit = planned(small_suite, "half", given).experiments[0].edit
    assert (edit.editor, edit.settings, edit.of.editor) == ("scaled", {"of": "ft", "factor": 0.5}, "ft")
    assert edit.key == planned(small_suite, "scaled:0.5:ft").experiments[0].edit.key


@pytest.mark.parametrize(
    ("editor", "given", "says"),
    [
        ("scaled:0.5:memitt", [], "Unknown editor 'memitt'. Did you mean 'memit'"),
        ("scaled:-1:memit", [], "factor.* got -1.0"),
        ("random", [], "needs the setting 'of'"),
        ("loop", ["editors.loop.editor=random", "editors.loop.of=loop"], "made of itself: loop of loop"),
        ("a", ["editors.a.editor=random", "editors.a.of=random:a"], "made of itself: a of random:a of a"),
    ],
)
def test_what_a_placebo_cannot_be_made_of_is_refused_at_once(small_suite, editor, given, says):
    with pytest.raises(UsageError, match=says):
        planned(small_suite, editor, given)


def test_noise_is_as_large_as_the_edit_and_other_in_every_model(small_suite, bench):
    whole = deltas(bench, planned(small_suite, "alphaedit"))
    noise = deltas(bench, planned(small_suite, "random:alphaedit"))
    for edit, drawn in zip(whole, noise, strict=True):
        assert drawn.norms() == pytest.approx(edit.norms(), rel=1e-5)
    first, second = (load_file(e.edit.file(bench)) for e in planned(small_suite, "random:alphaedit").experiments)
    name = next(name for name in first if name.endswith("right"))
    assert not first[name].equal(second[name])


def test_the_whole_edit_scaled_by_1_is_itself_to_the_byte(small_suite, bench):
    pairs = zip(
        planned(small_suite, "alphaedit").experiments,
        planned(small_suite, "scaled:1:alphaedit").experiments,
        strict=True,
    )
    for whole, scaled in pairs:
        assert whole.edit.file(bench).read_bytes() == scaled.edit.file(bench).read_bytes()


@pytest.mark.parametrize("editor", ["none", "scaled:0:alphaedit"])
def test_no_change_gives_the_base_models_answers(small_suite, bench, editor):
    last = planned(small_suite, editor)
    asked = {(s.kind, s.fact_id, s.prompt): s for s in last.base.read(bench)}
    for experiment in last.experiments:
        samples = experiment.after_edit.read(bench)
        assert samples
        for sample in samples:
            before = asked[sample.kind, sample.fact_id, sample.prompt]
            assert sample.logprob == pytest.approx(before.logprob, abs=1e-4)  # other batches, other rounding
            assert sample == before.model_copy(update={"logprob": sample.logprob})
            assert editor != "none" or sample == before


def test_a_matched_edit_starts_as_sure_as_the_base_model_was(small_suite, bench):
    last = planned(small_suite, "scaled:matched:alphaedit", ["editors.alphaedit.v_num_grad_steps=20"])
    known = {s.fact_id: math.exp(s.logprob) for s in last.base.read(bench) if s.kind == "edited_true"}
    for experiment in last.experiments:
        new = [s for s in experiment.after_edit.read(bench) if s.kind == "edited"]
        mean = sum(math.exp(s.logprob) for s in new) / len(new)
        assert mean == pytest.approx(sum(known[s.fact_id] for s in new) / len(new), abs=2e-3)


def test_how_large_an_edit_is_and_what_multiple_of_the_other_one(small_suite, bench):
    whole, half, noise, nothing = (
        planned(small_suite, editor).experiments[0].edit
        for editor in ("alphaedit", "scaled:0.5:alphaedit", "random:alphaedit", "none")
    )
    [delta, *_] = deltas(bench, planned(small_suite, "alphaedit"))
    assert whole.norm(bench) == pytest.approx(sum(norm**2 for norm in delta.norms().values()) ** 0.5)
    assert whole.factor(bench) is None
    assert half.factor(bench) == pytest.approx(0.5)
    assert noise.factor(bench) == pytest.approx(1.0)
    assert (nothing.norm(bench), nothing.factor(bench)) == (0.0, None)


def test_separate_prompts_are_requests_and_still_the_same_number_of_facts(small_suite, bench):
    given = {"paraphrases": 2, "paraphrase_source": "own+template"}
    mean = planned(small_suite, "alphaedit", **given)
    separate = planned(small_suite, "alphaedit", paraphrase_mode="separate", **given)
    assert [e.group for e in separate.experiments] == [e.group for e in mean.experiments]
    ranks = []
    for last in (mean, separate):
        [delta, *_] = deltas(bench, last)
        ranks.append({entry.left.shape[1] for entry in delta.entries.values()})
    assert ranks == [{3}, {9}]
    assert mean.base.paraphrases.counts(bench) == {"own": 12, "template": 0}
    without = planned(small_suite, "alphaedit", paraphrase_mode="separate")
    assert without.key == planned(small_suite, "alphaedit").key  # no paraphrases, no mode


def test_a_mode_that_there_is_not_is_refused(small_suite):
    with pytest.raises(UsageError, match="Unknown paraphrase mode 'seperate'. Did you mean 'separate'"):
        planned(small_suite, "ft", paraphrases=1, paraphrase_mode="seperate")
