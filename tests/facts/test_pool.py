import gzip
import json
import sys
import time
import types
from pathlib import Path

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


def without(record, field):
    return {name: value for name, value in record.items() if name != field}


@pytest.fixture
def write(tmp_path):
    """Writes records as `.json` or `.jsonl` and gives the path."""

    def put(records, suffix):
        path = tmp_path / f"whatever{suffix}"
        lines = [json.dumps(record, ensure_ascii="\\ud" in json.dumps(record)) for record in records]
        path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
        return str(path)

    return put


@pytest.fixture
def hub(monkeypatch):
    """A Hub that has one data set, and the calls that were made to it."""
    calls = []

    def load_dataset(source, config=None, *, split, revision, streaming):
        assert not streaming
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
    assert (pool.rows.format, pool.rows.relations, pool.rows.recovered) == ("EasyEdit's", 1, 2)
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
    path = write([EASYEDIT, OTHER, away, alone], ".json")
    assert [fact.relation for fact in read_pool(path)] == [*[DARRIEUX.prompt] * 2, "{} once sang with"]
    pool = load_pool(path, need_relation=True)
    assert [fact.id for fact in pool.facts] == ["7", "8"]
    assert pool.rows.dropped == {"the subject does not stand in the prompt": 1, "nothing tells the relation": 1}
    assert (pool.rows.read, pool.rows.kept) == (4, 2)
    assert (
        "4 rows read, 2 dropped (1: the subject does not stand in the prompt (the first: row 3); "
        "1: nothing tells the relation (the first: row 4))"
    ) in str(pool.rows)
    stored = json.loads(json.dumps(pool.rows.to_json()))
    assert (stored["read"], stored["dropped"]) == (4, pool.rows.dropped)
    assert "source" not in stored
    with pytest.raises(RetentionBenchError, match="No fact is left: .*1 rows read, 1 dropped"):
        load_pool(write([away], ".json"))


REWRITE = ROME["requested_rewrite"]


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        (ROME, {"case_id": 8}, "requested_rewrite: Field required"),
        (ROME, ROME | {"requested_rewrite": [1]}, "requested_rewrite: "),
        (ROME, ROME | {"requested_rewrite": without(REWRITE, "subject")}, "requested_rewrite.subject: Field required"),
        (ROME, ROME | {"requested_rewrite": REWRITE | {"target_new": "x"}}, "requested_rewrite.target_new: "),
        (ROME, ROME | {"case_id": [8]}, "case_id: Input should be a valid string, got a list of 1"),
        (ROME, ROME | {"case_id": True}, "case_id: Input should be a valid string, got True"),
        (
            ROME,
            ROME | {"case_id": 9, "paraphrase_prompts": 3},
            "paraphrase_prompts: Input should be a valid tuple, got 3",
        ),
        (ROME, ROME | {"case_id": 9, "paraphrase_prompts": [["x"]]}, "paraphrase_prompts.0: "),
        (ROME, ROME | {"case_id": "x" * 200_000}, "case_id: String should have at most 100000 characters"),
        (ROME, EASYEDIT, "requested_rewrite: Field required"),
        (ROME, 5, "a row must be a JSON object, got 5"),
        (ROME, None, "a row must be a JSON object, got None"),
        (ROME, ROME | {"case_id": "\ud83d"}, "half a character"),
        (TRACING, TRACING | {"relation_suffix": " was"}, "do not make up the prompt"),
        (TRACING, without(TRACING, "target_false"), "target_false: Field required"),
        (EASYEDIT, without(OTHER, "target_new"), "target_new: Field required"),
        (EASYEDIT, OTHER | {"target_new": {"str": "x"}}, "target_new: Input should be a valid string"),
        (EASYEDIT, OTHER | {"rephrase_prompt": 5}, "rephrase_prompt: Input should be a valid tuple"),
        (KNOWN, KNOWN | {"known_id": 8, "attribute": " "}, "attribute: it must not be empty, got ' '"),
    ],
)
@pytest.mark.parametrize(("suffix", "place"), [(".json", "row"), (".jsonl", "line")])
def test_a_malformed_record_of_others_is_dropped_counted_and_named(write, good, bad, says, suffix, place):
    for records, number in (([good, bad], 2), ([bad, good], 1)):
        if number == 1 and bad is EASYEDIT:
            continue  # then that is the form
        pool = load_pool(write(records, suffix))
        assert (len(pool.facts), dict(pool.rows.dropped)) == (1, {"not a record of this format": 1})
        dropped = f"1: not a record of this format (the first: {place} {number}: "
        assert f"2 rows read, 1 dropped ({dropped}" in str(pool.rows)
        assert says in str(pool.rows)
        assert len(str(pool.rows)) < 700


