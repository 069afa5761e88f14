"""Runs and files of scores, read back to be compared and inspected."""

import hashlib
import json
import shutil

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retention_bench.cli import main
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import Fact, FactSet
from retention_bench.results.compare import compared, inspected, read
from retention_bench.results.score_file import ScoreFile

FACTS = [Fact(f"f{i}", f"Town {i}", "state", "{} lies in", "Texas", "Utah" if i < 8 else None) for i in range(12)]


def sample(fact, hit, kind="edited", **more):
    target = fact.target_new if kind == "edited" else fact.target_true
    row = {"kind": kind, "fact_id": fact.id, "prompt": fact.prompt.format(fact.subject), "target": target, "hit": hit}
    row |= {"relation": fact.relation, "strict": hit, "whole": hit}
    row["outcome"] = ("new" if kind == "edited" else "true") if hit else "other"
    return more | row | {"token_ids": [1, 2], "text": f" {target if hit else 'the [red]sea'}", "logprob": -0.5}


def stage_rows(stage, hits):
    """Two edited models of four facts each, both asked the four intrinsic ones."""
    own = [sample(f, i < hits, stage=stage, experiment=i // 4) for i, f in enumerate(FACTS[:8])]
    return own + [sample(f, True, "intrinsic", stage=stage, experiment=e) for e in range(2) for f in FACTS[8:]]


MADE = {"model": "m", "finetune": "tulu3", "horizon": "threshold", "freeze": "none", "adapter": "none"}


def gate(name, value, limit, text=""):
    passed = value >= limit
    return {"name": name, "passed": passed, "value": float(value), "limit": float(limit), "text": text or name}


def write_run(folder, after, gates=(), settings=None, unedited=False, **changes):
    folder.mkdir()
    rows = stage_rows("post_edit", 8) + stage_rows("post_finetune", after)
    for stage in ("base", "control_finetune") if unedited else ():
        rows += [sample(f, True, "edited_true", stage=stage) for f in FACTS[:8]]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cell = {"schema_version": 4, "gates": list(gates), **MADE, **changes}
    cell["provenance"] = {"finetune_settings": settings or {"lr": 0.1}}
    (folder / "results.json").write_text(json.dumps(cell))
    FactSet.of(FACTS).write(folder / "facts.jsonl")
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return write_run(tmp_path / "a", 8), write_run(tmp_path / "b", 1)


def score_line(checkpoint, hits, task="edited", **changes):
    """A line of a file of scores, without its hash."""
    samples = [sample(f, i < hits, task) for i, f in enumerate(FACTS[:8])]
    rate = {"hits": hits, "total": 8, "rate": hits / 8, "ci95": [0.0, 1.0]}
    line = {
        "checkpoint": checkpoint,
        "key": "k",
        "stop_words": 2,
        "task": f"retention_{task}",
        **rate,
        "samples": samples,
    }
    return line | changes


def hashed(line):
    """A line as `score` writes it."""
    text = json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return json.dumps({**line, "sha256": hashlib.sha256(text.encode()).hexdigest()}) + "\n"


@pytest.fixture
def scores(tmp_path):
    lines = [
        score_line("step-10", 8),
        score_line("step-10", 8, "intrinsic"),
        {"checkpoint": "hf:step-20", "task": "retention_edited", "error": "disk full"},
        score_line("hf:step-20", 2),
        {"checkpoint": "step-30", "error": "no weights"},
    ]
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(map(hashed, lines)))
    return path


def test_runs_are_compared_after_the_fine_tune(runs):
    found = compared(runs)
    edited, intrinsic = found["comparisons"]
    assert (edited["lost"], edited["p"]) == ([f"f{i}" for i in range(1, 8)], 2 / 2**7)
    assert (intrinsic["facts"], intrinsic["questions"], intrinsic["kept"]) == (4, 4, [f"f{i}" for i in range(8, 12)])
    assert found["sides"] == list(runs)
    assert json.loads(json.dumps(found)) == found
    assert [c["lost"] for c in compared(runs, stage="post_edit")["comparisons"]] == [[], []]


def test_stages_of_a_run_are_compared(runs):
    (found,) = compared([f"{runs[1]}:post_edit", f"{runs[1]}:post_finetune"], kinds=["edited"])["comparisons"]
    assert (len(found["lost"]), len(found["kept"])) == (7, 1)


LEARNED = gate("learned", 3, 3)
FEW = gate("efficacy", 0.06, 0.8, "3 of 50 edits took; 80 % must")


@pytest.mark.parametrize(
    ("stage", "failing", "gated"),
    [
        ("post_edit", FEW, True),
        ("post_finetune", FEW, True),
        ("control_finetune", FEW, False),
        ("base", FEW, False),
        ("post_edit", gate("edited_facts", 3, 20), True),
        ("post_edit", gate("learned", 1, 3), False),
        ("post_finetune", gate("learned", 1, 3), True),
        ("control_finetune", gate("learned", 1, 3), True),
        ("base", gate("learned", 1, 3), False),
    ],
)
def test_a_gate_counts_at_every_stage_that_it_is_about(tmp_path, stage, failing, gated, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    all_gates = (("a", [LEARNED]), ("b", [failing]), ("c", []))
    sides = [write_run(tmp_path / name, 8, gates, unedited=True) for name, gates in all_gates]
    for named in (sides, [f"{side}:{stage}" for side in sides]):
        found = compared(named, stage=stage)
        assert found["gated"] == ({named[1]: [failing["text"]]} if gated else {})
        assert found["ranks"]
        assert all((named[1] in ranks) is not gated for ranks in found["ranks"].values())
        shown = CliRunner().invoke(main, ["compare", "--stage", stage, *named]).output
        assert (f"B is not ranked: {failing['text']}." in shown) is gated


def test_all_runs_are_held_to_the_strictest_limit(tmp_path):
    """A run made with --min-efficacy 0.1 has no rank beside one that had to reach 0.8."""
    low, high = (gate("efficacy", value, limit, f"{value}") for value, limit in ((0.3, 0.1), (0.9, 0.8)))
    a, b = (write_run(tmp_path / name, 8, [own, LEARNED], unedited=True) for name, own in (("a", low), ("b", high)))
    c = write_run(tmp_path / "c", 8, [low, gate("learned", 9, 9)], unedited=True)
    d = write_run(tmp_path / "d", 8, [low | {"value": 0.8}], unedited=True)
    found = compared([a, b, d])
    assert found["gated"] == {a: ["0.3; the limit of another side is 0.8"]}
    assert (found["headlines"][a]["rank"], set(found["ranks"]["edited"])) == (None, {b, d})
    assert compared([a, c])["gated"] == {}  # how many fine-tunes there are is no limit
    assert all(own["rank"] for own in compared([a, c])["headlines"].values())


def test_what_runs_differ_in_besides_the_editor_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    a = write_run(tmp_path / "a", 8)
    other = write_run(tmp_path / "b", 8, horizon="steps:[b]40", settings={"lr": 0.2})
    same = write_run(tmp_path / "c", 1)
    imdb = write_run(tmp_path / "d", 1, finetune="imdb", settings={"lr": 0.3})
    assert compared([a, same])["unequal"] == {}
    found = compared([a, other, same])
    assert found["unequal"] == {
        "horizon": {a: "threshold", other: "steps:[b]40", same: "threshold"},
        "fine-tune's lr": {a: 0.1, other: 0.2, same: 0.1},
    }
    assert compared([a, imdb])["unequal"] == {"finetune": {a: "tulu3", imdb: "imdb"}}
    assert compared([f"{a}:post_edit", f"{imdb}:post_edit"])["unequal"] == {}  # not fine-tuned yet
    assert compared([f"{a}:post_edit", a])["unequal"] == {}
    shown = " ".join(CliRunner().invoke(main, ["compare", a, other, same]).output.split())
    assert "Not alike but for the editor: horizon is threshold (A, C); steps:[b]40 (B)." in shown
    assert "Not alike but for the editor: fine-tune's lr is 0.1 (A, C); 0.2 (B)." in shown


def test_a_file_of_scores_stands_for_its_checkpoints(scores, runs):
    found = compared([str(scores)])
    assert found["sides"] == [f"{scores}:step-10", f"{scores}:hf:step-20"]
    assert found["failed"] == [{"name": f"{scores}:step-30", "task": None, "error": "no weights"}]
    (edited,) = found["comparisons"]
    assert (len(edited["lost"]), edited["kind"]) == (6, "edited")
    mixed = compared([f"{scores}:hf:step-20", *runs])
    assert [len(c["gained"]) for c in mixed["comparisons"] if c["kind"] == "edited"] == [6, 0, 0]
    assert [r["rank"] for r in mixed["ranks"]["edited"].values()] == [2, 1, 3]
    assert mixed["failed"] == []


def test_a_fact_is_inspected_in_runs_and_scores(runs, scores):
    found = inspected("f2", [runs[1], str(scores)])
    run, *checkpoints = found["sides"]
    assert (run["fact"]["subject"], run["fact"]["target_new"]) == ("Town 2", "Utah")
    (question,) = run["questions"]
    assert (question["prompt"], question["target"]) == ("Town 2 lies in", "Utah")
    assert [(a["stage"], a["experiment"], a["hit"], a["logprob"]) for a in question["answers"]] == [
        ("post_edit", 0, True, -0.5),
        ("post_finetune", 0, False, -0.5),
    ]
    assert [[q["kind"] for q in c["questions"]] for c in checkpoints] == [["edited", "intrinsic"], ["edited"]]
    assert {c["fact"] for c in map(dict, checkpoints)} == {None}


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["{a}", "{a}x"], "There is no .*ax. Give a folder that `evaluate` wrote"),
        (["{a}", "{a}"], "is given twice"),
        (["{a}"], "at least two to compare, and .* is 1"),
        (["{a}:post_edits", "{b}"], "Unknown stage in .* 'post_edits'. Did you mean 'post_edit'?"),
        (["{a}", "{s}:step-1"], "Unknown checkpoint in .* 'step-1'. Did you mean 'step-10'?"),
        (["{a}", "{folder}"], "holds no finished run"),
        (["{a}:base", "{b}"], "holds no samples of base"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, scores, tmp_path, names, says):
    places = {"a": runs[0], "b": runs[1], "s": scores, "folder": tmp_path}
    with pytest.raises(RetentionBenchError, match=says):
        compared([name.format(**places) for name in names])


def test_nothing_shared_and_an_unknown_fact_are_usage_errors(scores, runs):
    with pytest.raises(UsageError, match="share no question"):
        compared([runs[0], f"{scores}:step-10"], kinds=["locality"])
    with pytest.raises(UsageError, match=r"Unknown fact in .* 'f22'. Did you mean 'f2'\?"):
        inspected("f22", [runs[0]])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"checkpoint": "c"\n', "line 2: not JSON.* Give a file that `score` wrote"),
        ("[1]\n", "line 2: no line of scores"),
        ('{"run": 7, "loss": 1.25}\n', "line 2: no line of scores"),
        ('{"checkpoint": "c", "sha256": 3}\n', "line 2: no line of scores"),
        (hashed(score_line("c", 1)).replace('"hit": false', '"hit": true'), "line 2 is damaged.*its sha256"),
        (
            hashed({"checkpoint": "c", "key": "k", "task": "retention_edited"}),
            "line 2 was written by an earlier version",
        ),
        (hashed(score_line("c", 1, samples=3)), "line 2: samples: Input should be a valid list, got 3"),
        (hashed(score_line("c", 1) | {"task": "perplexity"}), "line 2: task: Unknown task 'perplexity'"),
        (hashed(score_line("c", 1) | {"task": "retention_locality"}), "samples of edited under task"),
        (hashed({"checkpoint": "c", "error": ["x"], "samples": 3}), "line 2: error: Input should be a valid string"),
        (hashed({"checkpoint": "c", "key": "k", "task": "wiki", "metrics": {"ppl": "x"}}), "line 2: metrics.ppl: "),
        (
            hashed(score_line("c", 1, samples=[sample(FACTS[0], "yes")])),
            "line 2: samples.0.hit: Input should be a valid boolean",
        ),
    ],
)
def test_a_malformed_file_of_scores_is_refused_by_whoever_reads_it(tmp_path, line, says):
    path = tmp_path / "s.jsonl"
    path.write_text(hashed(score_line("step-10", 8)) + line)
    before = path.read_bytes()
    for reader in (lambda: read(str(path), None), lambda: ScoreFile(path)):
        with pytest.raises(RetentionBenchError, match=says):
            reader()
    assert path.read_bytes() == before


