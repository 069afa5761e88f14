import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from retention_bench.errors import UsageError
from retention_bench.finetune import make_finetune, parse_finetune
from retention_bench.pipeline.suite import load_suite, suite_names

SETTINGS = {"source": "chats.jsonl", "train_size": 10, "validation_size": 5, "threshold": 0.7, "max_steps": 100}
BUILT_IN = ["commoncrawl", "counterfact", "imdb", "path", "tulu3"]


@pytest.mark.parametrize(
    ("name", "batch_size", "lr", "eval_every", "metric", "classes", "asks_base"),
    [
        ("commoncrawl", 256, 5e-5, 20, "validation_loss", None, False),
        ("counterfact", 256, 2e-5, 20, "validation_accuracy", None, True),
        ("imdb", 64, 2e-5, 5, "validation_accuracy", 2, False),
        ("path", 64, 2e-5, 20, "validation_loss", None, False),
        ("tulu3", 64, 2e-5, 20, "validation_loss", None, False),
    ],
)
def test_the_papers_settings_are_the_defaults(name, batch_size, lr, eval_every, metric, classes, asks_base):
    task = make_finetune(name, SETTINGS)
    assert task.name == name
    settings = task.settings
    assert (settings.batch_size, settings.lr, settings.eval_every) == (batch_size, lr, eval_every)
    assert (settings.metric, settings.classes, settings.asks_base) == (metric, classes, asks_base)
    assert (settings.weight_decay, settings.betas) == (0.01, (0.9, 0.999))