def test_a_line_that_is_not_json_is_dropped_among_records_of_others(write, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(["{", json.dumps(ROME), "[" * 100_000, json.dumps(ROME | {"case_id": 8})]))
    pool = load_pool(path)
    assert [fact.id for fact in pool.facts] == ["7", "8"]
    assert "2: not a record of this format (the first: line 1: not JSON" in str(pool.rows)


@pytest.mark.parametrize("layout", ["{}", "[{}]"])
def test_a_key_that_stands_twice_is_no_fact(tmp_path, layout):
    def said(record, key):
        text = json.dumps(record)
        path = tmp_path / "twice.json"
        path.write_text(layout.replace("{}", f'{text[:-1]}, "{key}": "x"}}'))
        with pytest.raises(RetentionBenchError) as caught:
            load_pool(path)
        return str(caught.value)

    ours = Fact("a", "Salta", "r", "{} is in", "Argentina").to_json()
    assert "the key 'target_true' stands twice in an object" in said(ours, "target_true")
    assert "the key 'case_id' stands twice in an object" in said(ROME, "case_id")


def test_a_relation_that_only_some_rows_name_has_one_name(write):
    """Under two it could stand on both sides of the split."""
    named = [ROME | {"case_id": n} for n in range(3)]
    unnamed = [
        r | {"case_id": n + 3, "requested_rewrite": without(REWRITE, "relation_id")} for n, r in enumerate(named)
    ]
    pool = load_pool(write([*named, *unnamed], ".json"))
    assert {fact.relation for fact in pool.facts} == {"P103"}
    assert (len(pool.facts), pool.rows.relations, pool.rows.recovered) == (6, 1, 3)
    mine = [r | {"requested_rewrite": r["requested_rewrite"] | {"relation_id": "tongue"}} for r in named]
    assert len({fact.relation for fact in load_pool(write([*mine, *unnamed], ".json")).facts}) == 1


def test_keywords_of_a_relation_that_no_fact_has_are_refused_by_name(write):
    path = write(
        [OURS, OURS | {"id": "8", "relation": "capital"}, OURS | {"id": "9", "relation": "P17+P131"}], ".jsonl"
    )
    assert len(load_pool(path, keywords=["mother tongue", "capital", "P131", "P17+P131"]).facts) == 3
    with pytest.raises(UsageError, match="facts.keywords: 'capitol'. Did you mean 'capital'"):
        load_pool(path, keywords=["mother tongue", "capitol"])


def test_an_id_that_was_used_before_is_dropped(write):
    pool = load_pool(write([ROME, ROME], ".jsonl"))
    assert (len(pool.facts), pool.rows.dropped) == (1, {"its id was used before": 1})
    assert "(the first: line 2: '7')" in str(pool.rows)