def test_a_malformed_run_is_refused(runs, tmp_path):
    samples = tmp_path / "a" / "samples.jsonl"
    whole = samples.read_text()
    samples.write_text(whole.replace('"stage": "post_edit"', '"stage": "early"', 1))
    with pytest.raises(RetentionBenchError, match="line 1: stage: Unknown stage 'early'"):
        read(runs[0], None)
    samples.write_text(whole)
    (tmp_path / "a" / "results.json").write_text('{"schema_version": 1}')
    with pytest.raises(RetentionBenchError, match="has schema_version 1; this version reads 4"):
        read(runs[0], None)
    for damaged in ("{}", "[]", "{", '{"schema_version": "1"}', "\ud800"):
        (tmp_path / "a" / "results.json").write_text(damaged, errors="surrogatepass")
        with pytest.raises(RetentionBenchError, match="not the results of a run"):
            read(runs[0], None)


def test_the_commands_print_and_write_json(runs, scores, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        result = CliRunner().invoke(main, list(words))
        assert result.exit_code == 0, result.output
        return result.output

    assert json.loads(run("compare", *runs, "--json")) == compared(runs)
    assert json.loads(run("inspect", "f2", *runs, "--json")) == inspected("f2", runs)
    printed = run("compare", *runs, str(scores), "--kind", "edited")
    assert "Left out, as it could not be scored" in printed
    (line, below, *_) = (
        li.split()
        for li in printed[printed.index("From A to B") :].splitlines()
        if li.startswith("edited") or "8 facts" in li
    )
    # All facts are of one relation, so by relation nothing can be told.
    assert line == ["edited", "100", "%", "7", "0", "1", "0", "-88", "1.000", "0.016", "none"]
    assert "lost, edited: f1, f2, f3, f4, f5, f6, f7" in printed
    assert below[-2:] == ["1.000", "0.094"]  # Holm's, for six pairs
    assert "p rel. is that of the exact test by relation" in " ".join(printed.split())
    assert "holds for these relations only" in " ".join(printed.split())
    table = [li for li in printed.splitlines() if not li.lstrip().startswith(("A ", "B ", "C ", "D ", "Left", "lost"))]
    assert max(len(li.rstrip()) for li in table) <= 80
    assert "…" not in printed
    shown = run("inspect", "f2", runs[1], f"{scores}:step-10")
    assert "edited: Town 2 lies in -> Utah" in shown
    assert "the [red]sea" in shown
    refused = CliRunner().invoke(main, ["compare", runs[0]])
    assert refused.exit_code == 2


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = [*score_line("c", 1), "error", "metrics", "sha256", *sample(FACTS[0], True), "stage", "experiment", "x"]
CHANGES = st.lists(st.tuples(st.booleans(), st.sampled_from(NAMES), VALUES), max_size=3)
BYTES = st.binary(max_size=3)
FUZZ = {"deadline": 5000, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def read_whatever(reader):
    """What a reader finds, as JSON; None where it refuses in one line."""
    try:
        found, said = reader(), ""
    except RetentionBenchError as error:
        found, said = None, str(error)
    assert "\n" not in said
    json.dumps(found, allow_nan=False)
    return found


def score_whatever(folder, changes, intact, at, noise):
    line = score_line("c", 2)
    first = line["samples"][0]
    for inner, name, value in changes:
        (first if inner else line)[name] = value
    try:
        text = hashed(line) if intact else json.dumps(line) + "\n"
    except UnicodeEncodeError:
        return
    data = (hashed(score_line("first", 8)) + text).encode("utf-8", "surrogatepass")
    place = at % (len(data) + 1)
    data = data[:place] + noise + data[place + len(noise) :]
    path = folder / "s.jsonl"
    path.write_bytes(data)
    read_whatever(lambda: compared([str(path)]))
    read_whatever(lambda: inspected("f0", [str(path)]))
    if read_whatever(lambda: list(ScoreFile(path))) is None:
        assert path.read_bytes() == data


def run_whatever(folder, file, changes, at, noise):
    write_run(folder / "run", 3)
    path = folder / "run" / file
    lines = path.read_text().splitlines(keepends=True)
    row = json.loads(lines[0])
    for _, name, value in changes:
        row[name] = value
    data = (json.dumps(row) + "\n" + "".join(lines[1:])).encode()
    place = at % (len(data) + 1)
    path.write_bytes(data[:place] + noise + data[place + len(noise) :])
    read_whatever(lambda: compared([f"{folder / 'run'}:post_edit", str(folder / "run")]))
    read_whatever(lambda: inspected("f0", [str(folder / "run")]))
    shutil.rmtree(folder / "run")


@settings(max_examples=30, **FUZZ)
@given(changes=CHANGES, intact=st.booleans(), at=st.integers(0, 10**5), noise=BYTES)
def test_any_file_of_scores_is_read_or_refused(tmp_path, changes, intact, at, noise):
    score_whatever(tmp_path, changes, intact, at, noise)


@pytest.mark.slow
@settings(max_examples=300, **FUZZ)
@given(changes=CHANGES, intact=st.booleans(), at=st.integers(0, 10**5), noise=BYTES)
def test_many_files_of_scores_are_read_or_refused(tmp_path, changes, intact, at, noise):
    score_whatever(tmp_path, changes, intact, at, noise)


FILES = st.sampled_from(["results.json", "samples.jsonl"])


@settings(max_examples=30, **FUZZ)
@given(file=FILES, changes=CHANGES, at=st.integers(0, 10**5), noise=BYTES)
def test_any_run_is_read_or_refused(tmp_path, file, changes, at, noise):
    run_whatever(tmp_path, file, changes, at, noise)


@pytest.mark.slow
@settings(max_examples=300, **FUZZ)
@given(file=FILES, changes=CHANGES, at=st.integers(0, 10**5), noise=BYTES)
def test_many_runs_are_read_or_refused(tmp_path, file, changes, at, noise):
    run_whatever(tmp_path, file, changes, at, noise)
