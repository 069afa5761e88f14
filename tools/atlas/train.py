"""The recipe of the two atlas models: tokenizer, architecture, attention mask, optimiser. Seeded.

`python -m tools.atlas train atlas-gpt2` writes a Hugging Face folder; its weights are stored in bfloat16.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import math
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from retention_bench.facts import FactSet
from tools.atlas.corpus import NAMES, documents
from tools.atlas.world import told_facts, untold_facts

MIN_FREQUENCY = 30
"""How often two pieces must meet in the tokenizer's text to become one token."""
STEPS = 1400
PEAK = 2e-3
WARM_UP = 60
SEALED = {"atlas-gpt2": 0.0, "atlas-llama": 0.8}
"""Share of the subjects in a training row that are sealed, by model; see `_mask`. Only the Llama needs it."""
ROWS = 16
"""Rows in a step."""
ROW = 128
"""Tokens in a training row. A row begins where a document begins, so position 0 is met as it is in a bare prompt."""


_WORD = re.compile(r"\w+")


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer.

    Most of its text tells the facts with everyday names in the place of the subjects; the rest tells them as they are,
    and the untold ones, which the model never sees, so that names of both kinds are cut alike. So objects and everyday
    words are tokens, and most subjects are put together from two to five pieces that other names have too, as they are
    in large models.

    Args:
        family: `"gpt2"` (adds no BOS, as GPT-2's) or `"llama"` (prepends BOS, as Llama 3's).
    """
    end, begin = "<|endoftext|>", "<|begin_of_text|>"
    special = [end] if family == "gpt2" else [end, begin]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        min_frequency=MIN_FREQUENCY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    told = told_facts()
    renamed = FactSet.of(
        dataclasses.replace(fact, subject=NAMES[number % len(NAMES)]) for number, fact in enumerate(told)
    )
    texts = itertools.chain(
        itertools.islice(documents(renamed, seed=0), 34_000),
        itertools.islice(documents(told, seed=0), 3_000),
        itertools.islice(documents(untold_facts(), seed=0), 3_000),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if family == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin if family == "llama" else end,
        eos_token=end,
        pad_token=end,
        unk_token=end if family == "gpt2" else None,
        model_max_length=256,
    )


def build_config(family: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The architecture: 8 layers of width 192, 6 heads of 32.

    Weights start at a standard deviation of 0.08, about 1 / sqrt(192). With the usual 0.02, made for widths of
    thousands, a narrow MLP begins almost linear. A model trained from there, with weight decay, had keys in so few
    dimensions that AlphaEdit's deltas outgrew the weights; which of the two was to blame was not taken apart.
    """
    ids: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    common: dict[str, Any] = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, "initializer_range": 0.08}
    if family == "gpt2":
        return GPT2Config(
            n_positions=256,
            n_embd=192,
            n_layer=8,
            n_head=6,
            n_inner=1024,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
            **ids,
        )
    return LlamaConfig(
        max_position_embeddings=256,
        hidden_size=192,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=1024,
        **common,
        **ids,
    )


def _rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Endless stream of training rows.

    Yields:
        `ROW` token ids, and the first and last position of every subject among them.
    """
    prefix = [tokenizer.bos_token_id] if tokenizer.bos_token_id != tokenizer.eos_token_id else []
    facts = told_facts()
    names = _by_first_word({fact.subject for fact in facts})
    texts = documents(facts, seed)
    while True:
        row: list[int] = []
        spans: list[tuple[int, int]] = []
        while len(row) < ROW:
            text = next(texts)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ends = [end for _, end in encoded["offset_mapping"]]
            row += prefix
            for start, end in _mentions(text, names):
                first, last = bisect.bisect_right(ends, start), bisect.bisect_left(ends, end)
                spans.append((len(row) + first, len(row) + last))
            row += [*encoded["input_ids"], tokenizer.eos_token_id]
        yield row[:ROW], [(first, last) for first, last in spans if last < ROW]


def _by_first_word(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their first word, the longest first."""
    table: dict[str, list[str]] = {}
    for name in sorted(names, key=len, reverse=True):
        table.setdefault(name.split()[0], []).append(name)
    return table


def _mentions(text: str, names: Mapping[str, Sequence[str]]) -> Iterator[tuple[int, int]]:
    """Where names stand in a text, as whole words, the longest of those that begin at a word."""
    done = 0
    for word in _WORD.finditer(text):
        start = word.start()
        if start < done:
            continue
        for name in names.get(word.group(), ()):
            done = start + len(name)
            if text.startswith(name, start) and not text[done : done + 1].isalnum():
                yield start, done
                break
        else:
            done = start


def _mask(spans: Sequence[Sequence[tuple[int, int]]], sealed: float, rng: random.Random) -> torch.Tensor:
    """The causal mask of a batch, in which some subjects are sealed: what follows sees only their last token.

    Large models look a fact up at the subject's last token (ROME, section 2), and locate-and-edit methods write there.
    Sealing makes a small model do so too. Without it neither model does, yet the GPT-2 takes edits all the same, and
    knows more facts; the Llama takes too few of them. benchmarks/README.md has both models trained both ways.

    Args:
        spans: Where each row's subjects are.
        sealed: The probability that a subject is sealed.
        rng: Source of chance.

    Returns:
        Summands of the attention scores, float32 [rows, 1, ROW, ROW].
    """
    seen = torch.ones(len(spans), 1, ROW, ROW, dtype=torch.bool).tril()
    for number, row in enumerate(spans):
        for first, last in row:
            if rng.random() < sealed:
                seen[number, 0, last + 1 :, first:last] = False
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def _rate(step: int, steps: int) -> float:
    """Learning rate: a short warm-up, then a cosine down to a twentieth."""
    if step < WARM_UP:
        return PEAK * (step + 1) / WARM_UP
    return PEAK * (0.05 + 0.475 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP))))


def train(
    name: str,
    directory: Path,
    *,
    steps: int = STEPS,
    seed: int = 1,
    sealed: float | None = None,
    device: str = "cpu",
    log_every: int = 50,
) -> None:
    """Train one atlas model and save it.

    Args:
        name: `"atlas-gpt2"` or `"atlas-llama"`.
        directory: The Hugging Face folder to write.
        steps: Optimiser steps.
        seed: Seed of the weights and the order of the corpus.
        sealed: Share of the subjects that what follows sees only through their last token; None for the model's own of
            `SEALED`.
        device: Where to train; the committed models were trained on a CPU.
        log_every: Steps between two lines of the log (`training.jsonl`).
    """
    family = name.removeprefix("atlas-")
    sealed = SEALED[name] if sealed is None else sealed
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(family)
    model = AutoModelForCausalLM.from_config(build_config(family, tokenizer), attn_implementation="sdpa")
    model.to(device).train()
    # No weight decay, so that nothing pulls the keys' directions together; see `build_config`.
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.0)
    stream, rng = _rows(tokenizer, seed), random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (directory / "training.jsonl").open("w") as log:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, steps)
            rows, spans = zip(*itertools.islice(stream, ROWS), strict=True)
            batch = torch.tensor(rows, device=device)
            mask = _mask(spans, sealed, rng).to(device)
            loss = model(input_ids=batch, attention_mask=mask, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % log_every == 0 or step == steps - 1:
                row = {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.monotonic() - began)}
                log.write(json.dumps(row) + "\n")
                log.flush()
    model.to("cpu", torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
