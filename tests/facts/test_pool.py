import json

import pytest

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import read_pool

RECORD = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
}


def test_counterfacts_own_records_become_facts(tmp_path):
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([RECORD]))
    (fact,) = read_pool(str(path))
    assert (fact.id, fact.relation, fact.subject) == ("7", "P103", "Danielle Darrieux")
    assert fact.question == "The mother tongue of Danielle Darrieux is"
    assert (fact.target_true, fact.target_new) == ("French", "English")
    assert fact.neighborhood == ("The mother tongue of Léon Blum is",)


def test_a_record_without_a_field_is_named(tmp_path):
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([RECORD, {"case_id": 8}]))
    with pytest.raises(RetentionBenchError, match="record 2: .*'requested_rewrite'"):
        read_pool(str(path))


def test_a_missing_jsonl_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No facts file"):
        read_pool(str(tmp_path / "none.jsonl"))
