import pytest

from retention_bench.errors import UsageError
from retention_bench.finetune import parse_freeze


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("none", (0, 1, 2, 3, 4, 5)),
        ("edited", (0, 3, 4, 5)),
        ("unedited", (1, 2)),
        ("below:4", (4, 5)),
        ("window:3:1", (3,)),
        ("window:3:2", (2, 3)),
        ("window:3:3", (2, 3, 4)),
        ("window:0:5", (0, 1, 2)),
        ("window:1:999999999", (0, 1, 2, 3, 4, 5)),
    ],
)
def test_the_layers_that_are_trained(text, layers):
    assert parse_freeze(text).layers(6, edited=[1, 2]) == layers


@pytest.mark.parametrize(
    "text", ["below:" + "9" * 5000, "window:1:" + "9" * 5000, "below:-1", "x" * 10**6, "below:\u0661"]
)
def test_what_is_no_freeze_is_refused_in_few_words(text):
    with pytest.raises(UsageError, match="is not known. Allowed: none, edited") as refused:
        parse_freeze(text)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("text", ["below:999999999", "window:999999999:1", "window:9:2"])
def test_a_layer_that_the_model_lacks_is_refused(text):
    with pytest.raises(UsageError, match="names one that it lacks"):
        parse_freeze(text).layers(6)


def test_a_model_of_billions_of_layers_is_refused():
    with pytest.raises(UsageError, match="names 10,000,000,000 layers"):
        parse_freeze("none").layers(10**10)
