import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retention_bench.data.durable import canonical, write_text
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.store import Entry, Store, default_root
from retention_bench.store.fingerprints import Input, model_fingerprint, source_fingerprint
from retention_bench.store.output import MARK, check_output, exclusive
from retention_bench.store.store import key_of, manifest, read_jsonl


def write(text, count=None):
    def compute(folder):
        if count is not None:
            count.append(text)
        (folder / "out.txt").write_text(text)

    return compute


def test_a_result_is_computed_once(tmp_path):
    store, count = Store(tmp_path), []
    first = store.get(Entry("edit", {"a": 1}), write("x", count))
    assert store.get(Entry("edit", {"a": 1}), write("y", count)) == first
    assert (first / "out.txt").read_text() == "x"
    assert count == ["x"]
    assert manifest(first)["inputs"] == {"a": 1}


def test_keys_depend_on_every_input_and_not_on_their_order(tmp_path):
    keys = {
        Entry(*k).key for k in [("edit", {"a": 1}), ("edit", {"a": 2}), ("score", {"a": 1}), ("edit", {"a": 1, "b": 0})]
    }
    assert len(keys) == 4
    assert Entry("edit", {"a": 1, "b": 2}).key == Entry("edit", {"b": 2, "a": 1}).key


def test_a_failed_stage_leaves_nothing_and_can_be_run_again(tmp_path):
    store = Store(tmp_path)

    def fail(folder):
        (folder / "half.txt").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.get(Entry("edit", {}), fail)
    assert store.find(Entry("edit", {})) is None
    folder = store.get(Entry("edit", {}), write("whole"))
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "out.txt"]


def test_what_a_killed_run_left_is_swept_away(tmp_path):
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from retention_bench.store import Entry, Store

        def compute(folder):
            (folder / "half.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        Store(Path({str(tmp_path)!r})).get(Entry("edit", {{}}), compute)
    """)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    store = Store(tmp_path)
    assert store.find(Entry("edit", {})) is None
    folder = store.get(Entry("edit", {}), write("whole"))
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "out.txt"]
    assert not list(tmp_path.rglob("*.partial"))


def test_scratch_survives_a_kill_and_an_error_and_goes_once_the_result_is_in(tmp_path):
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from retention_bench.store import Entry, Store

        store = Store(Path({str(tmp_path)!r}))

        def compute(folder):
            (store.scratch(Entry("fit", {{}})) / "step-1").write_text("kept")
            os.kill(os.getpid(), signal.SIGKILL)

        store.get(Entry("fit", {{}}), compute)
    """)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    store = Store(tmp_path)

    def fail(folder):
        assert (store.scratch(Entry("fit", {})) / "step-1").read_text() == "kept"
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.get(Entry("fit", {}), fail)
    assert store.find(Entry("fit", {})) is None

    def finish(folder):
        (store.scratch(Entry("fit", {})) / "step-1").rename(folder / "out.txt")

    assert (store.get(Entry("fit", {}), finish) / "out.txt").read_text() == "kept"
    assert not list(tmp_path.rglob("*.work"))


def in_the_way(work):
    """What no run can write over, or what leads out of the store."""
    (work / "checkpoint.safetensors").mkdir()
    (work / "checkpoint.safetensors" / "x").write_text("")
    os.mkfifo(work / "asked.jsonl")
    (work / "checkpoint-2").symlink_to(work.parent)
    (work / "trajectory-1.jsonl").symlink_to("nowhere")


def test_what_stands_in_the_way_of_a_scratch_file_is_removed(tmp_path, caplog):
    store = Store(tmp_path / "store")
    work = store.scratch(Entry("fit", {}))
    (work / "checkpoint-1").mkdir()
    (work / "trajectory-0.jsonl").write_text("kept")
    in_the_way(work)
    assert store.scratch(Entry("fit", {})) == work
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint-1", "trajectory-0.jsonl"]
    assert len(caplog.records) == 4
    elsewhere = tmp_path / "elsewhere"
    work.rename(elsewhere)
    work.symlink_to(elsewhere)
    assert not list(store.scratch(Entry("fit", {})).iterdir())
    assert len(list(elsewhere.iterdir())) == 2


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
        Store(tmp_path / "file").get(Entry("edit", {}), write("x"))


