import json
import sys
import types

import pytest

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import Fact, FactSet, load_pool, read_pool

ROME = {
    "case_id": 7,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    "attribute_prompts": [],
    "generation_prompts": [],
}
TRACING = {
    "relation": "The mother tongue of {} is",
    "relation_prefix": "The mother tongue of",
    "relation_suffix": " is",
    "prompt": "The mother tongue of Danielle Darrieux is",
    "relation_id": "P103",
    "target_false_id": "Q1860",
    "target_true_id": "Q150",
    "target_true": " French",
    "target_false": " English",
    "subject": " Danielle Darrieux",
}
EASYEDIT = {
    "case_id": 7,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Danielle Darrieux, a native",
    "locality_prompt": "The mother tongue of Léon Blum is",
    "locality_ground_truth": "French",
}
OTHER = EASYEDIT | {
    "case_id": 8,
    "prompt": "The mother tongue of Léon Blum is",
    "subject": "Léon Blum",
    "locality_prompt": "The mother tongue of Danielle Darrieux is",
}
KNOWN = {
    "known_id": 7,
    "subject": "Vinson Massif",
    "attribute": "Antarctica",
    "template": "{} is located in the continent",
    "prediction": " of Antarctica. It is the largest of the three",
    "prompt": "Vinson Massif is located in the continent of",
    "relation_id": "P30",
}
OURS = {
    "id": "7",
    "subject": "Danielle Darrieux",
    "relation": "mother tongue",
    "prompt": "The mother tongue of {} is",
    "target_true": "French",
    "target_new": "English",
}
DARRIEUX = Fact(
    "7",
    "Danielle Darrieux",
    "P103",
    "The mother tongue of {} is",
    "French",
    "English",
    ("Danielle Darrieux, a native",),
    ("The mother tongue of Léon Blum is",),
)
EXPECTED = {
    "rome": (ROME, DARRIEUX),
    "tracing": (TRACING, Fact("0", "Danielle Darrieux", "P103", DARRIEUX.prompt, "French", "English")),
    "known": (KNOWN, Fact("7", "Vinson Massif", "P30", "{} is located in the continent of", "Antarctica")),
    "ours": (OURS, Fact(**OURS)),
}


@pytest.fixture
def write(tmp_path):
    """Writes records as `.json` or `.jsonl` and gives the path."""

    def put(records, suffix):
        path = tmp_path / f"whatever{suffix}"
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
        return str(path)

    return put


