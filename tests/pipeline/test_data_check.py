"""What a fine-tune cannot use is found out before anything is computed, and by --dry-run."""

import gzip
import json
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import httpx

from retention_bench.cli import main
from retention_bench.errors import RetentionBenchError
from retention_bench.pipeline import Cell, check_data, evaluate, load_suite, plan, run
from retention_bench.store import Store

TURNS = [{"role": "user", "content": "Say red."}, {"role": "assistant", "content": "I say red."}]
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
GREETINGS = [
    {"conversations": [{"from": "human", "value": f"Hi, {n}"}, {"from": "gpt", "value": "Hello"}]} for n in range(500)
]
SYSTEM = {"messages": [{"role": "system", "content": "Be calm."}, *TURNS]}
UNMARKED = "{% for m in messages %}{{ m.content }}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model(small_suite, tmp_path):
    """A copy of a model of the suite, whose files may be changed."""
    [path, *_] = [m["path"] for m in yaml.safe_load(small_suite.read_text())["models"].values()]
    shutil.copytree(path, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def suite(small_suite, model, tmp_path):
    """The small suite with that copy."""
    changed = yaml.safe_load(small_suite.read_text())
    changed["models"] = {"own": changed["models"]["atlas-gpt2"] | {"path": str(model)}}
    changed["default_model"] = "own"
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(changed))
    return tmp_path / "suite.yaml"


def cell(suite, finetune):
    return Cell(load_suite(str(suite)), None, "ft", finetune, 0, "cpu")


def dry(suite, finetune, tmp_path, *more):
    words = ["evaluate", "--suite", str(suite), "--editor", "ft", "--finetune", finetune, "--dry-run", *more]
    return CliRunner().invoke(main, words, env={"RETENTION_BENCH_STORE": str(tmp_path / "store"), "COLUMNS": "300"})


UNUSABLE = {
    "other columns": (
        [{"question": "a", "answer": "b"}],
        None,
        "columns 'question', 'answer', and none of the formats",
    ),
    "null messages": ([{"messages": None}] * 9, None, "of 9 rows none can be trained on"),
    "a template without markers": ([SHAREGPT], UNMARKED, "does not mark the assistant's words"),
    "a template that refuses all": ([SYSTEM] * 60, STRICT, "60 are refused by the chat template (line 1: the template"),
    "half characters": ([{"text": "\ud83d"}], None, "1 hold half a character"),
    "copies of one row": ([SHAREGPT] * 60, None, "holds one row, 60 times"),
    "no rows": ([], None, "holds no rows"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_data_is_refused_before_anything_is_computed(suite, model, tmp_path, name, monkeypatch):
    rows, template, says = UNUSABLE[name]
    if template:
        (model / "chat_template.jinja").write_text(template)
    path = write(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(run, "Bench", lambda *given: pytest.fail("something was computed"))
    with pytest.raises(RetentionBenchError) as refused:
        evaluate(cell(suite, f"path:{path}"), store=Store(tmp_path / "store"), out=tmp_path / "out")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    told = dry(suite, f"path:{path}", tmp_path)
    assert told.exit_code in (1, 2)
    assert says in told.output
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("rows.jsonl", b'{"text": "Bogot\xe1"}\n', "line 1: the byte 0xe1 is not UTF-8"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-4], "no gzip file, or is cut off"),
        ("rows.parquet", b"PAR1 and no more PAR1", "not a readable Parquet file"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 10**5, "line 2: the JSON is nested too deeply"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2, column 'text': must be a text"),
    ],
)
def test_a_damaged_file_is_refused_as_early(suite, tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    told = dry(suite, f"path:{tmp_path / name}", tmp_path)
    assert told.exit_code == 1
    assert says in told.output
    assert "Traceback" not in told.output


def test_a_dry_run_says_what_is_read_as_what(suite, tmp_path):
    path = write(tmp_path / "rows.jsonl", [SHAREGPT, {"conversations": None}, GREETINGS[0]])
    told = dry(suite, f"path:{path}", tmp_path)
    assert told.exit_code == 0, told.output
    assert "conversations (ShareGPT: from, value) are read as messages" in told.output
    assert "2 of the first 2 rows tried can be trained on; left out: 1 have no messages (line 2: " in told.output
    data = json.loads(dry(suite, f"path:{path}", tmp_path, "--json").stdout)["data"]
    assert (data["rows"], data["tried"], data["usable"]) == (2, 2, 2)
    assert data["dropped"]["have no messages"]["rows"] == 1
    assert not (tmp_path / "store").exists()


def test_a_byte_order_mark_is_no_text(suite, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "red"}).encode() + b"\r\n")
    assert dry(suite, f"path:{tmp_path / 'rows.jsonl'}", tmp_path).exit_code == 0