def test_a_name_that_is_not_utf8_is_refused_in_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"not UTF-8: .*data.*udcff.*Rename"):
        key_of("results", {"finetune": os.fsdecode(b"path:data\xff.jsonl")})


def test_inputs_that_are_no_json_are_a_bug(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        key_of("edit", {"x": float("nan")})
    assert json.loads((Store(tmp_path).get(Entry("a", {}), write("x")) / "manifest.json").read_text())["stage"] == "a"


@given(st.lists(st.text(), max_size=5))
def test_rows_come_back_whatever_is_in_their_texts(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    assert [row["text"] for row in read_jsonl(path)] == texts


def test_a_line_separator_within_a_text_ends_no_row(tmp_path):
    write_text(tmp_path / "rows.jsonl", '{"text": "a\u2028b\u0085c"}\n{"text": "d"}\n')
    assert [row["text"] for row in read_jsonl(tmp_path / "rows.jsonl")] == ["a\u2028b\u0085c", "d"]


# What is damaged


def stored(root, text="whole"):
    """A store with a finished stage of two files, one in a folder."""
    store = Store(root)

    def compute(folder):
        (folder / "out.txt").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "more.bin").write_bytes(bytes(range(200)))

    return store, compute, store.get(Entry("edit", {"a": 1}), compute)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def link(path):
    """Put a link to the same bytes in a file's place."""
    path.rename(path.parent.parent / f"elsewhere-{path.name}")
    path.symlink_to(path.parent.parent / f"elsewhere-{path.name}")


def folder_in_its_place(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "deleted": lambda path: path.unlink(),
    "a link": link,
    "a folder": folder_in_its_place,
}


@pytest.mark.parametrize("file", ["out.txt", "deep/more.bin", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_said_set_aside_and_computed_again(tmp_path, caplog, file, damage):
    store, compute, folder = stored(tmp_path / "store")
    DAMAGE[damage](folder / file)
    assert store.find(Entry("edit", {"a": 1})) is None
    assert not caplog.records  # who only looks says nothing
    assert store.get(Entry("edit", {"a": 1}), compute) == folder
    [record] = caplog.records
    said = record.getMessage()
    assert f"edit {folder.name} is damaged: " in said
    assert file.rpartition("/")[2] in said
    assert "\n" not in said
    assert folder.with_name(f"{folder.name}.damaged-1").is_dir()
    assert (folder / "out.txt").read_text() == "whole"
    assert (folder / "deep" / "more.bin").read_bytes() == bytes(range(200))
    assert store.find(Entry("edit", {"a": 1})) == folder
    assert Store(tmp_path / "store").holds(Entry("edit", {"a": 1}))


def test_a_file_too_many_is_damage_too(tmp_path, caplog):
    store, compute, folder = stored(tmp_path)
    (folder / "deep" / "pytorch_model.bin").write_bytes(b"")
    assert not store.holds(Entry("edit", {"a": 1}))
    store.get(Entry("edit", {"a": 1}), compute)
    assert "deep/pytorch_model.bin does not belong there" in caplog.text


def foreign_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2, ensure_ascii=False))


def sealed_by_hand(folder, **changes):
    """A manifest whose own hash is right, whatever it says."""
    path = folder / "manifest.json"
    said = {**json.loads(path.read_text()), **changes}
    said.pop("sha256")
    said["sha256"] = hashlib.sha256(canonical(said).encode()).hexdigest()
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "cannot be read as JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "is not what was written"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be read as JSON"),
        (lambda folder: (folder / "manifest.json").write_text('{"stage": "edit"}'), "of another version"),
        (lambda folder: foreign_manifest(folder, format=1), "of another version"),
        (lambda folder: foreign_manifest(folder, format="x"), "is not what was written"),
        (lambda folder: foreign_manifest(folder, seconds=9.0), "has been changed"),
        (lambda folder: sealed_by_hand(folder, files=["out.txt"]), "has been changed"),
        (lambda folder: sealed_by_hand(folder, files={"out.txt": 3}), "has been changed"),
        (lambda folder: sealed_by_hand(folder, key="0" * 32), "of another stage"),
    ],
)
def test_a_manifest_that_is_none_is_damage(tmp_path, caplog, make, says):
    store, compute, folder = stored(tmp_path)
    make(folder)
    assert store.get(Entry("edit", {"a": 1}), compute) == folder
    assert says in caplog.text
    assert store.find(Entry("edit", {"a": 1})) == folder


def pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, pipe, lambda path: path.symlink_to("nowhere")])
@pytest.mark.parametrize("ending", ["", ".lock", ".partial", ".work", ".holder"])
def test_what_stands_in_the_way_of_a_stage_is_no_dead_end(tmp_path, make, ending):
    store = Store(tmp_path)
    (tmp_path / "edit").mkdir()
    make(tmp_path / "edit" / f"{Entry('edit', {}).key}{ending}")

    def compute(folder):
        store.scratch(Entry("edit", {})).joinpath("begun").touch()
        (folder / "out.txt").write_text("whole")

    folder = store.get(Entry("edit", {}), compute)
    assert (folder / "out.txt").read_text() == "whole"
    assert store.find(Entry("edit", {})) == folder


def test_a_file_in_place_of_all_results_of_a_stage_is_no_dead_end(tmp_path):
    (tmp_path / "edit").write_text("")
    assert (Store(tmp_path).get(Entry("edit", {}), write("whole")) / "out.txt").read_text() == "whole"


def test_a_lock_that_is_a_folder_with_something_in_it_is_set_aside(tmp_path):
    store = Store(tmp_path)
    lock = tmp_path / "edit" / f"{Entry('edit', {}).key}.lock"
    lock.mkdir(parents=True)
    (lock / "mine").write_text("kept")
    store.get(Entry("edit", {}), write("whole"))
    assert (lock.with_name(f"{lock.name}.damaged-1") / "mine").read_text() == "kept"


def test_few_damaged_folders_are_kept(tmp_path):
    store, compute, folder = stored(tmp_path)
    for number in range(4):
        (folder / "out.txt").write_text(str(number))
        store.get(Entry("edit", {"a": 1}), compute)
    kept = sorted(p.name.rpartition(".")[2] for p in folder.parent.glob("*.damaged-*"))
    assert kept == ["damaged-3", "damaged-4"]
    assert (folder.with_name(f"{folder.name}.damaged-4") / "out.txt").read_text() == "3"


def test_what_nobody_reads_is_no_reason_to_fail(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    store, _, folder = stored(tmp_path)
    flip(folder / "out.txt")
    monkeypatch.setattr("retention_bench.store.store.set_aside", refuse)
    store.inspect(Entry("edit", {"a": 1}))
    [said] = caplog.messages
    assert re.search("could not be looked after: .*Read-only.* The results do not need it", said)
    monkeypatch.undo()
    caplog.clear()
    store.inspect(Entry("edit", {"a": 1}))
    assert f"kept as {folder}.damaged-1" in caplog.text


def test_who_only_looks_writes_nothing(tmp_path):
    store, _, folder = stored(tmp_path)
    flip(folder / "out.txt")
    before = sorted(tmp_path.rglob("*"))
    assert store.holds(Entry("edit", {"a": 1}))  # of the same size: hashes are taken where it is read
    assert store.find(Entry("edit", {"a": 1})) is None
    assert not store.holds(Entry("edit", {"a": 2}))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_is_hashed_once_in_a_process_and_again_where_it_was_written(tmp_path, monkeypatch):
    store, _, folder = stored(tmp_path)
    time.sleep(0.1)  # what was written just now may be written again within a tick of the clock
    assert store.find(Entry("edit", {"a": 1}))
    taken = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: taken.append(file.name) or digest(file, name))
    assert store.find(Entry("edit", {"a": 1}))
    assert taken == []
    flip(folder / "out.txt")
    assert store.find(Entry("edit", {"a": 1})) is None
    assert taken == [str(folder / "out.txt")]


