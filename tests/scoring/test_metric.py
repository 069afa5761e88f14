"""The stop-word rules, the metric on ids and on text, and where the two differ."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from retention_bench.facts import Fact, FactSet, first_tokens, object_ids, target_token
from retention_bench.scoring import (
    MAX_ANSWER_TOKENS,
    MAX_DECODED_TOKENS,
    STOP_WORDS,
    DecodedText,
    Verdict,
    describe_left_out,
    is_stop_token,
    judge_ids,
    judge_text,
    scorable,
    tasks_dir,
)
from retention_bench.scoring.metric import NOT_FOUND, SAME, TOO_LONG, TOO_SHORT, is_short
from retention_bench.scoring.stop_words import is_stop_text


def ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


# --- stop texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        " the",
        "The",
        "OF",
        "a",
        "'s",
        "\N{RIGHT SINGLE QUOTATION MARK}s",
        " ",
        "\n",
        "\n\n",
        "",
        '"',
        " (",
        "...",
        "—",
        "€",
        "🙂",
    ],
)
def test_function_words_punctuation_and_white_space_are_skipped(text: str) -> None:
    assert is_stop_text(text)


@pytest.mark.parametrize(
    "text", [" Paris", "x", "S", "7", "²", " May", "US", "Will", "One", "東", "ा", "\N{REPLACEMENT CHARACTER}"]
)
def test_whatever_can_belong_to_an_answer_is_content(text: str) -> None:
    assert not is_stop_text(text)


def test_the_list_is_in_the_form_it_is_looked_up_in() -> None:
    assert {word.strip().casefold() for word in STOP_WORDS} == STOP_WORDS
    assert {word for word in STOP_WORDS if len(word) == 1} == {"a", "i"}


NO_STOP_WORDS = """
zero one two three four five six seven eight nine ten first second third hundred million
january february march april may june july august september october november december
monday tuesday wednesday thursday friday saturday sunday will mark grace us uk mine like north south new
"""


def test_nothing_that_can_be_an_answer_is_in_the_list() -> None:
    assert not STOP_WORDS & set(NO_STOP_WORDS.split())


@given(st.text(max_size=12))
def test_case_and_surrounding_space_do_not_matter(text: str) -> None:
    assert is_stop_text(f" {text}\n") == is_stop_text(text)
    assert is_stop_text(text.casefold()) == is_stop_text(text)


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_a_fragment_of_a_character_is_content(gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    first, *rest = ids("東", gpt2_tokenizer)
    assert rest
    assert not is_stop_token(first, gpt2_tokenizer)


def test_special_tokens_are_not_stop_tokens(llama_tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("<|begin|>", "<|end|>", "<|turn|>", "<||>"):
        assert not is_stop_token(llama_tokenizer.convert_tokens_to_ids(text), llama_tokenizer)


@pytest.mark.parametrize("name", ["gpt2_tokenizer", "llama_tokenizer"])
def test_the_target_token_is_the_one_behind_a_prompt(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    prompt = ids("The capital of France is", tokenizer)
    for target in ("Paris", "Guinea", "Rome , Italy"):
        behind = ids(f"The capital of France is {target}", tokenizer)
        assert behind[: len(prompt)] == prompt
        assert target_token(target, tokenizer) == behind[len(prompt)]


def test_the_target_token_under_a_tokenizer_that_adds_its_own_space(spaced_tokenizer: PreTrainedTokenizerBase) -> None:
    assert spaced_tokenizer.convert_ids_to_tokens(ids("is Paris", spaced_tokenizer)) == ["▁is", "▁Paris"]
    assert spaced_tokenizer.convert_ids_to_tokens(ids(" Paris", spaced_tokenizer))[0] != "▁Paris"  # the trap
    assert target_token("Paris", spaced_tokenizer) == spaced_tokenizer.convert_tokens_to_ids("▁Paris")


def test_a_lone_leading_space_is_passed_over_on_both_sides(spaced_tokenizer: PreTrainedTokenizerBase) -> None:
    lone, east, *_ = decoded = spaced_tokenizer.convert_tokens_to_ids(["▁", "東", "京"])
    assert target_token("東京", spaced_tokenizer) == east
    assert judge_ids(decoded, "東京", spaced_tokenizer) == Verdict(True, east, 1, strict=True, whole=True)
    assert is_stop_token(lone, spaced_tokenizer)


def test_a_number_behind_a_lone_space_begins_with_its_first_digit(digit_tokenizer: PreTrainedTokenizerBase) -> None:
    space, *digits = ids(" 1984", digit_tokenizer)
    assert digit_tokenizer.decode([space]) == " "
    assert first_tokens("1984", digit_tokenizer) == ((space,), digits[0])
    assert object_ids("1984", digit_tokenizer) == [space, *digits]
    assert first_tokens("Paris", digit_tokenizer) == ((), *ids(" Paris", digit_tokenizer))
    assert judge_ids([space, *digits], "1984", digit_tokenizer).hit


# --- judging ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generated", "skipped"),
    [
        (" Paris", 0),
        (" the city", None),
        (" the Paris", 1),
        ("\n The Paris", 2),
        (", of Paris", 2),
        (" '", None),
        ("", None),
    ],
)
def test_the_first_token_past_stop_tokens_decides(
    generated: str, skipped: int | None, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    verdict = judge_ids(ids(generated, gpt2_tokenizer), "Paris", gpt2_tokenizer)
    assert verdict.hit == (skipped is not None)
    if skipped is not None:
        assert verdict.skipped == skipped
        assert verdict.content_token == target_token("Paris", gpt2_tokenizer)


def test_what_follows_the_first_content_token_does_not_count(gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    assert judge_ids(ids(" Paris Rome", gpt2_tokenizer), "Paris", gpt2_tokenizer).hit
    assert not judge_ids(ids(" Paris Rome", gpt2_tokenizer), "Rome", gpt2_tokenizer).hit


@pytest.mark.parametrize("special", ["<|begin|>", "<|end|>", "<|turn|>", "<||>"])
def test_a_special_token_ends_the_decoding(special: str, llama_tokenizer: PreTrainedTokenizerBase) -> None:
    the, paris = ids(" the Paris", llama_tokenizer)
    end = llama_tokenizer.convert_tokens_to_ids(special)
    assert judge_ids([the, end, paris], "Paris", llama_tokenizer) == Verdict(False, None, 1, strict=False, whole=False)


def test_the_limit_on_decoded_tokens(gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    the, paris = ids(" the Paris", gpt2_tokenizer)
    last = [the] * (MAX_DECODED_TOKENS - 1) + [paris]
    assert judge_ids(last, "Paris", gpt2_tokenizer).hit
    late = judge_ids([the, *last], "Paris", gpt2_tokenizer)
    assert late == Verdict(False, None, MAX_DECODED_TOKENS, strict=False, whole=False)


@given(stops=st.integers(0, MAX_DECODED_TOKENS - 1), tail=st.lists(st.integers(0, 300), max_size=4))
def test_stop_tokens_before_and_any_tokens_after_the_answer_change_nothing(
    stops: int, tail: list[int], gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    the, paris = ids(" the Paris", gpt2_tokenizer)
    verdict = judge_ids([the] * stops + [paris, *tail], "Paris", gpt2_tokenizer)
    assert verdict == Verdict(True, paris, stops, strict=not stops, whole=True)


# --- judging text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "target", "hit"),
    [
        (" Paris.", "Paris", True),
        (" the city", "Paris", False),
        (' the "Paris"', "Paris", True),
        ("\n\nParis", "Paris", True),
        (" It's Paris's", "Paris", True),
        (" paris", "Paris", False),
        (" Parisian", "Paris", False),
        (" New Zealand", "New York", True),
        (" The Hague", "The Hague", True),
        (" the of", "Paris", False),
        ("", "Paris", False),
        (" 1984,", "1984", True),
        (" Par\N{REPLACEMENT CHARACTER}", "Par", False),
        (" Perú", "Peru\N{COMBINING ACUTE ACCENT}", True),
    ],
)
def test_text_is_judged_by_its_first_content_word(text: str, target: str, hit: bool) -> None:
    assert judge_text(text, target).hit is hit


def test_words_that_share_a_first_token_hit_by_ids_and_miss_by_text(gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    guatemala = ids(" Guatemala", gpt2_tokenizer)
    assert gpt2_tokenizer.decode(guatemala[:1]) == " Gu"
    assert judge_ids(guatemala, "Guinea", gpt2_tokenizer).hit
    assert not judge_text(" Guatemala", "Guinea").hit


def test_a_word_right_after_a_line_end_misses_by_ids_and_hits_by_text(gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    assert not judge_ids(ids("\nParis", gpt2_tokenizer), "Paris", gpt2_tokenizer).hit
    assert judge_text("\nParis", "Paris").hit


@given(
    before=st.lists(st.sampled_from(["the", "of", ",", '"', "\n", "is"]), max_size=4),
    answer=st.sampled_from(["Paris", "Rome"]),
)
def test_ids_and_text_agree_on_whole_words(
    before: list[str], answer: str, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "".join(f" {word}" for word in [*before, answer])
    for target in ("Paris", "Rome", "Berlin"):
        assert judge_text(text, target).hit == judge_ids(ids(text, gpt2_tokenizer), target, gpt2_tokenizer).hit


def test_decoded_text_is_its_text_and_keeps_its_ids(llama_tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = [*ids(" the Paris", llama_tokenizer), llama_tokenizer.eos_token_id]
    answer = DecodedText(tokens, llama_tokenizer)
    assert answer == " the Paris"
    assert answer.token_ids == tuple(tokens)


# --- facts that the metric cannot tell -------------------------------------------------------------------------------


def fact(target: str, **more: object) -> Fact:
    return Fact(
        **{"id": "nl-1", "subject": "it", "relation": "seat", "prompt": "The seat of {} is"} | more, target_true=target
    )


def reason(one: Fact, tokenizer: PreTrainedTokenizerBase, **settings: int) -> str | None:
    """Why the only fact is left out; None if it is not."""
    kept, left_out = scorable(FactSet.of([one]), tokenizer, **settings)
    assert len(kept) == (not left_out)
    assert all(ids == (one.id,) for ids in left_out.values())
    return next(iter(left_out), None)


@pytest.mark.parametrize("target", ["The Hague", "the", "Thebes", "...", "<|end|>", '"Paris"'])
def test_targets_that_begin_with_a_stop_or_special_token_cannot_be_found(
    target: str, llama_tokenizer: PreTrainedTokenizerBase
) -> None:
    for one in (fact(target), fact(target, target_new="Paris"), fact("Paris", target_new=target)):
        assert reason(one, llama_tokenizer) == NOT_FOUND


def test_unknown_targets_all_look_alike(spaced_tokenizer: PreTrainedTokenizerBase) -> None:
    assert reason(fact("Paris"), spaced_tokenizer) is None
    assert reason(fact("Q"), spaced_tokenizer) == NOT_FOUND


@pytest.mark.parametrize(
    ("name", "true", "new", "expected"),
    [
        ("gpt2", "Paris", "Paris", SAME),
        ("gpt2", "Guinea", "Guatemala", SAME),  # " Gu" begins both
        ("gpt2", "Paris , Texas", "Paris", SAME),
        ("gpt2", "Guinea", "Paris", None),
        ("gpt2", "Guinea", None, None),
        ("digit", "1984", "1793", TOO_SHORT),
        ("digit", "1984", None, TOO_SHORT),
        ("digit", "Paris", "2001", TOO_SHORT),
        ("digit", "Paris", "Rome", None),
        ("gpt2", "Q", None, TOO_SHORT),
        ("gpt2", "Zanzibar", "Paris", TOO_SHORT),  # cut into letters
        ("gpt2", "東京", "Paris", TOO_SHORT),  # a part of a character
        ("spaced", "東京", "京", None),  # one of thousands
    ],
)
def test_objects_that_the_first_content_token_cannot_tell_are_left_out(
    name: str, true: str, new: str | None, expected: str | None, request: pytest.FixtureRequest
) -> None:
    assert reason(fact(true, target_new=new), request.getfixturevalue(f"{name}_tokenizer")) == expected


@pytest.mark.parametrize(
    ("text", "short"),
    [
        (" 1", True),
        (" S", True),
        ("é", True),
        ("e\N{COMBINING ACUTE ACCENT}", True),
        ("का", True),
        (" O'", True),
        ("\N{REPLACEMENT CHARACTER}", True),
        (" x\N{REPLACEMENT CHARACTER}", True),
        ("ス", True),
        (" 19", False),
        (" Gu", False),
        ("東", False),
        ("한", False),
        ("\N{HANGUL CHOSEONG HIEUH}\N{HANGUL JUNGSEONG A}", False),  # the same syllable in pieces
        (" 東\N{REPLACEMENT CHARACTER}", False),
    ],
)
def test_what_is_one_character(text: str, short: bool) -> None:
    assert is_short(text) is short


@pytest.mark.parametrize("field", ["prompt", "paraphrases", "neighborhood"])
def test_a_prompt_that_does_not_fit_the_context_leaves_its_fact_out(
    field: str, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    words = "city " * 90 + "{} is"
    one = fact("Paris", target_new="Rome", **{field: words if field == "prompt" else (words.replace("{}", "it"),)})
    length = len(gpt2_tokenizer.encode(words.replace("{}", "it")))
    assert reason(one, gpt2_tokenizer) is None
    assert reason(one, gpt2_tokenizer, context=length + MAX_ANSWER_TOKENS) is None
    assert reason(one, gpt2_tokenizer, context=length + MAX_ANSWER_TOKENS - 1) == TOO_LONG


def test_what_is_left_out_is_counted_and_named_and_the_others_keep_their_order(
    gpt2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    alike = [fact("Guinea", id=f"same-{number}", target_new="Guy") for number in range(4)]
    facts = [fact("Rome", id="b"), *alike, fact("The Hague", id="stop"), fact("Paris", id="a")]
    kept, left_out = scorable(FactSet.of(facts), gpt2_tokenizer)
    assert [one.id for one in kept] == ["b", "a"]
    assert left_out == {SAME: ("same-0", "same-1", "same-2", "same-3"), NOT_FOUND: ("stop",)}
    assert describe_left_out(left_out) == (
        f"5 facts are left out (4: {SAME} ('same-0', 'same-1', 'same-2', ...); 1: {NOT_FOUND} ('stop'))"
    )


def test_the_rules_for_users_name_every_stop_word() -> None:
    readme = (tasks_dir() / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```text stop-words\n(.*?)```", readme, flags=re.DOTALL)
    assert block is not None
    assert set(block[1].split()) == STOP_WORDS
