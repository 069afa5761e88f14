import json
import random
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from retention_bench.cli import main
from retention_bench.errors import UsageError
from retention_bench.pipeline.seeds import parse_seeds
from retention_bench.results import Results
from retention_bench.results.seeds import SeedsResults


@pytest.mark.parametrize(("text", "seeds"), [("0-4", (0, 1, 2, 3, 4)), ("0,2,5", (0, 2, 5)), ("7, 1-2", (7, 1, 2))])
def test_seeds_are_lists_and_ranges(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "3", "4-2", "a", "0-4-6", "1,1", "0-5000", "-1", "0-4294967296", "0,,1", "٣-٤"])
def test_other_seeds_are_refused(text):
    with pytest.raises(UsageError, match="Give"):
        parse_seeds(text)


def test_several_seeds_are_run_counted_together_and_cost_nothing_again(small_suite, tmp_path, monkeypatch):
    monkeypatch.setenv("RETENTION_BENCH_STORE", str(tmp_path / "store"))
    words = ["evaluate", "--suite", str(small_suite), "--editor", "ft", "--finetune", "tulu3", "--device", "cpu"]
    words += ["--seeds", "0,3", "--facts-seed", "0", "--out", str(tmp_path / "out")]
    first = CliRunner().invoke(main, [*words, "--json"])
    assert first.exit_code == 0, first.stderr
    folder = tmp_path / "out" / "seeds-0_3"
    found = SeedsResults.load(folder)
    assert json.loads(first.stdout) == found.to_dict()
    assert [(run.seed, run.seeds.facts, run.seeds.finetune) for run in found.runs] == [(0, 0, 0), (3, 0, 3)]
    own = [Results.load(folder / f"seed-{seed}") for seed in (0, 3)]
    assert [run.key for run in found.runs] == [one.key for one in own]
    assert len({one.provenance["facts_sha256"] for one in own}) == 1  # the facts have a seed of their own
    rates = [one.stages["post_finetune"]["intrinsic"] for one in own]
    together = found.stages["post_finetune"]["intrinsic"]
    assert together.rate == pytest.approx(sum(rate.rate for rate in rates) / 2)
    assert together.total == sum(rate.total for rate in rates)
    step_matched = [one.paired_step_matched.difference for one in own]
    over = found.paired_step_matched.difference
    if None not in (values := [difference.value for difference in step_matched]):
        assert over.value == pytest.approx(sum(values) / 2)
    assert over.n >= max(difference.n for difference in step_matched)
    assert not found.ranked  # so few facts and steps
    assert {gate.text.partition(":")[0] for gate in found.gates} == {"seed 0", "seed 3"}
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 0, again.stderr
    assert "2 seeds" in again.stdout
    assert "fine-tune:" not in again.stderr  # all of it is in the store
    shown = CliRunner().invoke(main, ["show", str(folder)])
    assert shown.exit_code == 0
    assert "Percentages are means over seeds" in shown.stdout
    assert "Survival is counted for each seed alone" in " ".join(shown.stdout.split())
    paper = CliRunner().invoke(main, ["show", str(folder / "seed-3"), "--paper", "--json"])
    assert set(json.loads(paper.stdout)["post_edit"]) == {"edited", "intrinsic"}


def test_a_split_by_subjects_is_run_and_shown(small_suite, tmp_path, monkeypatch):
    """No fact is intrinsic in the paper's sense: matched ones are in the trajectory and under the gate."""
    monkeypatch.setenv("RETENTION_BENCH_STORE", str(tmp_path / "store"))
    suite = yaml.safe_load(small_suite.read_text())
    rows = Path(suite["facts"]["source"]).read_text().splitlines(keepends=True)
    (tmp_path / "facts.jsonl").write_text("".join(random.Random(0).sample(rows, 60)))
    suite["facts"] |= {"source": str(tmp_path / "facts.jsonl"), "edited": 3, "intrinsic": 4}
    suite["models"]["atlas-gpt2"]["finetunes"]["tulu3"] |= {"train_size": 16, "validation_size": 4, "batch_size": 8}
    suite["models"]["atlas-gpt2"]["finetunes"]["tulu3"] |= {"max_steps": 2, "eval_every": 1, "max_length": 48}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    words = ["evaluate", "--suite", str(tmp_path / "suite.yaml"), "--editor", "ft", "--finetune", "tulu3"]
    words += ["--device", "cpu", "--set", "facts.split=subjects", "--out", str(tmp_path / "out")]
    for command in (words, ["show", str(tmp_path / "out")]):
        done = CliRunner().invoke(main, command, env={"COLUMNS": "80"})
        assert done.exit_code == 0, done.output
        assert "matched" in done.stdout[done.stdout.index("While training") :]
        assert "intrinsic, matched (" in done.stdout
    found = Results.load(tmp_path / "out")
    assert "intrinsic" not in found.trajectory[0]
    assert "intrinsic" not in found.survival.curves
    (gate,) = (gate for gate in found.gates if gate.name == "intrinsic_facts")
    assert "matched intrinsic facts" in gate.text


def test_one_seed_and_several_are_not_given_together(small_suite):
    words = ["evaluate", "--suite", str(small_suite), "--editor", "ft", "--finetune", "tulu3", "--device", "cpu"]
    refused = CliRunner().invoke(main, [*words, "--seeds", "0-2", "--seed", "4"])
    assert (refused.exit_code, "Give one of them" in refused.stderr) == (2, True)
    refused = CliRunner().invoke(main, [*words, "--seeds", "0-2", "--save-checkpoints"])
    assert (refused.exit_code, "--save-checkpoints is for one seed" in refused.stderr) == (2, True)
