import errno
import json
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retention_bench.errors import RetentionBenchError
from retention_bench.pipeline.store import Store, exclusive, manifest, read_jsonl, write_text


def write(text, count=None):
    def compute(folder):
        if count is not None:
            count.append(text)
        (folder / "out.txt").write_text(text)

    return compute


def test_a_result_is_computed_once(tmp_path):
    store, count = Store(tmp_path), []
    first = store.get("edit", {"a": 1}, write("x", count))
    assert store.get("edit", {"a": 1}, write("y", count)) == first
    assert (first / "out.txt").read_text() == "x"
    assert count == ["x"]
    assert manifest(first)["inputs"] == {"a": 1}


def test_keys_depend_on_every_input_and_not_on_their_order(tmp_path):
    store = Store(tmp_path)
    keys = {
        store.key(*k) for k in [("edit", {"a": 1}), ("edit", {"a": 2}), ("score", {"a": 1}), ("edit", {"a": 1, "b": 0})]
    }
    assert len(keys) == 4
    assert store.key("edit", {"a": 1, "b": 2}) == store.key("edit", {"b": 2, "a": 1})


def test_a_failed_stage_leaves_nothing_and_can_be_run_again(tmp_path):
    store = Store(tmp_path)

    def fail(folder):
        (folder / "half.txt").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.get("edit", {}, fail)
    assert store.find("edit", {}) is None
    folder = store.get("edit", {}, write("whole"))
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "out.txt"]


def test_what_a_killed_run_left_is_swept_away(tmp_path):
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from retention_bench.pipeline.store import Store

        def compute(folder):
            (folder / "half.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        Store(Path({str(tmp_path)!r})).get("edit", {{}}, compute)
    """)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    store = Store(tmp_path)
    assert store.find("edit", {}) is None
    folder = store.get("edit", {}, write("whole"))
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "out.txt"]
    assert not list(tmp_path.rglob("*.partial"))


def test_scratch_survives_a_kill_and_an_error_and_goes_once_the_result_is_in(tmp_path):
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from retention_bench.pipeline.store import Store

        store = Store(Path({str(tmp_path)!r}))

        def compute(folder):
            (store.scratch("fit", {{}}) / "step-1").write_text("kept")
            os.kill(os.getpid(), signal.SIGKILL)

        store.get("fit", {{}}, compute)
    """)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    store = Store(tmp_path)

    def fail(folder):
        assert (store.scratch("fit", {}) / "step-1").read_text() == "kept"
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.get("fit", {}, fail)
    assert store.find("fit", {}) is None

    def finish(folder):
        (store.scratch("fit", {}) / "step-1").rename(folder / "out.txt")

    assert (store.get("fit", {}, finish) / "out.txt").read_text() == "kept"
    assert not list(tmp_path.rglob("*.work"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_plainly_and_keeps_what_was_done(tmp_path, error):
    store = Store(tmp_path)
    done = store.get("facts", {}, write("kept"))

    def full(folder):
        raise error

    with pytest.raises(RetentionBenchError, match="The disk is full: the edit stage.*kept.*RETENTION_BENCH_STORE"):
        store.get("edit", {}, full)
    assert (done / "out.txt").read_text() == "kept"


def test_an_output_folder_has_one_run_at_a_time(tmp_path):
    with (
        exclusive(tmp_path / "out", "evaluate"),
        pytest.raises(RetentionBenchError, match="in use by another run.*--out"),
        exclusive(tmp_path / "out", "evaluate"),
    ):
        raise AssertionError("two runs had the folder")
    with exclusive(tmp_path / "out", "evaluate"):
        pass


def test_a_store_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RetentionBenchError, match="could not be written"):
        Store(tmp_path / "file").get("edit", {}, write("x"))


def test_inputs_that_are_no_json_are_a_bug(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        Store(tmp_path).key("edit", {"x": float("nan")})
    assert json.loads((Store(tmp_path).get("a", {}, write("x")) / "manifest.json").read_text())["stage"] == "a"


@given(st.lists(st.text(), max_size=5))
def test_rows_come_back_whatever_is_in_their_texts(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    assert [row["text"] for row in read_jsonl(path)] == texts


def test_a_line_separator_within_a_text_ends_no_row(tmp_path):
    write_text(tmp_path / "rows.jsonl", '{"text": "a\u2028b\u0085c"}\n{"text": "d"}\n')
    assert [row["text"] for row in read_jsonl(tmp_path / "rows.jsonl")] == ["a\u2028b\u0085c", "d"]