@pytest.fixture
def hub(monkeypatch):
    """A Hub that has one data set, and the calls that were made to it."""
    calls = []

    def load_dataset(source, config=None, *, split, revision):
        calls.append((source, config, split, revision))
        if source != "some/counterfact":
            raise FileNotFoundError(f"Dataset '{source}' doesn't exist on the Hub.")
        return [ROME]

    fake = types.SimpleNamespace(
        load_dataset=load_dataset, exceptions=types.SimpleNamespace(DatasetsError=RuntimeError)
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("form", EXPECTED)
def test_every_form_is_told_by_its_fields(write, form, suffix):
    record, fact = EXPECTED[form]
    pool = load_pool(write([record], suffix))
    assert pool.facts.facts == (fact,)
    assert (pool.rows.read, pool.rows.kept, pool.rows.recovered) == (1, 1, 0)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_flattened_form_gets_its_template_and_its_relation_back(write, suffix):
    pool = load_pool(write([EASYEDIT, OTHER], suffix))
    first, second = pool.facts
    # known_1000 does not have this template, so its words are the relation's name.
    assert first == Fact(**{**DARRIEUX.to_json(), "relation": DARRIEUX.prompt})
    assert (second.relation, second.question) == (first.relation, OTHER["prompt"])
    assert (pool.rows.form, pool.rows.relations, pool.rows.recovered) == ("EasyEdit's", 1, 2)
    assert "2 rows read, 0 dropped, 1 relations recovered" in str(pool.rows)


def test_a_subject_at_the_start_carries_no_space_in_the_tracing_form(write):
    record = TRACING | {
        "relation_prefix": "",
        "relation_suffix": " was born in",
        "prompt": "Léon Blum was born in",
        "subject": "Léon Blum",
    }
    assert read_pool(write([record], ".json")).facts[0].prompt == "{} was born in"


def test_a_neighbour_with_another_object_is_none(write):
    record = EASYEDIT | {"locality_ground_truth": "Dutch"}
    assert read_pool(write([record, OTHER], ".json")).facts[0].neighborhood == ()


def test_optional_fields_of_the_flattened_form_may_be_absent_or_lists(write):
    bare = {k: EASYEDIT[k] for k in ("prompt", "subject", "target_new", "ground_truth")}
    listed = OTHER | {"rephrase_prompt": ["one", "two"], "relation_id": "P103"}
    first, second = read_pool(write([bare, listed, bare | {"case_id": "x"}], ".json")).facts[::-2]
    assert (first.id, first.paraphrases, second.id) == ("x", (), "0")
    assert read_pool(write([listed], ".json")).facts[0].paraphrases == ("one", "two")


def test_rows_that_are_no_facts_are_counted_by_reason(write):
    away = EASYEDIT | {"case_id": 9, "subject": "Marie Curie"}
    alone = EASYEDIT | {
        "case_id": 10,
        "prompt": "Danielle Darrieux once sang with",
        "locality_prompt": "Marie Curie once sang with",
        "ground_truth": "Aznavour",
        "target_new": "Brel",
        "locality_ground_truth": "Aznavour",
    }
    pool = load_pool(write([EASYEDIT, OTHER, away, alone], ".json"))
    assert [fact.id for fact in pool.facts] == ["7", "8"]
    assert pool.rows.dropped == {"the subject does not stand in the prompt": 1, "nothing tells the relation": 1}
    assert (pool.rows.read, pool.rows.kept) == (4, 2)
    assert "4 rows read, 2 dropped (1: the subject does not stand in the prompt; 1: nothing" in str(pool.rows)
    stored = json.loads(json.dumps(pool.rows.to_json()))
    assert (stored["read"], stored["dropped"]) == (4, pool.rows.dropped)
    assert "source" not in stored
    with pytest.raises(RetentionBenchError, match="No fact is left: .*1 rows read, 1 dropped"):
        load_pool(write([away], ".json"))


def without(record, field):
    return {name: value for name, value in record.items() if name != field}


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        (ROME, {"case_id": 8}, "has no 'requested_rewrite'"),
        (ROME, ROME | {"requested_rewrite": [1]}, "'requested_rewrite' must be an object, got list"),
        (ROME, ROME | {"requested_rewrite": without(ROME["requested_rewrite"], "relation_id")}, "has no 'relation_id'"),
        (ROME, ROME | {"requested_rewrite": ROME["requested_rewrite"] | {"target_new": "x"}}, "'target_new' must be"),
        (ROME, ROME | {"requested_rewrite": ROME["requested_rewrite"] | {"prompt": "x"}}, "prompt must contain '{}'"),
        (ROME, ROME, "id '7' was used before, in PLACE 1"),
        (ROME, ROME | {"case_id": [8]}, "'case_id' must be a number or a text"),
        (ROME, EASYEDIT, "has no 'requested_rewrite'"),
        (ROME, 5, "must be a JSON object, got int"),
        (TRACING, TRACING | {"relation_suffix": " was"}, "do not make up the prompt"),
        (TRACING, without(TRACING, "target_false"), "has no 'target_false'"),
        (EASYEDIT, without(OTHER, "ground_truth"), "has no 'ground_truth'"),
        (EASYEDIT, OTHER | {"target_new": ["x"]}, "'target_new' must be a text"),
        (EASYEDIT, OTHER | {"rephrase_prompt": [""]}, "'rephrase_prompt' must be a text or a list"),
        (KNOWN, KNOWN | {"known_id": 8, "attribute": " "}, "'attribute' must be a text that is not empty, got ' '"),
    ],
)
@pytest.mark.parametrize(("suffix", "place"), [(".json", "record"), (".jsonl", "line")])
def test_a_malformed_record_is_named(write, good, bad, says, suffix, place):
    path = write([good, bad], suffix)
    with pytest.raises(RetentionBenchError) as caught:
        read_pool(path)
    assert f"{path}, {place} 2: " in str(caught.value)
    assert says.replace("PLACE", place) in str(caught.value)


