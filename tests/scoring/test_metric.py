"""The stop-word rules, the metric on ids and on text, and where the two differ."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from retention_bench.errors import RetentionBenchError
from retention_bench.facts import Fact, FactSet, target_token
from retention_bench.scoring import (
    MAX_DECODED_TOKENS,
    STOP_WORDS,
    DecodedText,
    Verdict,
    check_targets,
    is_scorable,
    is_stop_token,
    judge_ids,
    judge_text,
    tasks_dir,
)
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
    assert judge_ids(decoded, "東京", spaced_tokenizer) == Verdict(hit=True, content_token=east, skipped=1)
    assert is_stop_token(lone, spaced_tokenizer)


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
    assert judge_ids([the, end, paris], "Paris", llama_tokenizer) == Verdict(hit=False, content_token=None, skipped=1)


def test_the_limit_on_decoded_tokens(gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    the, paris = ids(" the Paris", gpt2_tokenizer)
    last = [the] * (MAX_DECODED_TOKENS - 1) + [paris]
    assert judge_ids(last, "Paris", gpt2_tokenizer).hit
    late = judge_ids([the, *last], "Paris", gpt2_tokenizer)
    assert late == Verdict(hit=False, content_token=None, skipped=MAX_DECODED_TOKENS)


@given(stops=st.integers(0, MAX_DECODED_TOKENS - 1), tail=st.lists(st.integers(0, 300), max_size=4))
def test_stop_tokens_before_and_any_tokens_after_the_answer_change_nothing(
    stops: int, tail: list[int], gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    the, paris = ids(" the Paris", gpt2_tokenizer)
    verdict = judge_ids([the] * stops + [paris, *tail], "Paris", gpt2_tokenizer)
    assert verdict == Verdict(hit=True, content_token=paris, skipped=stops)


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
    ],
)
def test_text_is_judged_by_its_first_content_word(text: str, target: str, hit: bool) -> None:
    assert judge_text(text, target) is hit


def test_words_that_share_a_first_token_hit_by_ids_and_miss_by_text(gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    guatemala = ids(" Guatemala", gpt2_tokenizer)
    assert gpt2_tokenizer.decode(guatemala[:1]) == " Gu"
    assert judge_ids(guatemala, "Guinea", gpt2_tokenizer).hit
    assert not judge_text(" Guatemala", "Guinea")


def test_a_word_right_after_a_line_end_misses_by_ids_and_hits_by_text(gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    assert not judge_ids(ids("\nParis", gpt2_tokenizer), "Paris", gpt2_tokenizer).hit
    assert judge_text("\nParis", "Paris")


@given(
    before=st.lists(st.sampled_from(["the", "of", ",", '"', "\n", "is"]), max_size=4),
    answer=st.sampled_from(["Paris", "Rome"]),
)
def test_ids_and_text_agree_on_whole_words(
    before: list[str], answer: str, gpt2_tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "".join(f" {word}" for word in [*before, answer])
    for target in ("Paris", "Rome", "Berlin"):
        assert judge_text(text, target) == judge_ids(ids(text, gpt2_tokenizer), target, gpt2_tokenizer).hit


def test_decoded_text_is_its_text_and_keeps_its_ids(llama_tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = [*ids(" the Paris", llama_tokenizer), llama_tokenizer.eos_token_id]
    answer = DecodedText(tokens, llama_tokenizer)
    assert answer == " the Paris"
    assert answer.token_ids == tuple(tokens)


# --- targets that can never be found --------------------------------------------------------------------------------


def fact(target: str, **more: object) -> Fact:
    return Fact(id="nl-1", subject="it", relation="seat", prompt="The seat of {} is", target_true=target, **more)


@pytest.mark.parametrize("target", ["The Hague", "the", "Thebes", "...", "<|end|>"])
def test_targets_that_begin_with_a_stop_or_special_token_are_refused(
    target: str, llama_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert not is_scorable(target, llama_tokenizer)
    with pytest.raises(RetentionBenchError, match=re.escape(target)) as error:
        check_targets(FactSet.of([fact(target)]), llama_tokenizer)
    assert "'nl-1'" in str(error.value)
    assert "leave the fact out" in str(error.value)


def test_unknown_targets_are_refused_because_they_all_look_alike(spaced_tokenizer: PreTrainedTokenizerBase) -> None:
    assert is_scorable("Paris", spaced_tokenizer)
    assert not is_scorable("Q", spaced_tokenizer)


def test_the_true_target_of_an_edited_fact_counts_only_where_it_is_asked(
    gpt2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    check_targets(FactSet.of([fact("The Hague", target_new="Paris")]), gpt2_tokenizer)
    with pytest.raises(RetentionBenchError, match="The Hague"):
        check_targets(FactSet.of([fact("The Hague", target_new="Paris", neighborhood=("It lies in",))]), gpt2_tokenizer)


def test_the_rules_for_users_name_every_stop_word() -> None:
    readme = (tasks_dir() / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```text stop-words\n(.*?)```", readme, flags=re.DOTALL)
    assert block is not None
    assert set(block[1].split()) == STOP_WORDS
