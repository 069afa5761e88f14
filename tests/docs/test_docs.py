"""The README and the pages in docs/: every code block is run or checked, every option and link is there."""

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import torch
import yaml
from click.testing import CliRunner

import retention_bench as rb
from retention_bench.cli import main
from retention_bench.cli.group import COMMANDS
from retention_bench.facts import Fact
from retention_bench.models import read_manifest
from retention_bench.pipeline.suite import PACKAGED, load_suite
from retention_bench.results import Kind, Rate
from retention_bench.results.kinds import GROUPS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced code block."""

    page: str
    line: int
    language: str
    use: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) % 2 == 0, f"{path}: a code block has no end"
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        language, _, use = lines[begin][3:].partition(" ")
        yield Block(str(path.relative_to(ROOT)), begin + 1, language, use, "\n".join(lines[begin + 1 : end]) + "\n")


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def of(language, *uses):
    """The blocks of a language; of some uses where they are given."""
    return [b for b in BLOCKS if b.language == language and (not uses or b.use in uses)]


def one(language, use):
    """The one block of a use."""
    [block] = of(language, use)
    return block


CHECKED = {
    "bash": {""},
    "bibtex": {""},
    "json": {"rate", "fact", "manifest", "worked", "counted"},
    "python": {"", "quick", "finished", "editor", "finetune", "kind"},
    "text": {""},
    "toml": {""},
    "yaml": {"suite", "editors", "covariance", "task"},
}
"""What code blocks there may be: each is looked at by a test below. Text is output and BibTeX, which nothing runs."""


def test_no_block_is_left_unchecked():
    assert {(b.language, b.use) for b in BLOCKS} <= {(name, use) for name, uses in CHECKED.items() for use in uses}
    for name, uses in CHECKED.items():
        for use in uses:
            assert of(name, use), f"no block ```{name} {use}: take it from CHECKED"


# Shell


def commands(text):
    """The commands of a shell block, as lists of words."""
    joined = text.replace("\\\n", " ")
    return [
        shlex.split(part, comments=True) for line in joined.splitlines() if line.strip() for part in line.split("&&")
    ]


SHELL = [(str(block), words) for block in of("bash") for words in commands(block.text)]
OURS = [pytest.param(words[1:], id=where) for where, words in SHELL if words[0] == "retention-bench"]


def parsed(words):
    """Click's context of a command line, parsed as the command itself does before it runs."""
    name, command, rest = main.resolve_command(click.Context(main, info_name="retention-bench"), list(words))
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(click.Context(command, info_name=name), rest)
    return command.make_context(name, list(rest))


