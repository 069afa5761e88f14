"""What a user's own type checker sees of the API, and what importing it costs."""

import importlib.util
import subprocess
import sys

import pytest

USER = '''"""What a user writes."""

from collections.abc import Mapping
from typing import reveal_type

import retention_bench as rb


def main() -> None:
    suite: rb.Suite = rb.load_suite("atlas")
    results: rb.Results = rb.evaluate(suite=suite, editor="ft", finetune="imdb", seed=1)
    edited: rb.Rate = results.retention.edited
    share: float | None = edited.rate
    rates: Mapping[str, Mapping[str, rb.Rate]] = results.stages
    print(share, rates["base"]["edited"].ci95, results.to_frame())
    reveal_type(edited.ci95)
    reveal_type(results.gap)
    reveal_type(rb.list_editors())
    facts: rb.FactSet = rb.FactSet.read("facts.jsonl")
    fact: rb.Fact = facts.edited.facts[0]
    for row in rb.score(["a"], facts=facts):
        print(row["task"], fact.target_new)
    try:
        rb.compare("a", "b")
    except rb.RetentionBenchError as error:
        print(error)
    rb.evaluate(editor="ft", finetune="imdb", seed="one")  # WRONG arg-type
    rb.evaluate(editor="ft")  # WRONG call-arg
    results.gap = None  # WRONG assignment
    rb.evalute()  # WRONG attr-defined
'''


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_users_file_is_checked_against_our_types(tmp_path):
    """mypy strict, on a file outside the checkout: what is right passes, what is wrong is found, nothing is Any."""
    (tmp_path / "user.py").write_text(USER)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-pretty",
        "--cache-dir",
        str(tmp_path / "cache"),
        "user.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert not done.stderr
    found = [line.split(":", 2) for line in done.stdout.splitlines() if line.startswith("user.py:")]
    errors = {int(number): text.rsplit("[", 1)[-1].rstrip("]") for _, number, text in found if " error: " in text}
    wrong = {n: line.split("# WRONG ")[1] for n, line in enumerate(USER.splitlines(), 1) if "# WRONG " in line}
    assert errors == wrong, done.stdout
    revealed = [text.split('"')[1] for _, _, text in found if "Revealed type" in text]
    assert [kind.removeprefix("builtins.").replace("builtins.", "") for kind in revealed] == [
        "tuple[float, float] | None",
        "retention_bench.results.measure_types.Gaps",
        "list[str]",
    ]


def test_importing_the_package_loads_no_model_library():
    heavy = ("torch", "transformers", "datasets", "lm_eval", "pydantic", "numpy")
    code = f"import sys, retention_bench as rb; dir(rb); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_names_of_the_api_are_there():
    import retention_bench as rb

    assert all(getattr(rb, name) is not None for name in rb.__all__)
    # A package of such a name would take its place as soon as it is imported.
    assert not [name for name in rb.__all__ if importlib.util.find_spec(f"retention_bench.{name}")]
    with pytest.raises(AttributeError, match="has no attribute 'evalute'"):
        rb.__getattr__("evalute")
