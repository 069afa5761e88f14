"""Paraphrases that an instruct model writes: the beginning of a sentence, reworded, up to right before its object.

Of each line of its answer only what can stand as a prompt is kept. Facts with too few prompts are asked for again, a
bounded number of times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from retention_bench.data.clock import strftime_now
from retention_bench.display.progress import Progress, silent
from retention_bench.errors import RetentionBenchError
from retention_bench.facts.fact import Fact

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUNDS = 8
"""How often a fact is asked for before it is given up."""

BATCH = 16
"""Facts that are asked for together."""

SPARE = 3
"""Lines that are asked for beyond those wanted."""

TOKENS = 40
"""Tokens that a line may have."""

SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 0}

_MARKER = re.compile(r"^\s*(?:[-*•]|\(?\d+[.):])\s*")
_BLANK = re.compile(r"(?:\s|_|…|\.{2,}|\[[^\[\]]*\]|<[^<>]*>)+$")
_QUOTES = '"“”„«»`*'


def write_paraphrases(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    count: int,
    *,
    seed: int,
    name: str,
    had: Mapping[str, Sequence[str]],
    progress: Progress = silent,
) -> dict[str, tuple[str, ...]]:
    """Let an instruct model write paraphrases of facts' prompts.

    It is asked in its chat template where it has one. The global random generators are left as they were.

    Args:
        model: An instruct model.
        tokenizer: Its tokenizer.
        facts: The facts.
        count: Prompts for each, with those that it has.
        seed: Seed of the sampling.
        name: The model's name, for errors.
        had: By fact id prompts that it has already, which come first.
        progress: Told how many facts are done.

    Returns:
        By fact id its prompts.

    Raises:
        RetentionBenchError: After `ROUNDS` rounds a fact has too few, or its question does not fit into the model's
            context; the fact is named.
    """
    import torch

    found: dict[str, list[str]] = {fact.id: list(had.get(fact.id, ())) for fact in facts}
    answers: dict[str, str] = {}
    devices = range(torch.cuda.device_count()) if model.device.type == "cuda" else ()
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        for _ in range(ROUNDS):
            todo = [fact for fact in facts if len(found[fact.id]) < count]
            for start in range(0, len(todo), BATCH):
                batch = todo[start : start + BATCH]
                for fact, answer in zip(batch, _answers(model, tokenizer, batch, count + SPARE), strict=True):
                    answers[fact.id] = answer
                    mine = found[fact.id]
                    there = {prompt.casefold() for prompt in mine}
                    mine += [prompt for prompt in usable_prompts(answer, fact) if prompt.casefold() not in there]
                done = sum(len(prompts) >= count for prompts in found.values())
                progress("paraphrases", done, len(facts))
    for fact in facts:
        if len(found[fact.id]) < count:
            own = len(had.get(fact.id, ()))
            raise RetentionBenchError(
                f"Fact {fact.id!r}: in {ROUNDS} rounds {name} wrote {len(found[fact.id]) - own} usable paraphrases, "
                f"and {count - own} are wanted. They must contain {fact.subject!r} once and break off before the "
                f"object. Its last answer began {answers[fact.id].strip()[:80]!r}. Name a more able instruct model, "
                "ask for fewer, or give the source own or template."
            )
    return {fact.id: tuple(found[fact.id][:count]) for fact in facts}


def usable_prompts(answer: str, fact: Fact) -> list[str]:
    """The lines of a model's answer that can be prompts of a fact.

    List markers, quotes and a gap at the end are taken off, and so is the object where a line is a whole sentence. What
    is left is kept if it has the subject once, as the fact writes it, names no object, and ends with a word that is not
    the subject, so that an object can follow.

    Args:
        answer: What the model wrote.
        fact: The fact.

    Returns:
        Prompts with `{}` once, different from each other and from the fact's own.
    """
    prompts: dict[str, str] = {fact.prompt.casefold(): fact.prompt}
    for line in answer.rpartition("</think>")[2].splitlines():
        prompt = _prompt(line, fact)
        if prompt is not None:
            prompts.setdefault(prompt.casefold(), prompt)
    return list(prompts.values())[1:]


def _prompt(line: str, fact: Fact) -> str | None:
    """One line as a prompt, or None."""
    objects = "|".join(re.escape(text) for text in (fact.target_true, fact.target_new) if text)
    text = _BLANK.sub("", _MARKER.sub("", line).strip().strip(_QUOTES))
    whole = re.sub(rf"(?<!\w)(?:{objects})[\s.!'{_QUOTES}]*$", "", text, flags=re.IGNORECASE)
    if whole == text and text.endswith((".", "!", "?")):
        return None  # a complete sentence
    text = _BLANK.sub("", whole).rstrip(_QUOTES + " ")
    named = re.search(rf"(?<!\w){re.escape(fact.subject)}(?!\w)", text)
    if named is None or text.count(fact.subject) != 1 or "{}" in text:
        return None
    prompt = text.replace(fact.subject, "{}")
    around = prompt.replace("{}", " ")
    if re.search(rf"(?<!\w)(?:{objects})(?!\w)", around, re.IGNORECASE):
        return None
    fits = prompt.count("{}") == 1 and prompt[-1].isalnum()
    return prompt if fits else None


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], lines: int
) -> list[str]:
    """What the model writes for each of some facts, sampled together."""
    rows = [_question(tokenizer, fact, lines) for fact in facts]
    room = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(row) for row in rows)
    if room is not None and longest + TOKENS > room:
        fact = facts[[len(row) for row in rows].index(longest)]
        raise RetentionBenchError(
            f"Fact {fact.id!r}: to ask for its paraphrases takes {longest} tokens, and {TOKENS} at least for the "
            f"answer, and the model's context has {room}. Name a model with a longer one."
        )
    inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
    wanted = TOKENS * lines
    generate: Any = model.generate
    written = generate(
        **inputs,
        max_new_tokens=wanted if room is None else min(wanted, room - longest),
        pad_token_id=tokenizer.pad_token_id,
        **SAMPLING,
    )
    return [str(text) for text in tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)]


def _question(tokenizer: PreTrainedTokenizerBase, fact: Fact, lines: int) -> list[int]:
    """Token ids of what the model is asked. It is told the true object: the new one might seem wrong to it."""
    text = (
        f'A sentence begins with "{fact.question}", and the next word is "{fact.target_true}". Write {lines} other '
        "beginnings that mean the same in different words. Each must contain the name "
        f'"{fact.subject}" exactly once, spelled the same, and must break off right before "{fact.target_true}", so '
        f'that "{fact.target_true}" could follow as the next word. Do not write "{fact.target_true}" itself. Write one '
        "beginning on each line, without numbers and without anything else."
    )
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(f"{text}\n\n"))
    # Models that think aloud are told not to; other templates do not look at the switch.
    rendered: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        enable_thinking=False,
        strftime_now=strftime_now,
    )
    return list(rendered["input_ids"])