def test_records_of_no_form_are_refused_with_the_forms_there_are(write):
    path = write([{"subject": "Lyon", "proposition": "Lyon is in France", "label": 1}], ".json")
    with pytest.raises(RetentionBenchError, match="record 1: no form .* fields label, proposition, subject.*tracing: "):
        read_pool(path)


@pytest.mark.parametrize(
    ("name", "text", "error", "says"),
    [
        ("none.json", None, UsageError, "No facts file at"),
        ("none.jsonl", None, UsageError, "No facts file at"),
        ("facts.json", "{", RetentionBenchError, "is not JSON"),
        ("facts.json", "{}", RetentionBenchError, "must hold a list of records, and holds dict"),
        ("facts.json", "[]", RetentionBenchError, "holds no facts"),
        ("facts.jsonl", "", RetentionBenchError, "holds no facts"),
        ("facts.jsonl", json.dumps(ROME) + "\n\n{", RetentionBenchError, "line 3: not JSON"),
        ("facts.jsonl", json.dumps(OURS | {"promt": "x"}), RetentionBenchError, "line 1: not a fact: .*'prompt'"),
    ],
)
def test_a_file_that_holds_no_records_says_so(tmp_path, name, text, error, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=says) as caught:
        read_pool(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_our_own_lines_are_read_as_a_fact_set(write):
    path = write([OURS, OURS | {"id": "8"}], ".jsonl")
    assert read_pool(path) == FactSet.read(path)


def test_a_hub_data_set_is_read_with_its_config_and_revision(hub):
    assert read_pool("some/counterfact", "abc", "default").facts == (DARRIEUX,)
    assert read_pool("some/counterfact").facts == (DARRIEUX,)
    assert hub == [("some/counterfact", "default", "train", "abc"), ("some/counterfact", None, "train", None)]
    with pytest.raises(RetentionBenchError, match="'some/other' at revision abc cannot be read: .*give a local"):
        read_pool("some/other", "abc")


# The real files


def test_the_ten_thousand_edits_all_get_a_relation(real_data):
    pool = load_pool(str(real_data("counterfact_edit.json")))
    assert pool.rows.to_json() == {
        "form": "EasyEdit's", "read": 10_000, "dropped": {}, "relations": 24, "recovered": 10_000
    }  # fmt: skip
    rows = {str(row["case_id"]): row for row in json.loads(real_data("counterfact_edit.json").read_text())}
    assert all(fact.question == rows[fact.id]["prompt"] for fact in pool.facts)
    assert sum(fact.relation.startswith("P") for fact in pool.facts) == 9_982  # the others ask for a record label


def test_recovered_relations_agree_with_those_the_known_facts_name(real_data):
    named = {(f.subject, f.target_true): f.relation for f in read_pool(str(real_data("known_1000.json")))}
    shared = [f for f in read_pool(str(real_data("counterfact_edit.json"))) if (f.subject, f.target_true) in named]
    agree = sum(named[f.subject, f.target_true] in f.relation.split("+") for f in shared)
    # Of the 12 others both relations hold: Goebbels worked in Berlin (P937) and died there (P20).
    assert (len(shared), agree) == (564, 552)


def test_the_known_facts_are_read(real_data):
    pool = load_pool(str(real_data("known_1000.json")))
    assert (len(pool.facts), pool.rows.dropped, pool.rows.relations) == (1_209, {}, 33)
    assert not len(pool.facts.edited)
