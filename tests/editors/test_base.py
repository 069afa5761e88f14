import dataclasses
import subprocess
import sys

import pytest

from retention_bench.editors import EditContext, EditRequest, editor_names, make_editor
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import Fact


def test_names_are_listed_without_importing_torch():
    code = (
        "import sys; from retention_bench.editors import editor_names;"
        "assert {'ft', 'lora', 'alphaedit'} <= set(editor_names()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_become_fields_and_the_rest_keep_their_defaults():
    editor = make_editor("alphaedit", {"layers": [1, 3], "L2": 1})
    assert (editor.name, editor.layers, editor.L2, editor.edits_per_model) == ("alphaedit", (1, 3), 1.0, None)
    assert editor.covariance_layers == (1, 3)
    ft = make_editor("ft", {})
    assert dataclasses.asdict(ft) == {  # the paper's
        "edits_per_model": 1,
        "layer": 1,
        "lr": 5e-5,
        "num_steps": 25,
        "weight_decay": 0.0,
        "stop_loss": 0.01,
        "objective": "target",
        "norm_constraint": None,
        "batch_size": 128,
    }
    assert ft.covariance_layers == ()
    assert make_editor("ft", {"edits_per_model": None}).edits_per_model is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        ft.lr = 1.0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("alphaedt", {}, "Unknown editor 'alphaedt'. Did you mean 'alphaedit'"),
        ("ft", {"lrr": 1.0}, "Unknown setting of editor 'ft': 'lrr'. Did you mean 'lr'"),
        ("ft", {"name": "x"}, "Unknown setting of editor 'ft': 'name'"),
        ("alphaedit", {}, "needs the setting 'layers'"),
        ("alphaedit", {"layers": []}, "setting 'layers'"),
        ("alphaedit", {"layers": [2, 1]}, "setting 'layers': .*ascend"),
        ("alphaedit", {"layers": [1, 1]}, "setting 'layers': .*ascend"),
        ("alphaedit", {"layers": [-1]}, "setting 'layers.0': .*greater than or equal to 0, got -1"),
        ("alphaedit", {"layers": [1.5]}, "setting 'layers.0'"),
        ("alphaedit", {"layers": [1], "L2": 0}, "setting 'L2': .*greater than 0, got 0"),
        ("ft", {"lr": "5e-5"}, "setting 'lr': .*number, got '5e-5'. YAML reads 5e-5 as text; write 5.0e-5"),
        ("ft", {"lr": True}, "setting 'lr'"),
        ("ft", {"lr": float("inf")}, "setting 'lr'"),
        ("ft", {"lr": float("nan")}, "setting 'lr': .*finite number, got nan"),
        ("ft", {"lr": [1.0]}, "setting 'lr': .*got a list of 1"),
        ("ft", {"lr": 10**5000}, "setting 'lr': .*got a number of thousands of digits"),
        ("ft", {"layer": -1}, "setting 'layer': .*greater than or equal to 0, got -1"),
        ("ft", {"layer": 10**11}, "setting 'layer': .*less than or equal to 9999, got 10+"),
        ("ft", {"layer": 1.0}, "setting 'layer': .*integer, got 1.0"),
        ("ft", {1: 2}, "Unknown setting of editor 'ft': '1'"),
        ("alphaedit", {"layers": range(10**6)}, "setting 'layers.10000'"),
        ("alphaedit", {"layers": "3-8"}, "setting 'layers': .*got '3-8'"),
        ("alphaedit", {"layers": {"a": 1}}, "setting 'layers': .*got an object"),
        ("alphaedit", {"layers": None}, "setting 'layers': .*got None"),
        ("lora", {"r": 10**9}, "setting 'r': .*less than or equal to 65536"),
        ("malmen", {"layers": [1], "rank": 10**9}, "setting 'rank': .*less than or equal to 65536"),
        ("ft", {"num_steps": True}, "setting 'num_steps': .*got True"),
        ("ft", {"num_steps": 10**12}, "setting 'num_steps': .*less than or equal to 2147483647, got 10+"),
        ("ft", {"num_steps": 10**5000}, "setting 'num_steps': .*got a number of thousands of digits"),
        ("ft", {"num_steps": 0}, "setting 'num_steps'"),
        ("ft", {"edits_per_model": 0}, "setting 'edits_per_model'"),
        ("ft", {"objective": "targets"}, "setting 'objective': .*'target' or 'prompt_last', got 'targets'"),
    ],
)
def test_wrong_names_and_values_are_refused(name, settings, message):
    with pytest.raises(UsageError, match=message):
        make_editor(name, settings)


