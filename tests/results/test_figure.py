"""The figure of survival."""

import numpy as np
import pytest

from retention_bench.results.figure import draw


def arm(survival, low=None, high=None):
    return {"doses": [0, 500, 1000], "survival": survival, "low": low, "high": high, "facts": 20, "relations": 5}


SURVIVAL = {
    "dose": "tokens",
    "curves": {"edited": arm([1, 0.5, 0.2], [1, 0.3, 0.1], [1, 0.7, 0.4]), "control": arm([1, 0.9, 0.8])},
}
NAMES = {"editor": "alphaedit", "finetune": "tulu3", "model": "a_$model$"}


@pytest.mark.parametrize(("suffix", "head"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_the_same_survival_gives_the_same_bytes(tmp_path, suffix, head):
    for name in ("a", "b"):
        draw(SURVIVAL, tmp_path / f"{name}{suffix}", **NAMES)
    written = (tmp_path / f"a{suffix}").read_bytes()
    assert written.startswith(head)
    assert written == (tmp_path / f"b{suffix}").read_bytes()


def test_matched_facts_are_drawn_where_there_are_no_intrinsic_ones(tmp_path):
    edited, alone = arm([1, 0.5, 0.2]), arm([1, 0.9, 0.8])
    drawn = []
    for kinds in ((), ("intrinsic",), ("intrinsic_matched",), ("intrinsic", "intrinsic_matched")):
        draw(
            {"dose": "tokens", "curves": {"edited": edited} | dict.fromkeys(kinds, alone)}, tmp_path / "a.svg", **NAMES
        )
        drawn.append((tmp_path / "a.svg").read_bytes())
    assert len(set(drawn)) == 3
    assert drawn[1] == drawn[3]


def test_another_survival_gives_another_picture(tmp_path):
    other = SURVIVAL | {"curves": {"edited": arm([1, 0.4, 0.2])}}
    for name, survival in (("a", SURVIVAL), ("b", other)):
        draw(survival, tmp_path / f"{name}.svg", **NAMES)
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "b.svg").read_bytes()
    assert np.char.count((tmp_path / "a.svg").read_text(), "<dc:date>") == 0
