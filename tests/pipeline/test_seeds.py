import pytest

from retention_bench.errors import UsageError
from retention_bench.pipeline.seeds import parse_seeds


@pytest.mark.parametrize(("text", "seeds"), [("0-4", (0, 1, 2, 3, 4)), ("0,2,5", (0, 2, 5)), ("7, 1-2", (7, 1, 2))])
def test_seeds_are_lists_and_ranges(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "3", "4-2", "a", "0-4-6", "1,1", "0-5000", "-1", "0-4294967296", "0,,1", "٣-٤"])
def test_other_seeds_are_refused(text):
    with pytest.raises(UsageError, match="Give"):
        parse_seeds(text)