PLUGIN = """
import dataclasses
from typing import ClassVar

@dataclasses.dataclass(frozen=True)
class Shout:
    volume: int
    edits_per_model: int | None = None
    name: ClassVar[str] = "shout"
    covariance_layers: ClassVar[tuple[int, ...]] = ()

    def edit(self, model, tokenizer, requests, context):
        return self.volume
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An installed package that registers one editor that works, one that cannot be imported, and one named `ft`."""
    (tmp_path / "shouting.py").write_text(PLUGIN)
    about = tmp_path / "shouting-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[retention_bench.editors]\nshout = shouting:Shout\nbroken = shouting_not:There\nft = shouting:Shout\n"
        "plain = shouting:ClassVar\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("shouting", None)


def test_installed_packages_add_editors(request):
    without = editor_names()
    request.getfixturevalue("plugin")
    assert editor_names() == sorted({*without, "shout", "broken", "plain"})
    assert make_editor("shout", {"volume": 11}).edit(None, None, [], EditContext()) == 11
    assert type(make_editor("ft", {})).__name__ == "FT"  # a built-in one cannot be taken over
    with pytest.raises(UsageError, match="Unknown setting of editor 'shout': 'volum'. Did you mean 'volume'"):
        make_editor("shout", {"volum": 1})
    with pytest.raises(UsageError, match="setting 'volume'"):
        make_editor("shout", {"volume": "loud"})
    with pytest.raises(RetentionBenchError, match="'plain' is registered as .*, which is no dataclass"):
        make_editor("plain", {})
    with pytest.raises(RetentionBenchError, match="shouting_not:There, which cannot be imported"):
        make_editor("broken", {})


def test_a_request_is_made_from_a_fact():
    fact = Fact("f1", "Rome", "capital", "The city of {} lies in", "Italy", target_new=" Peru ")
    assert EditRequest.from_fact(fact) == EditRequest("f1", "The city of {} lies in", "Rome", "Peru")
    more = EditRequest.from_fact(fact, ["{} is a town of", "In short, the city of {} lies in "])
    assert more.prompts == ("The city of {} lies in", "{} is a town of", "In short, the city of {} lies in")
    with pytest.raises(UsageError, match="'f1': the prompt 'Rome is' must contain"):
        EditRequest.from_fact(fact, ["Rome is"])
    with pytest.raises(UsageError, match="'f1' has no target_new"):
        EditRequest.from_fact(dataclasses.replace(fact, target_new=None))


@pytest.mark.parametrize(
    ("prompt", "subject", "target", "message"),
    [
        ("Rome lies in", "Rome", "Peru", "Fact 'f1': the prompt 'Rome lies in' must contain '{}' exactly once.*'Rome'"),
        ("{} and {} lie in", "Rome", "Peru", "exactly once"),
        ("{} lies in", " ", "Peru", "Fact 'f1': the subject is empty"),
        ("{} lies in", "Rome", " ", "Fact 'f1': target_new is empty"),
    ],
)
def test_requests_that_cannot_be_edited_are_refused(prompt, subject, target, message):
    with pytest.raises(UsageError, match=message):
        EditRequest("f1", prompt, subject, target)


@pytest.mark.parametrize("template", ["no place", "{} twice {}"])
def test_a_context_template_needs_one_place(template):
    with pytest.raises(UsageError, match="must contain '{}' exactly once"):
        EditContext(templates=("Fine. {}", template))