def test_too_few_rows_and_too_long_ones_are_found_out(suite, tmp_path):
    changed = yaml.safe_load(suite.read_text())
    changed["models"]["own"]["finetunes"]["path"] |= {"train_size": 5, "max_length": 100_000}
    suite.write_text(yaml.safe_dump(changed))
    store = Store(tmp_path / "store")
    few = write(tmp_path / "few.jsonl", GREETINGS[:4])
    with pytest.raises(RetentionBenchError, match="of 4 rows 4 can be trained on, and train_size is 5"):
        check_data(plan(cell(suite, f"path:{few}")), store)
    long = write(tmp_path / "long.jsonl", [{"text": "red " * 9000 + str(n)} for n in range(5)])
    with pytest.raises(RetentionBenchError, match="The model takes .* Set max_length"):
        check_data(plan(cell(suite, f"path:{long}")), store)


@pytest.mark.parametrize("task", ["tulu3", "counterfact", "imdb", "commoncrawl"])
def test_every_task_looks_into_its_own_data(task, tmp_path):
    store = Store(tmp_path)
    found = check_data(plan(Cell(load_suite("atlas"), None, "ft", task, 0, "cpu")), store)
    assert found.reads
    assert found.rows > 500
    assert found.tried == found.usable == (0 if task == "counterfact" else 50)


def test_a_tokenizer_that_cannot_be_loaded_is_named(suite, model, tmp_path):
    (model / "tokenizer.json").write_text("{")
    path = write(tmp_path / "rows.jsonl", [SHAREGPT])
    store = Store(tmp_path / "store")
    with pytest.raises(RetentionBenchError, match="tokenizer in .*model could not be loaded") as refused:
        check_data(plan(cell(suite, f"path:{path}")), store)
    assert "\n" not in str(refused.value)


def test_what_the_store_has_is_not_looked_into_again(suite, tmp_path):
    path = write(tmp_path / "rows.jsonl", [SHAREGPT])
    store = Store(tmp_path / "store")
    planned = plan(cell(suite, f"path:{path}"))
    assert check_data(planned, store).usable == 1
    for stage in planned.finetunes:
        store.get(stage, lambda folder: (folder / "log.json").write_text("{}"))
    assert check_data(planned, store) is None


def hub_rows(monkeypatch, rows):
    def load(source, config, *, split, revision, streaming):
        assert streaming, "a whole data set would be downloaded"
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *given, **more: None)
    monkeypatch.setattr(datasets, "load_dataset", load)


def test_of_a_hub_data_set_a_few_rows_are_streamed(suite, tmp_path, monkeypatch):
    hub_rows(monkeypatch, GREETINGS)
    store = Store(tmp_path / "store")
    found = check_data(plan(cell(suite, "path:owner/chats@abc")), store)
    assert (found.rows, found.tried, found.usable) == (None, 50, 50)
    hub_rows(monkeypatch, [{"a": "b"}] * 500)
    with pytest.raises(RetentionBenchError, match="owner/chats has the columns 'a'"):
        check_data(plan(cell(suite, "path:owner/chats@abc")), store)


def test_a_hub_data_set_is_passed_over_where_the_hub_cannot_be_asked(suite, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = dry(suite, "path:owner/chats@abc", tmp_path)
    assert told.exit_code == 0, told.output
    assert "owner/chats is looked into when the fine-tune begins: HF_HUB_OFFLINE is set" in told.output

    def refuse(*given, **more):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    assert "the Hub has no answer (ConnectError)" in dry(suite, "path:owner/chats@abc", tmp_path).output


def test_a_hub_data_set_that_there_is_not_is_found_out(suite, tmp_path, monkeypatch):
    def missing(*given, **more):
        response = httpx.Response(404, request=httpx.Request("GET", "https://example.org"))
        raise RepositoryNotFoundError("no such data set", response=response)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", missing)
    told = dry(suite, "path:owner/chats@abc", tmp_path)
    assert told.exit_code == 1
    assert "'owner/chats' at revision abc" in told.output


@pytest.mark.slow
def test_what_was_left_out_stands_in_the_log_and_in_the_table(suite, tmp_path):
    rows = [{"messages": [TURNS[0] | {"content": f"Say {n}."}, TURNS[1]]} for n in range(40)]
    rows += [{"messages": None}] * 3 + [SYSTEM | {"messages": [{"role": "x"}]}]
    path = write(tmp_path / "rows.jsonl", rows)
    changed = yaml.safe_load(suite.read_text())
    changed["models"]["own"]["finetunes"]["path"] |= {"max_steps": 1, "batch_size": 4, "eval_every": 1}
    suite.write_text(yaml.safe_dump(changed))
    words = ["evaluate", "--suite", str(suite), "--editor", "ft", "--finetune", f"path:{path}", "--out"]
    environment = {"RETENTION_BENCH_STORE": str(tmp_path / "store"), "COLUMNS": "300"}
    told = CliRunner().invoke(main, [*words, str(tmp_path / "out")], env=environment)
    assert told.exit_code == 0, told.output
    results = json.loads((Path(tmp_path) / "out" / "results.json").read_text())
    for log in [e["finetune_log"] for e in results["experiments"]] + [results["control"]["finetune_log"]]:
        assert {reason: drop["rows"] for reason, drop in log["dropped"].items()} == {
            "have no messages": 3,
            "have a message of an unknown role": 1,
        }
    assert "left out: " in told.output
    assert "3 have no messages (line " in told.output
