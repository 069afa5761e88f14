"""What the package consists of: which way its modules import each other, and what is in its wheel."""

import graphlib
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]


def test_imports_point_one_way():
    """The layers stand in pyproject.toml; imports inside functions and for types alone count too."""
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", lint, "--no-cache", "--no-logo", "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_no_module_imports_itself_by_way_of_others():
    graph = grimp.build_graph("retention_bench", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert sum(map(len, imports.values())) > 300  # it was really read
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_a_benchmark_finds_what_it_imports(script, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # as for a script that is run
    runpy.run_path(str(ROOT / "benchmarks" / script), run_name="imported")


def test_the_wheel_has_the_world_and_nothing_that_makes_it(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {name.split("/")[0] for name in names}
    assert folders == {"retention_bench", next(folder for folder in folders if folder.endswith(".dist-info"))}
    atlas = {name for name in names if name.startswith("retention_bench/atlas/")}
    assert {"retention_bench/atlas/data/facts.jsonl", "retention_bench/atlas/models/atlas-gpt2/config.json"} <= atlas
    assert not [name for name in atlas if name.endswith(".py")]
    assert {f"retention_bench/{f}" for f in ("py.typed", "tasks/retention.yaml", "suites/atlas.yaml")} <= names
