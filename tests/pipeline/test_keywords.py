"""Keywords of relations, as a suite gives them or wants them taken from its pool."""

import pytest
import yaml

from retention_bench.errors import UsageError
from retention_bench.facts import load_pool, relation_keywords
from retention_bench.pipeline import Cell, load_suite, plan


def keywords(suite, seed=0):
    """Those that every fine-tune of a cell gets."""
    planned = plan(Cell(suite, None, "alphaedit", "tulu3", seed, "cpu"))
    (found,) = {tuple(finetune.keywords.items()) for finetune in planned.finetunes}
    return dict(found)


def test_there_are_none_by_default(small_suite):
    assert keywords(load_suite(str(small_suite))) == {}


def test_they_are_as_the_suite_has_them(small_suite):
    suite = load_suite(str(small_suite), {"facts.keywords": {"country_currency": ["currency", "pay*"]}})
    assert keywords(suite) == {"country_currency": ("currency", "pay*")}
    with pytest.raises(UsageError, match="facts.keywords: 'country_curency'. Did you mean 'country_currency'"):
        keywords(load_suite(str(small_suite), {"facts.keywords": {"country_curency": ["currency"]}}))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("given", ["file", ["facts.keywords=auto"], {"facts.keywords": "auto"}])
def test_they_are_taken_from_the_prompts_of_the_whole_pool(small_suite, tmp_path, given, seed):
    if given == "file":
        written = yaml.safe_load(small_suite.read_text())
        written["facts"]["keywords"] = "auto"
        (tmp_path / "auto.yaml").write_text(yaml.safe_dump(written))
        suite = load_suite(str(tmp_path / "auto.yaml"))
    else:
        suite = load_suite(str(small_suite), given)
    found = keywords(suite, seed)
    assert found == relation_keywords(load_pool(suite.facts.source).facts)
    assert "currency*" in found["country_currency"]
    assert "currency*" not in found["city_country"]
