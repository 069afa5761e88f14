import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import Fact, FactSet

ROW = {"id": "1", "subject": "Lyon", "relation": "country", "prompt": "{} is a city in", "target_true": "France"}

names = st.text(min_size=1, max_size=12).filter(lambda t: t.strip() == t and t)


@st.composite
def facts(draw):
    ids = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    return FactSet.of(
        Fact(
            id=i,
            subject=draw(names),
            relation=draw(names),
            prompt="Of " + "{}" + draw(names.filter(lambda t: "{" not in t and "}" not in t)),
            target_true=draw(names),
            target_new=draw(st.none() | names),
            paraphrases=tuple(draw(st.lists(names, max_size=2))),
        )
        for i in ids
    )


@given(facts())
def test_what_is_written_is_read_back(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    written.write(path)
    assert FactSet.read(path) == written
    assert FactSet.read(path).sha256 == written.sha256


def test_roles_follow_from_the_counterfactual_object():
    both = FactSet.of([Fact(**ROW), Fact(**(ROW | {"id": "2", "target_new": " Spain"}))])
    assert [f.id for f in both.edited] == ["2"]
    assert [f.id for f in both.intrinsic] == ["1"]
    assert [f.target for f in both] == ["France", "Spain"]
    assert both.facts[0].question == "Lyon is a city in"


def test_braces_in_a_subject_stay_as_they_are():
    assert Fact(**(ROW | {"subject": "{0} {x}"})).question == "{0} {x} is a city in"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ("[]", "must be a JSON object"),
        (json.dumps({k: v for k, v in ROW.items() if k != "subject"}), "missing field 'subject'"),
        (json.dumps(ROW | {"id": "2", "targettrue": "x"}), "Did you mean 'target_true'"),
        (json.dumps(ROW | {"id": "2", "prompt": "no place"}), "exactly once"),
        (json.dumps(ROW | {"id": "2", "paraphrases": "one text"}), "paraphrases must be a list"),
        (json.dumps(ROW | {"id": "2", "target_new": ""}), "target_new"),
        (json.dumps(ROW), "used before, on line 1"),
    ],
)
def test_a_malformed_row_names_file_and_line(tmp_path, line, says):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(RetentionBenchError) as caught:
        FactSet.read(path)
    assert str(path) in str(caught.value)
    assert "line 2" in str(caught.value)
    assert says in str(caught.value)


def test_no_file_and_no_facts_are_refused(tmp_path):
    with pytest.raises(UsageError, match="No facts file at"):
        FactSet.read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RetentionBenchError, match="holds no facts"):
        FactSet.read(tmp_path / "empty.jsonl")
