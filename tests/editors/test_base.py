import dataclasses
import subprocess
import sys

import pytest

from retention_bench.editors import EditContext, EditRequest, make_editor
from retention_bench.errors import UsageError
from retention_bench.facts import Fact


def test_names_are_listed_without_importing_torch():
    code = (
        "import sys; from retention_bench.registry import EDITORS;"
        "assert {'ft', 'lora', 'alphaedit'} <= {entry.name for entry in EDITORS.entries()};"
        "assert 'torch' not in sys.modules"
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
        ("ft", {"lrr": 1.0}, "Unknown setting of the editor 'ft': 'lrr'. Did you mean 'lr'"),
        ("ft", {"name": "x"}, "Unknown setting of the editor 'ft': 'name'"),
        ("alphaedit", {}, "needs the setting 'layers'"),
        ("alphaedit", {"layers": []}, "setting 'layers'"),
        ("alphaedit", {"layers": [2, 1]}, "setting 'layers': .*ascend"),
        ("alphaedit", {"layers": [1, 1]}, "setting 'layers': .*ascend"),
        ("alphaedit", {"layers": [-1]}, "setting 'layers.0': .*greater than or equal to 0, got -1"),
        ("alphaedit", {"layers": [1.5]}, "setting 'layers.0'"),
        ("alphaedit", {"layers": [1], "L2": 0}, "setting 'L2': .*greater than 0, got 0"),
        (
            "ft",
            {"lr": "5e-5"},
            "setting 'lr': .*number, got '5e-5'. YAML reads 5e-5 as text; write the number with a point",
        ),
        ("ft", {"lr": True}, "setting 'lr'"),
        ("ft", {"lr": float("inf")}, "setting 'lr'"),
        ("ft", {"lr": float("nan")}, "setting 'lr': .*finite number, got nan"),
        ("ft", {"lr": [1.0]}, "setting 'lr': .*got a list of 1"),
        ("ft", {"lr": 10**5000}, "setting 'lr': .*got a number of thousands of digits"),
        ("ft", {"layer": -1}, "setting 'layer': .*greater than or equal to 0, got -1"),
        ("ft", {"layer": 10**11}, "setting 'layer': .*less than or equal to 9999, got 10+"),
        ("ft", {"layer": 1.0}, "setting 'layer': .*integer, got 1.0"),
        ("ft", {1: 2}, "Unknown setting of the editor 'ft': '1'"),
        ("alphaedit", {"layers": range(10**6)}, "setting 'layers.10000'"),
        ("alphaedit", {"layers": "3-x"}, "setting 'layers': layers are written as .* 3-8, got '3-x'"),
        ("alphaedit", {"layers": "8-3"}, "setting 'layers': layers are written as .* 3-8, got '8-3'"),
        ("alphaedit", {"layers": "1,1"}, "setting 'layers': .*ascend"),
        ("alphaedit", {"layers": True}, "setting 'layers': .*got True"),
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


@pytest.mark.parametrize(
    ("given", "layers"),
    [("3-8", (3, 4, 5, 6, 7, 8)), ("0, 2,5-6", (0, 2, 5, 6)), ("4", (4,)), (4, (4,)), ([4, 7], (4, 7))],
)
def test_layers_are_read_as_they_are_written_on_a_command_line(given, layers):
    assert make_editor("alphaedit", {"layers": given}).layers == layers


def test_a_request_is_made_from_a_fact():
    fact = Fact("f1", "Rome", "capital", "The city of {} lies in", "Italy", target_new=" Peru ")
    assert EditRequest.from_fact(fact) == EditRequest(
        "f1", "The city of {} lies in", "Rome", "Peru", target_true="Italy"
    )
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