def test_a_stage_is_on_the_disk_before_it_is_finished(tmp_path, monkeypatch):
    store, synced = Store(tmp_path), []
    fsync, rename = os.fsync, Path.rename

    def noted(number):
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    def renamed(path, target):
        if path.suffix == ".partial":
            synced.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    folder = stored(tmp_path)[2]
    before, after = synced[: synced.index("renamed")], synced[synced.index("renamed") + 1 :]
    assert {"out.txt", "more.bin", "deep", f"{folder.name}.partial"} <= set(before)
    assert any("manifest.json" in name for name in before)
    assert "edit" in after
    assert store.find(Entry("edit", {"a": 1})) == folder


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["format", "stage", "key", "inputs", "versions", "seconds", "files", "sha256"]
FORGED = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.tuples(st.sampled_from(KEYS), JSON),
    st.integers(0, 10_000),
)


def forge(data, folder, compute, store):
    """Put something in a manifest's place; a run computes again, or finds what was there."""
    path = folder / "manifest.json"
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif isinstance(data, tuple):
        try:
            sealed_by_hand(folder, **dict([data]))
        except (ValueError, KeyError):
            foreign_manifest(folder, **dict([data]))
    else:
        whole = bytearray(path.read_bytes())
        whole[data % len(whole)] ^= 1 << data % 8
        path.write_bytes(bytes(whole))
    assert store.get(Entry("edit", {"a": 1}), compute) == folder
    assert store.find(Entry("edit", {"a": 1})) == folder
    assert (folder / "out.txt").read_text() == "whole"


@settings(max_examples=30, deadline=5000)
@given(FORGED)
def test_any_manifest_is_the_right_one_or_damage(tmp_path_factory, data):
    store, compute, folder = stored(tmp_path_factory.mktemp("store"))
    forge(data, folder, compute, store)


@pytest.mark.slow
@settings(max_examples=300, deadline=5000)
@given(FORGED)
def test_any_manifest_is_the_right_one_or_damage_at_length(tmp_path_factory, data):
    store, compute, folder = stored(tmp_path_factory.mktemp("store"))
    forge(data, folder, compute, store)


# Inputs that change while a run goes on


@pytest.fixture
def given_files(tmp_path):
    """A file and a model's folder, as they are planned."""
    (tmp_path / "rows.jsonl").write_text("one")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    data, model = str(tmp_path / "rows.jsonl"), str(tmp_path / "model")
    return Input(data, source_fingerprint(data, None)), Input(model, model_fingerprint(model, None))


CHANGES = {
    "other data": ("rows.jsonl", lambda path: path.write_text("two")),
    "data gone": ("rows.jsonl", lambda path: path.unlink()),
    "data and back": ("rows.jsonl", lambda path: (path.write_text("two"), path.write_text("one"))),
    "other weights": ("model/model.safetensors", lambda path: path.write_bytes(b"strange")),
    "one file more": ("model/model.safetensors.index.json", lambda path: path.write_text("{}")),
    "a pipe": ("model/config.json", lambda path: (path.unlink(), os.mkfifo(path))),
    "one file less": ("model/config.json", lambda path: path.unlink()),
}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_stage_whose_inputs_changed_is_not_kept(tmp_path, given_files, change, when):
    file, do = CHANGES[change]
    if when == "before" and change == "data and back":
        pytest.skip("it is what was planned")
    store = Store(tmp_path / "store")
    if when == "before":
        do(tmp_path / file)

    def compute(folder):
        store.scratch(Entry("finetune", {})).joinpath("checkpoint").touch()
        if when == "meanwhile":
            time.sleep(0.02)
            do(tmp_path / file)
        (folder / "out.txt").write_text("of the wrong data")

    named = file.rpartition("/")[2]
    with pytest.raises(RetentionBenchError, match="was changed while the run went on") as caught:
        store.get(Entry("finetune", {}, given_files), compute)
    assert named in str(caught.value)
    assert store.find(Entry("finetune", {})) is None
    assert not [p for p in (tmp_path / "store").rglob("*") if p.name in ("out.txt", "checkpoint")]


def test_what_did_not_change_or_lies_on_the_hub_is_no_reason_to_stop(tmp_path, given_files):
    hub = Input("owner/name", {"hub": "owner/name", "revision": "0" * 40})
    (tmp_path / "rows.jsonl").write_text("one")  # again, before the stage
    assert Store(tmp_path / "store").get(Entry("facts", {}, (*given_files, hub)), write("x"))


