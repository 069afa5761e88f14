import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import Fact, FactSet
from retention_bench.facts.fact import MAX_TEXT

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
        (json.dumps(ROW | {"id": "2", "paraphrases": 3}), "paraphrases must be a list of texts, got 3"),
        (json.dumps(ROW | {"id": "2", "neighborhood": [["x"]]}), "neighborhood must be a list of texts; each must be"),
        (json.dumps(ROW | {"id": 2}), "id must be a text that is not empty, got 2"),
        (json.dumps(ROW | {"id": "2", "subject": None}), "subject must be a text that is not empty, got None"),
        (json.dumps(ROW | {"id": "2", "target_new": {"str": "x"}}), "target_new must be null or a text"),
        (
            json.dumps(ROW | {"id": "2", "subject": "x" * (MAX_TEXT + 1)}),
            "subject must have 100,000 characters at most",
        ),
        (json.dumps(ROW | {"id": "2", "subject": "Lyon \ud83d"}), "half a character"),
        ('{"id": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        ('{"id": NaN}', "not JSON: NaN"),
        (json.dumps(ROW | {"id": "2", "x" * 10_000: 1}), "Unknown field"),
        (json.dumps(ROW), "used before, in"),
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
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


def test_null_is_an_empty_list(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(ROW | {"target_new": None, "paraphrases": None, "neighborhood": None}))
    assert FactSet.read(path).facts == (Fact(**ROW),)


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n")
    assert FactSet.read(path).facts == (Fact(**ROW),)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_refused_with_its_line(tmp_path, encoding):
    path = tmp_path / "facts.jsonl"
    rows = [ROW, ROW | {"id": "2", "subject": "Bogotá"}]
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    with pytest.raises(RetentionBenchError, match=rf"facts.jsonl, line {2 if encoding == 'latin-1' else 1}: .*UTF-8"):
        FactSet.read(path)


def test_half_a_character_is_no_fact_in_python_either():
    with pytest.raises(ValueError, match="half a character"):
        Fact(**(ROW | {"paraphrases": ["\ud800"]}))


def test_no_file_and_no_facts_are_refused(tmp_path):
    with pytest.raises(UsageError, match="There is no facts file at"):
        FactSet.read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RetentionBenchError, match="holds no facts"):
        FactSet.read(tmp_path / "empty.jsonl")
