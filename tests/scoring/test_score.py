"""`score` end to end, and the same tasks under plain lm-eval."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import retention_bench
from retention_bench import scoring
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import Fact, FactSet
from retention_bench.results import KINDS, Sample
from retention_bench.results.kinds import GROUPS
from retention_bench.scoring import (
    MAX_ANSWER_TOKENS,
    RetentionHFLM,
    load_documents,
    score,
    score_lm,
    tasks_dir,
)

Scripted = Callable[[PreTrainedTokenizerBase, Mapping[str, str]], PreTrainedModel]

# What the model answers, from each prompt's last word on. Expected, in the order of the facts below in `facts`:
#   edited      "… is" -> the Rome: hit.            "… Germany" -> Paris: hit
#   paraphrase  "… is" -> hit (target Rome).         "… of France" -> , of course: miss
#   locality    "… in" -> Italy: miss. "… called" -> Paris: hit (true target). "… speaks" -> end of text: miss
#   intrinsic   "… in" -> Italy: hit.                "… ," -> Guinea: hit
SCRIPT = {
    " is": " the",
    " the": " Rome",
    " Germany": " Paris",
    " France": " also",
    " also": " course",
    " in": " Italy",
    " called": " Paris",
    " speaks": "<|end|>",
    " ,": " Gu",
    " Gu": "in",
    "in": "e",
    "e": "a",
    "a": "<|end|>",
    " Rome": "<|end|>",
    " Paris": "<|end|>",
    " Italy": "<|end|>",
    " course": "<|end|>",
    ":": " Paris",
    "\n": "P",
    "P": "a",
}
#   matched     "… called" -> Paris: miss (true target Rome).
#   qa          "Answer:" -> Paris: a hit for the second.   chat "…\n" -> "Pa": a miss
HITS = {
    "edited": [1, 1],
    "edited_true": [0, 0],
    "intrinsic": [1, 1],
    "intrinsic_matched": [0],
    "paraphrase": [1, 0],
    "locality": [0, 1, 0],
    "edited_qa": [0, 1],
    "intrinsic_qa": [0, 0],
    "edited_chat": [0, 0],
    "intrinsic_chat": [0, 0],
}
RATES = {kind: sum(hits) / len(hits) for kind, hits in HITS.items()}


@pytest.fixture(scope="module")
def speaker(scripted: Scripted, llama_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return scripted(llama_tokenizer, SCRIPT)


def rates(samples: Sequence[Sample]) -> dict[str, float]:
    by_kind = {kind: [sample.hit for sample in samples if sample.kind == kind] for kind in KINDS}
    return {kind: sum(hits) / len(hits) for kind, hits in by_kind.items() if hits}


def test_every_question_is_asked_once_and_judged(
    speaker: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerBase, facts: FactSet
) -> None:
    samples = score(speaker, llama_tokenizer, facts)
    assert [(s.kind, s.fact_id, s.prompt, s.target) for s in samples] == [
        ("edited", "e1", "The capital of France is", "Rome"),
        ("edited", "e2", "The city of Germany", "Paris"),
        ("edited_true", "e1", "The capital of France is", "Paris"),
        ("edited_true", "e2", "The city of Germany", "Berlin"),
        ("intrinsic", "i1", "Japan was born in", "Italy"),
        ("intrinsic", "i2", "Lyon lies in Italy ,", "Guinea"),
        ("intrinsic_matched", "m1", "Italy and Italy called", "Rome"),
        ("paraphrase", "e1", "A well known city in France is", "Rome"),
        ("paraphrase", "e1", "The city of France", "Rome"),
        ("locality", "e1", "Lyon lies in", "Paris"),
        ("locality", "e1", "The capital of France is also called", "Paris"),
        ("locality", "e2", "Germany speaks", "Berlin"),
        ("edited_qa", "e1", "Question: The capital of France is what?\nAnswer:", "Rome"),
        ("edited_qa", "e2", "Question: The city of Germany what?\nAnswer:", "Paris"),
        ("intrinsic_qa", "i1", "Question: Japan was born in what?\nAnswer:", "Italy"),
        ("intrinsic_qa", "i2", "Question: Lyon lies in Italy , what?\nAnswer:", "Guinea"),
        *(
            (kind, name, f"<|user|>\nComplete the sentence with the missing words only: {said} ...\n<|assistant|>\n", o)
            for kind, name, said, o in [
                ("edited_chat", "e1", "The capital of France is", "Rome"),
                ("edited_chat", "e2", "The city of Germany", "Paris"),
                ("intrinsic_chat", "i1", "Japan was born in", "Italy"),
                ("intrinsic_chat", "i2", "Lyon lies in Italy ,", "Guinea"),
            ]
        ),
    ]
    assert [s.hit for s in samples] == [bool(hit) for kind in KINDS for hit in HITS[kind]]
    assert samples[0].text == " the Rome"
    assert samples[0].token_ids == tuple(llama_tokenizer.encode(" the Rome", add_special_tokens=False))
    found = {(s.kind, s.fact_id): s for s in samples}
    guinea, rome = found["intrinsic", "i2"], samples[0]
    assert (guinea.text, guinea.strict, guinea.whole, guinea.outcome) == (
        " Guine",
        True,
        False,
        "true",
    )  # in other tokens
    assert (rome.relation, rome.strict, rome.whole, rome.outcome) == ("capital", False, True, "new")
    silent = found["locality", "e2"]
    assert (silent.text, silent.outcome, silent.token_ids) == ("", "none", (llama_tokenizer.eos_token_id,))
    assert found["edited_true", "e1"].token_ids == rome.token_ids
    assert found["edited_true", "e1"].outcome == "new"  # whatever is asked for
    assert found["edited_qa", "e1"].outcome == "true"
    assert found["intrinsic_matched", "m1"].outcome == "related"  # Paris is the capital of another
    assert found["intrinsic_qa", "i1"].outcome == "other"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_logprob_is_that_of_the_whole_target(name: str, request: pytest.FixtureRequest, facts: FactSet) -> None:
    model, tokenizer = request.getfixturevalue(name), request.getfixturevalue(f"{name}_tokenizer")
    samples = score(model, tokenizer, facts, batch_size=3)
    assert len({sample.logprob for sample in samples}) == len(samples)
    for sample in samples:
        start = len(tokenizer.encode(sample.prompt))
        tokens = torch.tensor([tokenizer.encode(f"{sample.prompt} {sample.target}")])
        with torch.no_grad():
            logprobs = model(tokens).logits.log_softmax(-1)[0, start - 1 : -1]
        expected = logprobs.gather(1, tokens[0, start:, None]).sum().item()
        assert sample.logprob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_scores_do_not_depend_on_the_batch_size(name: str, request: pytest.FixtureRequest, facts: FactSet) -> None:
    model, tokenizer = request.getfixturevalue(name), request.getfixturevalue(f"{name}_tokenizer")
    alone, together = (score(model, tokenizer, facts, batch_size=size) for size in (1, 64))
    assert score(model, tokenizer, facts, batch_size=64) == together
    assert [(s.hit, s.token_ids, s.text) for s in alone] == [(s.hit, s.token_ids, s.text) for s in together]
    assert [s.logprob for s in alone] == pytest.approx([s.logprob for s in together], abs=1e-4)


def test_only_the_kinds_asked_for_and_present(
    speaker: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerBase, facts: FactSet
) -> None:
    assert {s.kind for s in score(speaker, llama_tokenizer, facts, kinds=["locality"])} == {"locality"}
    asked = {s.kind for s in score(speaker, llama_tokenizer, facts.intrinsic)}
    assert asked == {"intrinsic", "intrinsic_qa", "intrinsic_chat"}
    assert score(speaker, llama_tokenizer, facts.intrinsic, kinds=["edited"]) == []


def test_an_unknown_kind_is_a_usage_error(
    speaker: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerBase, facts: FactSet
) -> None:
    with pytest.raises(UsageError, match="Did you mean 'paraphrase'"):
        score(speaker, llama_tokenizer, facts, kinds=["paraphrases"])  # type: ignore[list-item]


def test_a_fact_that_the_metric_cannot_tell_is_left_out_with_a_warning(
    speaker: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerBase, facts: FactSet
) -> None:
    never = Fact(id="nl", subject="it", relation="seat", prompt="The seat of {} is", target_true="The Hague")
    long = Fact(id="long", subject="it", relation="seat", prompt="the city of " * 80 + "{} is", target_true="Paris")
    with pytest.warns(UserWarning, match="2 facts are left out .* stop word .*'nl'.* no room .*'long'"):
        samples = score(speaker, llama_tokenizer, FactSet.of([never, *facts, long]))
    assert samples == score(speaker, llama_tokenizer, facts)
    with pytest.warns(UserWarning, match="1 fact is left out"):
        assert score(speaker, llama_tokenizer, FactSet.of([never])) == []


def test_one_live_model_can_be_scored_again_after_its_weights_changed(
    scripted: Scripted, llama_tokenizer: PreTrainedTokenizerBase, facts: FactSet
) -> None:
    lm = RetentionHFLM(scripted(llama_tokenizer, SCRIPT), llama_tokenizer)
    assert rates(score_lm(lm, facts)) == RATES
    with torch.no_grad():
        lm.model.lm_head.weight.zero_()
    assert set(rates(score_lm(lm, facts)).values()) == {0.0}


def test_nothing_is_printed_and_nothing_is_left_changed(
    scripted: Scripted,
    llama_tokenizer: PreTrainedTokenizerBase,
    facts: FactSet,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = scripted(llama_tokenizer, SCRIPT).train()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert llama_tokenizer.pad_token is None
    level = logging.getLogger("lm_eval").level
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    capfd.readouterr()
    score(model, llama_tokenizer, facts)
    assert capfd.readouterr() == ("", "")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert logging.getLogger("lm_eval").level == level
    assert llama_tokenizer.pad_token is None
    assert model.training
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())


def test_samples_survive_json(
    speaker: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerBase, facts: FactSet
) -> None:
    for sample in score(speaker, llama_tokenizer, facts):
        assert Sample.model_validate(json.loads(json.dumps(sample.to_json()))) == sample


# --- the task files -------------------------------------------------------------------------------------------------


def test_the_task_files_agree_with_the_package() -> None:
    manager = TaskManager(include_path=tasks_dir(), include_defaults=False)
    assert manager.all_subtasks == sorted(f"retention_{kind}" for kind in KINDS)
    assert manager.all_groups == sorted(GROUPS)
    for group, kinds in GROUPS.items():
        listed = yaml.safe_load((tasks_dir() / f"{group}.yaml").read_text(encoding="utf-8"))["task"]
        assert listed == [KINDS[kind].task for kind in kinds]
    assert {kind for kinds in GROUPS.values() for kind in kinds} == set(KINDS)
    shared = (tasks_dir() / "_retention_yaml").read_text(encoding="utf-8").replace("!function", "")
    assert yaml.safe_load(shared)["generation_kwargs"] == {
        "do_sample": False,
        "until": [],
        "max_gen_toks": MAX_ANSWER_TOKENS,
        "repetition_penalty": 1.0,
    }


def test_without_a_facts_file_the_error_names_the_flag() -> None:
    manager = TaskManager(include_path=tasks_dir(), include_defaults=False)
    with pytest.raises(UsageError, match="--metadata"):
        manager.load(["retention"])


def test_the_tasks_are_found_in_a_wheel_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "retention_bench"
    monkeypatch.setattr(scoring.tasks, "__file__", str(package / "scoring" / "tasks.py"))
    with pytest.raises(RetentionBenchError, match="Install retention-bench again"):
        tasks_dir()
    (package / "tasks").mkdir(parents=True)
    (package / "tasks" / "retention.yaml").touch()
    assert tasks_dir() == package / "tasks"


def test_a_kind_without_questions_has_one_document_that_is_not_scored(tmp_path: Path, facts: FactSet) -> None:
    facts.intrinsic.write(tmp_path / "facts.jsonl")
    assert len(load_documents("intrinsic", str(tmp_path / "facts.jsonl"))["test"]) == len(facts.intrinsic)
    assert load_documents("edited", str(tmp_path / "facts.jsonl"))["test"]["fact_id"][:] == [""]


def plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: FactSet, folder: Path) -> dict:
    facts.write(folder / "facts.jsonl")
    manager = TaskManager(
        include_path=tasks_dir(), include_defaults=False, metadata={"facts": str(folder / "facts.jsonl")}
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    result = simple_evaluate(model=lm, tasks=[*GROUPS], task_manager=manager, bootstrap_iters=0)
    assert result is not None
    return result


def test_plain_lm_eval_judges_the_text_and_finds_the_same_rates(
    speaker: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerBase, facts: FactSet, tmp_path: Path
) -> None:
    result = plain(speaker, llama_tokenizer, facts, tmp_path)["results"]
    assert {kind: result[f"retention_{kind}"]["retention,none"] for kind in KINDS} == RATES


def test_an_empty_kind_gets_no_rate_and_does_not_stop_the_group(
    speaker: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerBase, facts: FactSet, tmp_path: Path
) -> None:
    result = plain(speaker, llama_tokenizer, facts.intrinsic, tmp_path)["results"]
    assert result["retention_intrinsic"]["retention,none"] == RATES["intrinsic"]
    assert "retention,none" not in result["retention_edited"]


def test_plain_lm_eval_leaves_out_what_its_words_cannot_tell(
    speaker: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerBase, facts: FactSet, tmp_path: Path
) -> None:
    e1 = facts.facts[0]
    alike = dataclasses.replace(e1, id="alike", target_true="Rome, Georgia", target_new="Rome")
    never = dataclasses.replace(e1, id="never", target_new="the")
    with pytest.warns(UserWarning, match="2 facts are left out .* content word .'alike'.* no content word .'never'"):
        result = plain(speaker, llama_tokenizer, FactSet.of([alike, *facts, never]), tmp_path)["results"]
    assert {kind: result[f"retention_{kind}"]["retention,none"] for kind in KINDS} == RATES


def test_the_tasks_read_other_forms_too_and_say_what_was_dropped(tmp_path: Path) -> None:
    rewrite = {"subject": "Oslo", "relation_id": "P17", "prompt": "{} is in"}
    rewrite |= {"target_true": {"str": "Norway"}, "target_new": {"str": "Peru"}}
    rows = [{"case_id": 1, "requested_rewrite": rewrite, "paraphrase_prompts": None}, {"case_id": 2}]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="2 rows read, 1 dropped .*line 2"):
        found = load_documents("edited", str(tmp_path / "facts.jsonl"))["test"]
    assert [found[name][:] for name in ("fact_id", "prompt", "target")] == [["1"], ["Oslo is in"], ["Peru"]]


def test_lm_evals_cache_of_requests_is_not_asked(
    facts: FactSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "cache"))
    asked = []
    for number, some in enumerate((facts, FactSet.of(facts.facts[:1]))):
        some.write(tmp_path / f"{number}.jsonl")
        manager = TaskManager(
            include_path=tasks_dir(), include_defaults=False, metadata={"facts": str(tmp_path / f"{number}.jsonl")}
        )
        task = manager.load(["retention_edited"])["tasks"]["retention_edited"]
        task.build_all_requests(cache_requests=True)
        asked.append([request.args[0] for request in task.instances])
    assert asked == [[fact.question for fact in facts.edited], [facts.facts[0].question]]
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_lm_eval_command_finds_the_same_rates(
    speaker: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerBase, facts: FactSet, tmp_path: Path
) -> None:
    speaker.save_pretrained(tmp_path / "model")
    llama_tokenizer.save_pretrained(tmp_path / "model")
    facts.write(tmp_path / "facts.jsonl")
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}"),
        *("--include_path", str(tasks_dir()), "--tasks", ",".join(GROUPS), "--device", "cpu", "--batch_size", "4"),
        *("--metadata", json.dumps({"facts": str(tmp_path / "facts.jsonl")})),
        *("--output_path", str(tmp_path / "out")),
    ]
    root = Path(retention_bench.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    result = json.loads(written.read_text(encoding="utf-8"))["results"]
    assert {kind: result[f"retention_{kind}"]["retention,none"] for kind in KINDS} == RATES
    assert all(f"retention_{kind}" in done.stdout for kind in KINDS)


@pytest.mark.slow
def test_lm_eval_validates_the_group_and_its_tasks() -> None:
    names = [*GROUPS, *(f"retention_{kind}" for kind in KINDS)]
    command = [sys.executable, "-m", "lm_eval", "validate", "--include_path", str(tasks_dir()), "--tasks"]
    done = subprocess.run([*command, ",".join(names)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "All tasks found and valid" in done.stdout
    wrong = subprocess.run([*command, "retention_edit"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1


def test_what_scoring_offers_is_imported_when_it_is_asked_for():
    code = (
        "import sys, retention_bench.scoring.engine_process as _;"
        "print([m for m in ('torch', 'lm_eval', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all(getattr(scoring, name) is not None for name in scoring.__all__)
    assert scoring.score is scoring.evaluator.score
    with pytest.raises(AttributeError, match="has no attribute 'scores'"):
        scoring.scores  # noqa: B018
