"""The suites for real models, end to end: a tiny random model of the same family and depth in the place of the real
one, local files in the form of the Hub data sets, and smaller numbers. Nothing else of the suites is changed."""

import json
import random

import pytest
import torch
import yaml

from retention_bench.editors import make_editor
from retention_bench.facts import token_text
from retention_bench.finetune import make_finetune
from retention_bench.pipeline import Cell, evaluate, load_suite, plan
from retention_bench.pipeline.suite import PACKAGED
from retention_bench.store import Store

SUITES = {"gpt2-xl": ("gpt2", 48), "llama3-8b": ("llama", 32)}
TASKS = ("commoncrawl", "counterfact", "imdb", "tulu3")
SYLLABLES = ["ba", "den", "fir", "gul", "han", "jor", "kel", "lum", "mos", "nar", "pel", "rud", "sil", "tov", "wen"]
WORDS = [f"{first.title()}{second}" for first in SYLLABLES for second in SYLLABLES]
NAMES, PLAIN = WORDS[:160], [word.lower() for word in WORDS[160:]]
TEMPLATES = {f"P{number}": f"{{}} {PLAIN[number]} {PLAIN[number + 10]}" for number in range(8)}


@pytest.mark.parametrize("name", SUITES)
def test_every_entry_is_what_its_editor_or_task_takes(name):
    suite = load_suite(name)
    for model in suite.models.values():
        for entry, settings in model.editors.items():
            make_editor(model.registered[entry], {k: v for k, v in settings.items() if k != "editor"})
        for task, settings in model.finetunes.items():
            make_finetune(task, {"source": "rows.jsonl", **settings} if task == "path" else settings)
        assert set(model.finetunes) == {*TASKS, "path"}
        assert all(model.finetunes[task]["revision"] for task in TASKS)
        assert model.revision
    assert suite.facts.revision
    assert suite.covariance.revision


@pytest.mark.parametrize("name", SUITES)
def test_what_the_paper_leaves_open_of_layers_is_an_arm_of_its_own(name):
    suite = load_suite(name)
    _, model = suite.model(None)
    for entry, layer in (("rome-l5", 5), ("rome-l6", 6), ("ft-l0", 0), ("ft-l1", 1)):
        found, plain = suite.editor(entry, model), suite.editor(entry[:-3], model)
        assert (found.registered, found.given_by) == (plain.registered, "suite")
        assert found.settings == {**plain.settings, "layer": layer}


@pytest.fixture(scope="module", params=SUITES)
def shrunk(request, make_tokenizer, make_model, tmp_path_factory):
    """A real suite on a tiny model and local files."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    family, layers = SUITES[name]
    tokenizer = make_tokenizer(family, [" ".join(WORDS), " ".join(f" {w}" for w in (*NAMES, *PLAIN))] * 9)
    model = make_model(family, tokenizer, layers=layers, std=0.2)
    model.get_submodule({"gpt2": "transformer.ln_f", "llama": "model.norm"}[family]).weight.data *= 8  # it is sure
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_data(folder, model, tokenizer)

    suite = yaml.safe_load((PACKAGED / f"{name}.yaml").read_text())
    suite["facts"] |= {"source": "./facts.json", "revision": None, "edited": 2, "intrinsic": 3}
    suite["covariance"] |= {"source": "./texts.jsonl", "revision": None, "config": None, "texts": 40, "max_length": 24}
    [config] = suite["models"].values()
    config |= {"path": "./model", "revision": None}
    config["editors"]["alphaedit"] |= {"v_num_grad_steps": 3, "nullspace_threshold": 10.0}
    config["editors"]["memit"] |= {"v_num_grad_steps": 3}
    config["editors"]["rome"] |= {"v_num_grad_steps": 3, "edits_per_model": 2}
    config["editors"]["ft"] |= {"num_steps": 3, "edits_per_model": 2}
    small = {"train_size": 8, "validation_size": 4, "batch_size": 4, "eval_every": 1, "max_steps": 2, "max_length": 32}
    sources = {"commoncrawl": "texts.jsonl", "counterfact": "facts.json", "imdb": "imdb.jsonl", "tulu3": "chats.jsonl"}
    for task in TASKS:
        settings = config["finetunes"][task]
        settings |= small | {"source": f"./{sources[task]}", "revision": None}
        settings.pop("config", None)
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder / "suite.yaml", name


def write_data(folder, model, tokenizer):
    """Files in the form of CounterFact, C4 and Wikipedia, IMDB and Tulu-3."""
    rng = random.Random(0)
    facts = []
    for relation, template in TEMPLATES.items():
        for subject in rng.sample(NAMES[:80], 30):
            with torch.no_grad():
                ids = torch.tensor([tokenizer.encode(template.format(subject))])
                answer = token_text(model(ids).logits[0, -1].argmax().item(), tokenizer).strip()
            wrong, new = rng.sample(NAMES[80:], 2)
            facts.append((relation, template, subject, answer if answer in NAMES else wrong, new))
    records = [
        {
            "case_id": number,
            "pararel_idx": number,
            "requested_rewrite": {
                "prompt": template,
                "relation_id": relation,
                "target_new": {"str": new, "id": "Q1"},
                "target_true": {"str": true, "id": "Q2"},
                "subject": subject,
            },
            "paraphrase_prompts": [f"{PLAIN[30]} {template.format(subject)}"],
            "neighborhood_prompts": [template.format(NAMES[0])],
            "attribute_prompts": [],
            "generation_prompts": [],
        }
        for number, (relation, template, subject, true, new) in enumerate(facts)
    ]
    (folder / "facts.json").write_text(json.dumps(records))

    def text(count):
        return " ".join(rng.choice(PLAIN) for _ in range(count))

    rows = {
        "texts": [{"text": text(40), "timestamp": "2019-04-25", "url": "https://example.org"} for _ in range(60)],
        "imdb": [{"text": text(20), "label": number % 2} for number in range(40)],
        "chats": [
            {
                "id": f"chat_{number}",
                "messages": [{"role": "user", "content": text(5)}, {"role": "assistant", "content": text(6)}],
                "source": "made up",
            }
            for number in range(40)
        ],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


@pytest.mark.slow
@pytest.mark.parametrize(("editor", "task"), zip(("alphaedit", "rome", "memit", "ft"), TASKS, strict=True))
def test_a_cell_runs_end_to_end(shrunk, tmp_path, editor, task):
    path, name = shrunk
    cell = Cell(load_suite(str(path)), None, editor, task, 0, "cpu")
    results = evaluate(cell, store=Store(path.parent / "store"), out=tmp_path).to_dict()
    assert (results["suite"], results["editor"], results["finetune"]) == (name, editor, task)
    assert results["stages"]["base"]["intrinsic"]["rate"] == 1.0
    log = results["control"]["finetune_log"]
    assert 0 < log["steps"] <= 2
    assert log["metric"] == ("validation_loss" if task in ("commoncrawl", "tulu3") else "validation_accuracy")
    assert results["facts"]["known"] >= 5


def test_every_other_entry_can_be_planned(shrunk):
    path, _ = shrunk
    suite = load_suite(str(path))
    for editor in next(iter(suite.models.values())).editors:
        for task in TASKS:
            assert plan(Cell(suite, None, editor, task, 0, "cpu")).plan()