def test_no_record_left_names_the_first(write):
    bad = ROME | {"requested_rewrite": without(REWRITE, "prompt")}
    with pytest.raises(RetentionBenchError, match="No fact is left: .*2 rows read, 2 dropped .*row 1: requested_rew"):
        load_pool(write([bad, bad], ".json"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("bad", [OURS | {"id": "8", "paraphrases": 3}, OURS, 5, without(OURS, "id"), ROME])
def test_a_mistake_in_our_own_form_is_an_error(write, bad, suffix):
    place = "row" if suffix == ".json" else "line"
    with pytest.raises(RetentionBenchError, match=f"whatever{suffix}, {place} 2: not a fact: "):
        load_pool(write([OURS, bad], suffix))


# Other benchmarks' records

ZSRE = {
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey attend?",
    "pred": "Trinity College",
    "rephrase": "What university did Watts Humphrey take part in?",
    "alt": "University of Michigan",
    "answers": ["Illinois Institute of Technology"],
    "loc": "nq question: who played desmond doss father in hacksaw ridge",
    "loc_ans": "Hugo Weaving",
    "cond": "Trinity College >> University of Michigan || What university did Watts Humphrey attend?",
}
HUMPHREY = Fact(
    "0",
    "Watts Humphrey",
    "What university did {} attend?",
    "What university did {} attend?",
    "Illinois Institute of Technology",
    "University of Michigan",
    ("What university did Watts Humphrey take part in?",),
)
ZSRE_KNOWEDIT = {
    "subject": "Watts Humphrey",
    "prompt": "What university did Watts Humphrey attend?",
    "target_new": "University of Michigan",
    "ground_truth": ["Illinois Institute of Technology"],
    "rephrase_prompt": "What university did Watts Humphrey take part in?",
    "portability": {"Reasoning": [{"prompt": "The city of the university is", "ground_truth": [["Ann Arbor"]]}]},
    "locality": {"Relation_Specificity": [{"prompt": "Watts Humphrey was born in", "ground_truth": [["Michigan"]]}]},
}
RECENT = without(ZSRE_KNOWEDIT, "ground_truth")
MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Croatia", "id": "Q224"},
            "target_true": {"str": "United States of America", "id": "Q30"},
            "subject": "Ellie Kemper",
            "question": "What is the country of citizenship of Ellie Kemper?",
        },
        {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": "Ankara", "id": "Q3640"},
            "target_true": {"str": "Zagreb", "id": "Q1435"},
            "subject": "Croatia",
            "question": "What is the capital of Croatia?",
        },
    ],
    "questions": ["What is the capital of the country of which Ellie Kemper is a citizen?"],
    "answer": "Washington, D.C.",
    "new_answer": "Ankara",
    "single_hops": [{"question": "What is the country of citizenship of Ellie Kemper?", "answer": "USA"}],
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("record", "form"),
    [
        (ZSRE, "zsRE's"),
        ({("prompt" if k == "src" else k): v for k, v in ZSRE.items()}, "zsRE's"),
        (ZSRE_KNOWEDIT, "EasyEdit's"),
        (ZSRE_KNOWEDIT | {"ground_truth": [["Illinois Institute of Technology", "IIT"]]}, "EasyEdit's"),
        (ZSRE_KNOWEDIT | {"ground_truth": "Illinois Institute of Technology"}, "EasyEdit's"),
    ],
)
def test_zsre_and_knowedit_are_read_as_facts(write, record, form, suffix):
    pool = load_pool(write([record], suffix))
    assert (pool.facts.facts, pool.rows.format) == ((HUMPHREY,), form)
    assert HUMPHREY.question == ZSRE["src"]
    other = {k: v.replace("Watts Humphrey", "Ann Lee") if isinstance(v, str) else v for k, v in record.items()}
    assert len(load_pool(write([record, other], suffix), need_relation=True).facts) == 2


def test_a_record_without_a_true_object_is_no_fact(write):
    pool = load_pool(write([RECENT, ZSRE_KNOWEDIT, ZSRE_KNOWEDIT | {"ground_truth": []}], ".json"))
    assert (pool.rows.format, len(pool.facts), pool.rows.dropped) == (
        "KnowEdit's",
        1,
        {"it does not say the true object": 2},
    )
    with pytest.raises(RetentionBenchError, match="No fact is left: .*1: it does not say the true object .*row 1"):
        load_pool(write([RECENT], ".json"))


def test_every_rewrite_of_mquake_is_a_fact_and_none_twice(write):
    again = MQUAKE | {"case_id": 2, "requested_rewrite": MQUAKE["requested_rewrite"][1:]}
    broken = MQUAKE | {"case_id": 3, "requested_rewrite": [{}]}
    pool = load_pool(write([MQUAKE, again, broken], ".json"))
    kemper, capital = pool.facts
    assert kemper == Fact(
        "1-0", "Ellie Kemper", "P27", "{} is a citizen of", "United States of America", "Croatia",
        ("What is the country of citizenship of Ellie Kemper?",),
    )  # fmt: skip
    assert (capital.id, capital.question, capital.target_new) == ("1-1", "The capital of Croatia is", "Ankara")
    assert pool.rows.dropped == {"not a record of this format": 1, "it repeats an earlier one": 1}
    assert (pool.rows.format, pool.rows.read, pool.rows.kept) == ("MQuAKE's", 4, 2)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [("a " * 40_000, "a"), ("A" * 90_000, "a" * 40_000 + "b"), ("{} and {}", "x"), ("{}{}", "{}")],
)
def test_odd_prompts_do_not_blow_up_the_recovery_of_relations(write, prompt, subject):
    odd = EASYEDIT | {"case_id": 1, "prompt": prompt, "subject": subject, "locality_prompt": "a " * 40_000}
    began = time.monotonic()
    pool = load_pool(write([EASYEDIT, OTHER, odd], ".jsonl"))
    assert {"7", "8"} <= {fact.id for fact in pool.facts}
    assert time.monotonic() - began < 5