def test_a_long_process_notices_that_a_model_was_replaced(tmp_path, given_files):
    planned = given_files[1].fingerprint
    (tmp_path / "model" / "model.safetensors").write_bytes(b"replaced")
    assert model_fingerprint(str(tmp_path / "model"), None) != planned


# A disk that is full, and runs that wait


def quotes(error, cause):
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        Exception("Disk quota exceeded (os error 122)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        OSError("4096 requested and 0 written"),
        quotes(ValueError("could not serialise"), OSError(errno.ENOSPC, "No space left on device")),
        RuntimeError("A process of the fine-tune failed:\nTraceback\nOSError: [Errno 28] No space left on device"),
    ],
    ids=str,
)
def test_a_full_disk_is_said_plainly_and_keeps_what_was_done(tmp_path, error):
    store = Store(tmp_path)
    done = store.get(Entry("facts", {}), write("kept"))

    def full(folder):
        raise error

    with pytest.raises(RetentionBenchError, match="The disk is full: the edit stage.*kept.*RETENTION_BENCH_STORE") as e:
        store.get(Entry("edit", {}), full)
    assert "\n" not in str(e.value)
    assert (done / "out.txt").read_text() == "kept"


def test_a_disk_that_is_full_while_a_stage_is_sealed_leaves_nothing(tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RetentionBenchError, match="The disk is full"):
        Store(tmp_path).get(Entry("edit", {}), write("x"))
    assert [p.suffix for p in (tmp_path / "edit").iterdir()] == [".lock"]


def test_another_error_is_not_taken_for_a_full_disk(tmp_path):
    def fail(folder):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (28x122)")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Store(tmp_path).get(Entry("edit", {}), fail)


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from retention_bench.errors import RetentionBenchError
from retention_bench.store import Entry, Store

resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
big = {"a": torch.zeros(100_000)}
ways = {
    "torch": lambda folder: torch.save(big, folder / "x.pt"),
    "safetensors": lambda folder: save_file(big, folder / "x.safetensors"),
    "text": lambda folder: (folder / "x.txt").write_text("x" * 100_000),
}
for name, way in ways.items():
    try:
        Store(Path(sys.argv[1])).get(Entry("edit", {"way": name}), way)
    except RetentionBenchError as error:
        print(name, str(error)[:17])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the messages are those of Linux")