def test_naming_the_tasks_and_making_them_does_not_import_torch():
    code = (
        "import sys; from retention_bench.finetune import make_finetune, parse_finetune; "
        "from retention_bench.registry import FINETUNES; "
        f"[make_finetune(name, {SETTINGS!r}) for name in FINETUNES.names()]; parse_finetune('path:x/y'); "
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unknown_name_suggests_the_one_that_was_meant():
    with pytest.raises(UsageError, match=r"fine-tune 'tulu'.*'tulu3'"):
        make_finetune("tulu", SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"treshold": 1.0}, "'treshold'.*Did you mean 'threshold'"),
        ({"train_size": None}, "'train_size'"),
        ({"train_size": 0}, "'train_size'.*got 0"),
        ({"train_size": 10.5}, "'train_size'"),
        ({"batch_size": True}, "'batch_size'"),
        ({"batch_size": "64"}, "'batch_size'.*got '64'"),
        ({"lr": "2e-5"}, "'lr'.*YAML reads 2e-5 as text"),
        ({"lr": -1.0}, "'lr'.*got -1.0"),
        ({"lr": float("nan")}, "'lr'"),
        ({"lr": 10**400}, "'lr'"),
        ({"batch_size": -1}, "'batch_size'.*greater than or equal to 1, got -1"),
        ({"batch_size": 10**7}, "'batch_size'.*less than or equal to 1000000, got 10000000"),
        ({"max_steps": 10**12}, "'max_steps'.*less than or equal to 1000000"),
        ({"max_steps": 10**6, "batch_size": 512}, "batch_size 512 times max_steps 1,000,000 is more than 100,000,000"),
        (
            {"train_size": 10**5000},
            "'train_size'.*or equal to 100000000, got a number of thousands of digits",
        ),
        ({"max_length": 10**9}, "'max_length'.*less than or equal to"),
        ({"adapter_rank": 10**6}, "'adapter_rank'.*less than or equal to"),
        ({"weight_decay": -0.1}, "'weight_decay'.*greater than or equal to 0"),
        ({"betas": [float("nan"), 0.9]}, "'betas.0'.*nan"),
        ({"betas": 3}, "'betas'.*got 3"),
        ({"threshold": [["x"] * 10**5]}, "'threshold'"),
        ({None: 1}, "'None'. Allowed: adapter_alpha"),
        ({3: 1}, "'3'. Allowed: adapter_alpha"),
        ({"source": "a\0b"}, "source is no path: embedded null byte"),
        ({"source": "/" + "x" * 5000}, "source is no path: File name too long"),
        ({"source": "x" * 5000}, "source is no path: File name too long"),
        ({"source": "one/two/three"}, "neither a file nor a Hub data set id"),
        ({"source": "https://example.org/rows"}, "neither a file nor a Hub data set id"),
        ({"betas": [0.9]}, "'betas'"),
        ({"betas": [0.9, 1.0]}, "'betas.1'.*1.0"),
        ({"threshold": float("inf")}, "'threshold'"),
        ({"max_length": 1}, "'max_length'"),
        ({"source": ""}, "'source'"),
        ({"revision": 3}, "'revision'"),
        ({"validation_size": 11}, "validation_size 11 is larger than train_size 10"),
        ({"batch_size": 12, "micro_batch_size": 8}, "micro_batch_size 8 does not divide batch_size 12"),
    ],
)
def test_a_wrong_setting_is_named(change, message):
    with pytest.raises(UsageError, match=message) as refused:
        make_finetune("tulu3", SETTINGS | change)
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("2e-5"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@given(st.sampled_from(BUILT_IN), st.dictionaries(st.sampled_from([*SETTINGS, "betas", "lr", "classes", 1]), VALUES))
@hypothesis_settings(max_examples=30)
def test_whatever_a_suite_holds_it_makes_a_task_or_an_error_in_one_line(name, changes):
    try:
        task = make_finetune(name, SETTINGS | changes)
    except UsageError as error:
        one_line = "\n" not in str(error)
        assert one_line
    else:
        assert task.name == name


def test_a_missing_setting_is_named():
    with pytest.raises(UsageError, match="needs the setting 'threshold'.*--set finetunes.tulu3.threshold=VALUE"):
        make_finetune("tulu3", {name: value for name, value in SETTINGS.items() if name != "threshold"})


def test_integers_and_lists_stand_for_numbers_and_pairs():
    settings = make_finetune("tulu3", SETTINGS | {"threshold": 2, "betas": [0, 0.5]}).settings
    assert settings.threshold == 2
    assert settings.betas == (0, 0.5)


@pytest.mark.parametrize("name", ["counterfact", "imdb"])
def test_a_threshold_that_no_accuracy_can_pass_is_refused(name):
    with pytest.raises(UsageError, match=f"{name}.*threshold 1 is not below 1"):
        make_finetune(name, SETTINGS | {"threshold": 1})


@pytest.mark.parametrize("name", ["commoncrawl", "counterfact", "path", "tulu3"])
def test_a_validation_set_larger_than_the_training_set_it_is_drawn_from_is_refused(name):
    with pytest.raises(UsageError, match="validation_size 11 is larger than train_size 10"):
        make_finetune(name, SETTINGS | {"validation_size": 11})


def test_the_validation_rows_of_imdb_are_not_drawn_from_the_training_rows():
    assert make_finetune("imdb", SETTINGS | {"validation_size": 11}).settings.validation_size == 11


def test_a_data_set_stands_for_the_task_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    assert parse_finetune("tulu3") == ("tulu3", {})
    assert parse_finetune("path:own/rows.jsonl") == ("path", {"source": str(tmp_path / "own" / "rows.jsonl")})
    assert parse_finetune("path:./rows.csv") == ("path", {"source": str(tmp_path / "rows.csv")})
    assert parse_finetune("path:owner/rows") == ("path", {"source": "owner/rows"})
    assert parse_finetune("path:owner/rows@abc") == ("path", {"source": "owner/rows", "revision": "abc"})
    (tmp_path / "own" / "a@b.jsonl").touch()
    assert parse_finetune("path:own/a@b.jsonl") == ("path", {"source": str(tmp_path / "own" / "a@b.jsonl")})
    with pytest.raises(UsageError, match="'path:' names no data set"):
        parse_finetune("path:")


@pytest.mark.parametrize("suite", suite_names())
def test_every_suite_has_settings_for_every_task(suite):
    for model in load_suite(suite).models.values():
        assert sorted(model.finetunes) == BUILT_IN
        for name, settings in model.finetunes.items():
            make_finetune(name, {"source": "rows.jsonl"} | settings)


def test_a_data_set_needs_no_other_setting():
    settings = make_finetune(*parse_finetune("path:rows.jsonl")).settings
    assert (settings.train_size, settings.validation_size, settings.threshold, settings.max_steps) == (
        None,
        None,
        1.7,
        1000,
    )
