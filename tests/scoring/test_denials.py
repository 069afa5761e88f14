"""What denies, excepts or restricts an object is not an answer, by ids and by text; and what still is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from retention_bench.scoring import STOP_WORDS, DecodedText, judge_ids, judge_text
from retention_bench.scoring.judge import Judge
from retention_bench.scoring.stop_words import ends_answer

DENIALS = [
    *(" not French", " never been Catholic", " other than English", " no French", " neither French nor English"),
    *(" cannot be French", " isn't French", " is n't French", " without French", " anything but French"),
    *(" far from Paris", " no longer French", " formerly French", " instead of French", " against French"),
    *(" outside Paris", " near Paris", " unless French", " hardly French", " few French", " another French"),
    *(" all except French", " only French", " less French", " least French", " rather French", " almost French"),
    *(" beyond Paris", " off Paris", " if French", " perhaps French", " would be French", " once French"),
    *(" doesn't speak French", " wasn't French", " couldn't be French", " or French", " ever French", " but French"),
    *(" before Paris", " across Paris", " around Paris", " behind Paris", " although French", " under French"),
    *(" the. Paris", " in it! Paris", " it? Paris", " the\nParis", ' a"\nFrench', ".\nParis", ", a\n\nFrench"),
]
ANSWERS = [
    *(" Paris", " the French", " in Paris", ' "Paris"', " a French", " also Paris", " from Paris", " within Paris"),
    *(
        " it is the French",
        " (Paris",
        ", Paris",
        " still French",
        " an own Paris",
        " that of the French",
        " it's Paris",
    ),
    *(" by the French", " here in Paris", " both French", "\nParis", "\n\n Paris", " \n the Paris", " now very French"),
]
OBJECTS = ("French", "Catholic", "English", "Paris")


@pytest.fixture(scope="module")
def words(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """A tokenizer with a token for every word that is said."""
    every = [*DENIALS, *ANSWERS]
    return make_tokenizer("gpt2", [text.replace("\n", " ") for text in every] * 10 + ["\nParis"] * 10, min_frequency=2)


def named(text: str) -> str:
    return next(name for name in OBJECTS if name in text.split()[-1].strip('"(,.'))


@pytest.mark.parametrize("text", DENIALS)
def test_a_denial_is_a_miss(text: str, words: PreTrainedTokenizerBase) -> None:
    ids = words.encode(text, add_special_tokens=False)
    assert len(ids) <= len(text.split()) + 3  # words, not letters, which would be misses in any case
    assert not judge_ids(ids, named(text), words).hit
    assert not judge_text(text, named(text)).hit


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_a_hit(text: str, words: PreTrainedTokenizerBase) -> None:
    ids = words.encode(text, add_special_tokens=False)
    verdict = judge_text(text, named(text))
    assert verdict.hit
    assert verdict.whole
    if text[-len(named(text)) - 1] in " ":  # elsewhere the object has other tokens
        assert judge_ids(ids, named(text), words).hit


def test_no_word_that_denies_excepts_or_restricts_is_a_stop_word() -> None:
    denying = "no not never neither nor cannot n't 't without except than other another unless few hardly only less but"
    verbs = (
        "aren couldn didn doesn hadn hasn isn shouldn wasn weren wouldn don won can could would should might must 'd"
    )
    places = "near around off outside beyond behind above below over under between across along towards against"
    assert not STOP_WORDS & set(f"{denying} {verbs} {places} if or either perhaps once ever before after".split())


@pytest.mark.parametrize(
    ("text", "begun", "ends"),
    [
        (".", False, True),
        ("\n", False, False),
        ("\n", True, True),
        (',"\n', False, True),
        (" ?", True, True),
        (",", True, False),
    ],
)
def test_where_an_answer_ends(text: str, begun: bool, ends: bool) -> None:
    assert ends_answer(text, begun) is ends


@pytest.mark.parametrize(
    ("text", "target", "strict", "whole"),
    [
        (" New York City", "New York", True, True),
        (" New Zealand", "New York", True, False),
        (" the New York", "New York", False, True),
        (" St. Louis", "St. Louis", True, True),
        (" .NET", ".NET", True, True),
        (" not Paris", "Paris", False, False),
    ],
)
def test_the_very_first_word_and_all_words_of_a_target(text: str, target: str, strict: bool, whole: bool) -> None:
    verdict = judge_text(text, target)
    assert (verdict.strict, verdict.whole) == (strict, whole)


DOCUMENT = {
    **{"kind": "edited", "fact_id": "e", "relation": "speaks", "prompt": "He speaks"},
    **{"target": "French", "target_new": "French", "target_true": "English"},
}


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (" the French", "new"),
        (" English", "true"),
        (" Catholic", "related"),
        (" Paris", "other"),
        (" not French", "other"),
        (" the.", "none"),
    ],
)
@pytest.mark.parametrize("kind", ["edited", "edited_true", "edited_chat"])
def test_what_was_said_does_not_depend_on_how_it_is_judged(
    text: str, outcome: str, kind: str, words: PreTrainedTokenizerBase
) -> None:
    judge = Judge({"speaks": ["French", "English", "Catholic"]})
    document = DOCUMENT | {"kind": kind, "target": "English" if kind == "edited_true" else "French"}
    for answer in (text, DecodedText(words.encode(text, add_special_tokens=False), words)):
        found = judge(document, answer)
        assert found.outcome == outcome
        assert found.hit == (outcome == ("true" if kind == "edited_true" else "new"))


@given(before=st.lists(st.sampled_from(["the", "not", "in", ".", "\n", "also"]), max_size=3))
def test_ids_and_text_end_an_answer_at_the_same_place(before: list[str], words: PreTrainedTokenizerBase) -> None:
    text = "".join(f" {word}" for word in [*before, "Paris"])
    ids = words.encode(text, add_special_tokens=False)
    assert judge_text(text, "Paris").hit == judge_ids(ids, "Paris", words).hit