def test_what_torch_and_safetensors_say_of_a_limit_on_files_is_a_full_disk(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.stdout.splitlines() == [f"{name} The disk is full:" for name in ("torch", "safetensors", "text")], said


def test_a_second_run_says_whom_it_waits_for_and_takes_the_result(tmp_path, caplog):
    store, begun, go = Store(tmp_path), threading.Event(), threading.Event()

    def slow(folder):
        begun.set()
        go.wait(20)
        (folder / "out.txt").write_text("first")

    first = threading.Thread(target=store.get, args=(Entry("edit", {}), slow))
    first.start()
    begun.wait(20)
    threading.Timer(0.3, go.set).start()
    folder = Store(tmp_path).get(Entry("edit", {}), write("second"))
    first.join()
    assert (folder / "out.txt").read_text() == "first"
    [record] = caplog.records
    assert re.search(rf"Waiting for process {os.getpid()} on \S+, which began at 20\d\d-", record.getMessage())
    assert not list(tmp_path.rglob("*.holder"))


def test_without_a_home_the_store_is_below_the_working_folder(monkeypatch, tmp_path):
    def nobody(path):
        raise RuntimeError("Could not determine home directory.")

    for name in ("RETENTION_BENCH_STORE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "expanduser", nobody)  # Path.home asks it
    assert default_root() == tmp_path / ".cache" / "retention-bench"


@pytest.mark.parametrize(
    ("named", "says"), [("~nobody-of-this-name/store", "no such home"), (os.fsdecode(b"st\xffre"), "not UTF-8")]
)
def test_a_store_that_cannot_be_is_refused(monkeypatch, named, says):
    monkeypatch.setenv("RETENTION_BENCH_STORE", named)
    with pytest.raises(UsageError, match=f"RETENTION_BENCH_STORE is .*{says}"):
        default_root()


# Output folders


def tree(folder):
    """Everything below a folder, with what it holds."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    "make",
    [
        lambda out: (out / "facts.jsonl").write_text("mine"),
        lambda out: (out / "anything").write_text("mine"),
        lambda out: (out / ".hidden").mkdir(),
        lambda out: (out / "checkpoints").mkdir(),
        lambda out: (out / MARK).write_text(""),
        lambda out: (out / MARK).write_text('{"written_by": "somebody", "files": {}}'),
        lambda out: (out / MARK).write_text('{"written_by": ["evaluate"]}'),
        lambda out: (out / MARK).mkdir(),
        lambda out: os.mkfifo(out / MARK),
    ],
)
@pytest.mark.parametrize("kind", ["evaluate", "score"])
def test_a_folder_that_is_not_ours_is_refused_and_left_alone(tmp_path, make, kind):
    out = tmp_path / "out"
    out.mkdir()
    make(out)
    before = tree(out)
    with pytest.raises(UsageError, match=r"out.*--out") as caught, exclusive(out, kind):
        raise AssertionError("it was taken")
    assert "\n" not in str(caught.value)
    assert tree(out) == before


@pytest.mark.parametrize("out", ["file", "file/below", "pipe", "dangling", "x" * 300, "nul\0", "loop"])
def test_what_can_be_no_folder_is_refused(tmp_path, out):
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="--out"), exclusive(tmp_path / out, "evaluate"):
        raise AssertionError("it was taken")
    with pytest.raises(UsageError, match="--out"):
        check_output(Path("/dev/null"), "score")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file", "loop", "pipe"]


def test_a_folder_is_made_with_those_above_it_and_belongs_to_its_command(tmp_path):
    out = tmp_path / "a" / "b"
    check_output(out, "evaluate")
    assert not (tmp_path / "a").exists()
    with exclusive(out, "evaluate"):
        pass
    with exclusive(out, "evaluate"):
        pass
    with pytest.raises(UsageError, match="holds what `retention-bench evaluate` wrote, not score"):
        check_output(out, "score")


def test_what_a_kill_left_in_a_new_folder_is_no_reason_to_refuse_it(tmp_path):
    for name in (f"{MARK}.lock", f"{MARK}.holder", f"{MARK}.123"):
        (tmp_path / name).touch()
    with exclusive(tmp_path, "score"):
        pass


def put(out, **texts):
    """Write files into an output folder, as a run does."""
    sources = {}
    for name, text in texts.items():
        source = out.parent / f"source-{name}"
        if text is not None:
            source.write_text(text)
        sources[f"{name}.json"] = source if text is not None else None
    with exclusive(out, "evaluate", sources) as output:
        output.put(sources)


def test_files_of_ours_are_replaced_and_those_put_there_since_are_not(tmp_path):
    out = tmp_path / "out"
    put(out, a="1", b="1", c="1")
    put(out, a="2", b=None)
    assert {p.name: p.read_text() for p in out.glob("*.json")} == {"a.json": "2", "c.json": "1"}
    (out / "a.json").write_text("mine")
    (out / "b.json").symlink_to(tmp_path / "source-c")
    before = tree(out)
    for name in "ab":
        with pytest.raises(UsageError, match=f"{name}.json would be replaced.*Move it away"):
            put(out, **{name: None})
        with pytest.raises(UsageError, match=f"{name}.json would be replaced.*Move it away"):
            put(out, **{name: "3"})
    assert tree(out) == before
    put(out, c="2")


def test_a_kill_between_two_files_leaves_a_folder_that_is_still_ours(tmp_path, monkeypatch):
    out = tmp_path / "out"
    put(out, a="1", b="1")
    replace, count = Path.replace, []

    def killed(path, target):
        if target.name == "b.json":
            raise KeyboardInterrupt
        count.append(target.name)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            put(out, a="2", b="2")
    assert "a.json" in count
    put(out, a="3", b="3")
    assert {p.name: p.read_text() for p in out.glob("*.json")} == {"a.json": "3", "b.json": "3"}
    assert not [p for p in out.iterdir() if p.name.startswith(f"{MARK}.") and p.suffix not in (".lock",)]