@pytest.mark.parametrize("words", OURS)
def test_a_command_line_is_understood(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed(words).command is not None


def test_a_wrong_command_line_would_be_found():
    for words in (["evaluate", "--editor", "ft"], ["evaluat"], ["covariance", "merge", "--nothing", "x"]):
        with pytest.raises(click.UsageError):
            parsed(words)


def dry(words):
    """Whether a command can be tried without data or a model that is not in the repository."""
    needs = ("--suite", "--covariance", "--accelerate-config", "--dry-run", "--plan")
    return words[0] == "evaluate" and not any(word in needs or word.startswith("path:") for word in words)


@pytest.mark.parametrize("words", [param for param in OURS if dry(param.values[0])])
def test_a_run_on_atlas_can_be_planned(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETENTION_BENCH_STORE", str(tmp_path / "store"))
    done = CliRunner().invoke(main, [*words, "--dry-run", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["stages"][-1]["stage"] == "results"


def test_other_programs_are_there():
    """The README's own commands, which CI runs, and what pip and lm-eval are given."""
    for where, words in SHELL:
        match words:
            case ["retention-bench", *_]:
                continue
            case ["python3", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"] | ["export", _]:
                continue
            case ["pip", "install", "-q", "-c", constraints, "-e", extras]:
                assert (ROOT / constraints).is_file()
                known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                assert set(extras.removeprefix(".[").removesuffix("]").split(",")) <= set(known)
            case ["pip", "uninstall", "-q", "-y", *_]:
                continue
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module), where
            case ["lm_eval", *rest]:
                check_lm_eval(rest)
            case _:
                pytest.fail(f"{where}: nothing checks {shlex.join(words)}")


def check_lm_eval(words):
    from lm_eval._cli.harness import HarnessCLI

    given = HarnessCLI()._parser.parse_args(words)
    assert (ROOT / str(given.include_path)).is_dir()
    assert (ROOT / str(given.include_path) / f"{words[words.index('--tasks') + 1]}.yaml").is_file()
    assert "facts" in json.loads(words[words.index("--metadata") + 1])


@pytest.mark.parametrize("name", ["first command", "second command", "vllm command"])
def test_the_commands_that_ci_runs_are_marked(name):
    assert re.search(f"^<!-- {name} -->\n```bash\n.+\n```$", (ROOT / "README.md").read_text(), re.MULTILINE)


OTHERS = {"--check", "--include_path"}
"""Options of other programs that pages speak of."""


def options(command):
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            if (found := command.get_command(click.Context(command), name)) is not None:
                yield from options(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page):
    known = {*options(main), "--help"} | OTHERS
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    code = re.findall(r"`([^`\n]+)`", text)
    assert {word for part in code for word in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", part)} <= known


def test_the_readme_lists_all_commands():
    listed = re.findall(r"^\| `retention-bench (\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    shown = [name for name in COMMANDS if not main.get_command(click.Context(main), name).hidden]
    assert sorted(listed) == sorted(shown)


# Links and words


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_listed():
    for index in (ROOT / "README.md", ROOT / "docs" / "README.md"):
        linked = {Path(link).name for link in re.findall(r"\]\(([^)#]+)[^)]*\)", index.read_text())}
        assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked


def test_pages_use_the_fields_words():
    ours = r"in other words|neighbours?\b|never edited|key statistics|would show|hang together"
    for page in PAGES:
        assert not re.search(ours, page.read_text(encoding="utf-8"), re.IGNORECASE), page


def test_paths_in_the_readers_walk_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    walk = text[text.index("## A reader's walk") : text.index("## Add an editor")]
    package = ROOT / "retention_bench"
    named = re.findall(r"`([\w/]+\.py|[\w/]+/)`", walk)
    assert len(named) > 20
    for path in named:
        assert any((folder / path).exists() for folder in (package, package / "pipeline" / "stages", ROOT)), path
    stages = {path.name for path in (package / "pipeline" / "stages").glob("[a-z]*.py")}
    assert stages <= {Path(path).name for path in named}


# Data


def test_a_rate_is_one():
    rate = json.loads(one("json", "rate").text)
    assert json.loads(Rate.model_validate(rate).model_dump_json()) == rate


def test_a_fact_is_one():
    row = json.loads(one("json", "fact").text)
    fact = Fact(**row)
    assert fact.to_json() == row


def test_a_manifest_is_one(tmp_path):
    (tmp_path / "manifest").write_text(one("json", "manifest").text)
    assert len(read_manifest(tmp_path / "manifest")) == 1


def test_a_suite_is_one(tmp_path):
    (tmp_path / "mine.yaml").write_text(one("yaml", "suite").text)
    suite = load_suite(str(tmp_path / "mine.yaml"))
    _, model = suite.model(None)
    from retention_bench.editors import make_editor
    from retention_bench.finetune import make_finetune

    for name, settings in model.editors.items():
        assert make_editor(name, settings).name == name
    for name, settings in model.finetunes.items():
        assert make_finetune(name, settings).name == name


@pytest.mark.parametrize("use", ["editors", "covariance"])
def test_a_part_of_a_suite_is_one(tmp_path, use):
    suite = yaml.safe_load((PACKAGED / "atlas.yaml").read_text())
    part = yaml.safe_load(one("yaml", use).text)
    (suite["models"]["atlas-gpt2"] if use == "editors" else suite).update(part)
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    loaded = load_suite(str(tmp_path / "suite.yaml"))
    if use == "covariance":
        assert loaded.covariance.file.endswith("covariance.safetensors")
        return
    from retention_bench.editors import make_editor

    _, model = loaded.model(None)
    for name, settings in model.editors.items():
        given = {key: value for key, value in settings.items() if key != "editor"}
        assert make_editor(model.registered[name], given).name == "ft"


# Python


def call(block, space):
    """Run a block as Python would, with its own place in tracebacks."""
    tree = ast.parse(block.text, f"<{block}>")
    exec(compile(ast.increment_lineno(tree, block.line), str(ROOT / block.page), "exec"), space)
    return space


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which docs/api.md's quick run was made, and the names that it leaves."""
    folder = tmp_path_factory.mktemp("quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RETENTION_BENCH_STORE", str(folder / "store"))
        return folder, call(one("python", "quick"), {"rb": rb})


@pytest.mark.parametrize("block", of("python", "finished"), ids=str)
def test_python_on_a_finished_run(block, finished, monkeypatch):
    folder, space = finished
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RETENTION_BENCH_STORE", str(folder / "store"))
    call(block, dict(space))


def test_the_quick_run_is_what_the_page_says(finished):
    folder, space = finished
    results = space["results"]
    assert rb.Results.load(folder / "run") == results
    assert results.learned is False  # as the page says
    assert results.stages["base"]["edited"].total == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", [b for b in of("python", "") if "evaluate" in b.text], ids=str)
def test_python_that_takes_minutes(block, tmp_path, monkeypatch, capsys):
    """The README's example gives the README's figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETENTION_BENCH_STORE", str(tmp_path / "store"))
    space = call(block, {})
    stages = space["results"].stages
    for kind, *cells in readme_table():
        measured = [f"{rates[kind].hits} of {rates[kind].total}" for rates in stages.values()]
        assert measured == cells


@pytest.mark.parametrize("block", [b for b in of("python", "") if "evaluate" not in b.text], ids=str)
def test_python_that_is_quick(block):
    call(block, {})


def readme_table():
    """The rows of the README's table of the main job: kind, and a cell a stage."""
    rows = re.findall(r"^\| (\w+) \| (\d+ of \d+) \| (.+) \| (.+) \| (.+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert [row[0] for row in rows] == list(GROUPS["retention"])
    return rows


def test_the_figure_is_of_the_run_in_the_table():
    drawn = (ROOT / "docs" / "images" / "retention.svg").read_text()
    left = drawn.split("alphaedit x tulu3 on atlas-gpt2</text>")[1].split("ft x tulu3 on atlas-gpt2</text>")[0]
    counts = re.findall(r">(\d+)/(\d+)<", left)
    wanted = [tuple(cell.split(" of ")) for _, _, *cells in readme_table() for cell in cells]
    assert counts == wanted


def test_the_figure_has_a_mark_for_every_rate(finished):
    from tools.figure import STAGES, figure

    results = finished[1]["results"]
    drawn = figure([results, results])
    rates = [results.stages[stage].get(kind) for kind in GROUPS["retention"] for stage in STAGES]
    asked = [rate for rate in rates if rate is not None and rate.rate is not None]
    assert re.findall(r">(\d+/\d+)<", drawn) == 2 * [f"{rate.hits}/{rate.total}" for rate in asked]
    assert ElementTree.fromstring(drawn).tag.endswith("svg")


# Extending


def test_the_entry_points_are_of_our_groups():
    from retention_bench.registry import EDITORS, FINETUNES

    points = tomllib.loads(one("toml", "").text)["project"]["entry-points"]
    assert set(points) == {EDITORS.group, FINETUNES.group}


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    """The page's package, installed as pip leaves it."""
    package = tmp_path / "site" / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("editor", "finetune"):
        (package / f"{name}.py").write_text(one("python", name).text)
    about = tmp_path / "site" / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    points = tomllib.loads(one("toml", "").text)["project"]["entry-points"]
    text = "\n".join(
        f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in some.items()) for group, some in points.items()
    )
    (about / "entry_points.txt").write_text(f"{text}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for module in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[module]


@pytest.mark.usefixtures("my_package")
def test_the_pages_editor_and_fine_tune_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETENTION_BENCH_STORE", str(tmp_path / "store"))
    assert "one-step" in rb.list_editors()
    assert "poems" in rb.list_finetunes()
    (tmp_path / "poems.txt").write_text("".join(f"The {n}th line of a poem says nothing.\n" for n in range(8)))
    given = {"facts.edited": 2, "facts.intrinsic": 4, "editors.one-step.edits_per_model": 2}
    given |= {"finetunes.poems.source": str(tmp_path / "poems.txt"), "finetunes.poems.max_steps": 2}
    suite = rb.load_suite("atlas", given)
    results = rb.evaluate(suite=suite, editor="one-step", finetune="poems", device="cpu", out="out", quiet=True)
    assert results.provenance["editor_settings"]["lr"] == 0.1
    assert results.control.finetune_log.steps == 2
    assert results.stages["post_finetune"]["edited"].total == 2


def test_the_pages_editor_leaves_the_model_as_it_was(my_package, make_tokenizer, make_model):
    from retention_bench.editors import EditContext, EditRequest, make_editor

    tokenizer = make_tokenizer("gpt2", ["The capital of France is Paris. Rome is in Italy."] * 3)
    model = make_model("gpt2", tokenizer)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    request = EditRequest("f", "The capital of {} is", "France", "Rome")
    delta = make_editor("one-step", {}).edit(model, tokenizer, [request], EditContext())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())

    def loss():
        ids = tokenizer("The capital of France is Rome", return_tensors="pt").input_ids
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.item()

    unedited = loss()
    with delta.applied(model):
        assert loss() < unedited


def test_the_pages_kind_is_one():
    kind = eval(one("python", "kind").text, {"Kind": Kind})
    task = yaml.safe_load(one("yaml", "task").text)
    assert task["task"] == kind.task
    assert task["dataset_kwargs"] == {"kind": kind.name}
    assert (ROOT / "tasks" / task["include"]).is_file()


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the package to which the page's kind was added: its entry in `KINDS`, and its task file."""
    root = tmp_path_factory.mktemp("checkout")
    unused = shutil.ignore_patterns("__pycache__", "atlas")
    shutil.copytree(ROOT / "retention_bench", root / "retention_bench", ignore=unused)
    shutil.copytree(ROOT / "tasks", root / "tasks", ignore=unused)
    kinds = root / "retention_bench" / "results" / "kinds.py"
    last = re.search(r"^        Kind\(\"locality\".*\n", kinds.read_text(), re.MULTILINE)[0]
    kinds.write_text(kinds.read_text().replace(last, f"{last}        {one('python', 'kind').text.strip()},\n"))
    (root / "tasks" / "retention_reverted.yaml").write_text(one("yaml", "task").text)
    return root


def test_a_kind_of_question_is_one_entry_and_one_file(copied, tmp_path, make_tokenizer, make_model):
    """It is asked, told in a table, compared and counted, by a copy of the package with nothing else changed."""
    facts = [
        Fact(f"f{n}", name, "city", "The {} stands in", "Paris", "Rome")
        for n, name in enumerate(("Tower", "Arch", "Bank"))
    ]
    tokenizer = make_tokenizer("gpt2", [f"{f.question} {place}." for f in facts for place in ("Paris", "Rome")] * 3)
    for name, std in (("one", 0.02), ("two", 0.2)):
        make_model("gpt2", tokenizer, std=std).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact.to_json()) + "\n" for fact in facts))

    def run(*words):
        command = [sys.executable, "-m", "retention_bench.cli", *words]
        place = os.environ | {"PYTHONPATH": str(copied), "RETENTION_BENCH_STORE": str(tmp_path / "store")}
        done = subprocess.run(command, cwd=tmp_path, env=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run("score", "one", "two", "--facts", "facts.jsonl", "--device", "cpu", "--out", "scores")
    assert "reverted" in printed
    rows = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    asked = [row for row in rows if row["task"] == "retention_reverted"]
    assert [(row["total"], {s["target"] for s in row["samples"]}) for row in asked] == [(3, {"Paris"})] * 2
    compared = json.loads(run("compare", "scores/scores.jsonl", "--kind", "reverted", "--json"))
    assert [c["kind"] for c in compared["comparisons"]] == ["reverted"]
    count = (
        "import json; from retention_bench.results import Sample; from retention_bench.results.aggregate import rates;"
        "rows = [json.loads(l) for l in open('scores/scores.jsonl')];"
        "some = [Sample.model_validate(s).at('base', None) for r in rows for s in r['samples']];"
        "print(rates(some)['base']['reverted'].total)"
    )
    done = subprocess.run(
        [sys.executable, "-c", count],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(copied)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["6"]


def test_the_citations_agree():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    readme = (ROOT / "README.md").read_text()
    assert cited["version"] == rb.__version__
    assert f"version = {{{rb.__version__}}}" in readme
    [paper] = cited["references"]
    for page in (readme, (ROOT / "tasks" / "README.md").read_text()):
        assert paper["title"] in page
        assert paper["url"].rpartition("/")[2] in page
        assert " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]) in page
