"""`scores.jsonl` as it is written, cut off and refused."""

import json

import pytest

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.results.score_file import ScoreFile, read_scores

KINDS = ("edited", "intrinsic", "locality")


def row(number):
    rate = {"stop_words": 2, "hits": number, "total": 3, "rate": number / 3, "ci95": [0.0, 1.0], "samples": []}
    return {"checkpoint": "a", "key": "k", "task": f"retention_{KINDS[number]}", **rate}


def found(path):
    """The kinds that a file has scores of."""
    file = ScoreFile(path)
    return [kind for kind in KINDS if file.find("k", f"retention_{kind}") is not None]


@pytest.fixture
def path(tmp_path):
    """A file with three lines."""
    file = ScoreFile(tmp_path / "scores.jsonl")
    for number in range(3):
        file.add(row(number))
    return file.path


def test_what_a_kill_left_of_a_line_is_cut_off_and_other_damage_is_named(path):
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for end in range(len(whole) - len(lines[2]), len(whole) - 1):
        path.write_bytes(whole[:end])
        assert len(read_scores(path)) == 2
        assert path.read_bytes() == whole[:end]  # only who writes cuts it
        assert found(path) == ["edited", "intrinsic"]
        assert path.read_bytes() == b"".join(lines[:2])
    path.write_bytes(whole[:-1])
    assert found(path) == [*KINDS]
    assert path.read_bytes() == whole
    for number in (1, 2):
        damaged = [*lines]
        damaged[number] = damaged[number].replace(b"0.", b"9.", 1)
        path.write_bytes(b"".join(damaged))
        with pytest.raises(RetentionBenchError, match=f"line {number + 1} is damaged.*sha256"):
            ScoreFile(path)
        assert path.read_bytes() == b"".join(damaged)


def test_what_a_kill_left_of_the_first_line_is_cut_off(path):
    first = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(first[:60])
    assert found(path) == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "foreign",
    [
        b'{"run": 7, "loss": 1.25}\n',
        b'{"run": 7, "loss": 1.25}',
        b'{"run": 7, "lo',
        b'{"checkpoint": "mine", "loss": 1.25}',
        b'{"checkpoint": "mine", "lo',
        b"step,loss\n1,2.5",
        b"\xff\xfe\x00",
        b"\n",
        b"[" * 100_000 + b"\n",
        b'{"checkpoint": "mine", "sha256": "0"}\n',
    ],
)
def test_a_file_of_others_is_refused_and_left_as_it_is(tmp_path, foreign):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(foreign)
    with pytest.raises(RetentionBenchError, match="scores.jsonl, line 1") as caught:
        ScoreFile(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == foreign


def test_a_folder_or_a_pipe_is_refused(tmp_path):
    import os

    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("folder", "a folder"), ("pipe", "a pipe")):
        with pytest.raises(UsageError, match=f"{name} is {kind}"):
            ScoreFile(tmp_path / name)


def test_a_line_that_did_not_fit_the_disk_is_taken_back(path, monkeypatch):
    from retention_bench.results import score_file

    before = path.read_bytes()
    file = ScoreFile(path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(score_file.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            file.add(row(0))
    assert path.read_bytes() == before
    file.add({"checkpoint": "b", "error": "no weights"})
    assert [json.loads(line)["checkpoint"] for line in path.read_text().splitlines()] == ["a", "a", "a", "b"]


def test_a_line_is_found_by_what_was_scored_and_by_its_name(path):
    file = ScoreFile(path)
    other = file.add(row(0) | {"key": "other"})
    assert file.find("k", "retention_edited")["hits"] == 0
    assert file.find("k", "retention_paraphrase") is None
    assert file.latest("a", "retention_edited") == other
    assert file.latest("b", "retention_edited") is None
    nothing = {"stop_words": 2, "hits": 0, "total": 0, "rate": None, "ci95": None, "samples": []}
    file.add({"checkpoint": "c", "key": "k", "task": "retention_edited", **nothing})
    assert len(read_scores(path)) == 5