def test_records_of_no_form_are_refused_with_the_forms_there_are(write):
    path = write([{"subject": "Lyon", "proposition": "Lyon is in France", "label": 1}], ".json")
    with pytest.raises(RetentionBenchError, match="row 1: no format .* fields label, proposition, subject.*tracing: "):
        read_pool(path)


@pytest.mark.parametrize(
    ("name", "text", "error", "says"),
    [
        ("none.json", None, UsageError, "There is no facts file at"),
        ("none.jsonl", None, UsageError, "There is no facts file at"),
        ("facts.json", "[", RetentionBenchError, "not JSON"),
        ("facts.json", "{", RetentionBenchError, "line 1: not JSON: .*an object a line"),
        ("facts.json", "{}", RetentionBenchError, "line 1: no format of facts has the fields"),
        ("facts.json", "[]", RetentionBenchError, "holds no rows"),
        ("facts.json", '[{"a\\n": 1}]', RetentionBenchError, r"no format of facts has the fields 'a\\n'"),
        ("facts.json", "[1]", RetentionBenchError, "row 1: a row must be a JSON object, got 1. Facts in JSON"),
        ("facts.jsonl", "", RetentionBenchError, "holds no rows"),
        ("facts.jsonl", json.dumps(OURS) + "\n\n{", RetentionBenchError, "line 3: not a fact: not JSON"),
        ("facts.jsonl", json.dumps(OURS | {"promt": "x"}), RetentionBenchError, "line 1: not a fact: .*'prompt'"),
        ("facts.jsonl", json.dumps(without(OURS, "id")), RetentionBenchError, "line 1: not a fact: missing field 'id'"),
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


@pytest.mark.parametrize(("record", "suffix"), [(OURS, ".jsonl"), (ROME, ".jsonl"), (ROME, ".json")])
def test_any_form_is_read_in_utf8_with_or_without_a_mark_and_compressed(write, tmp_path, record, suffix):
    plain = Path(write([record], suffix))
    expected = load_pool(plain).facts
    marked, packed = tmp_path / f"marked{suffix}", tmp_path / f"packed{suffix}.gz"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    assert load_pool(marked).facts == load_pool(str(packed)).facts == expected
    latin = tmp_path / f"latin{suffix}"
    latin.write_bytes(plain.read_text(encoding="utf-8").replace("Darrieux", "Darriéux").encode("latin-1", "replace"))
    with pytest.raises(RetentionBenchError, match=rf"latin{suffix}, line 1: the byte 0xe9 is not UTF-8"):
        load_pool(latin)


def test_a_file_with_one_slash_in_its_path_is_no_hub_data_set(write, monkeypatch, tmp_path):
    (tmp_path / "some").mkdir()
    Path(write([ROME], ".jsonl")).rename(tmp_path / "some/counterfact")
    monkeypatch.chdir(tmp_path)
    assert load_pool("some/counterfact").facts == load_pool(Path("some/counterfact")).facts


def test_a_hub_data_set_is_read_with_its_config_and_revision(hub):
    assert read_pool("some/counterfact", "abc", "default").facts == (DARRIEUX,)
    assert read_pool("some/counterfact", "abc").facts == (DARRIEUX,)
    assert hub == [("some/counterfact", "default", "train", "abc"), ("some/counterfact", None, "train", "abc")]
    with pytest.raises(
        RetentionBenchError, match="'some/other' at revision abc, split 'train', cannot be read .*give a local"
    ):
        read_pool("some/other", "abc")
    with pytest.raises(UsageError, match="'some/counterfact' needs a `revision`"):
        read_pool("some/counterfact")


# The real files


def test_the_ten_thousand_edits_all_get_a_relation(real_data):
    pool = load_pool(str(real_data("counterfact_edit.json")))
    assert pool.rows.to_json() == {
        "format": "EasyEdit's", "read": 10_000, "dropped": {}, "relations": 24, "recovered": 10_000
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
