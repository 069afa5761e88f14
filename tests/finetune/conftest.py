"""Tiny random models, and chats of a few words."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from retention_bench.finetune import FinetuneOptions, Terms, make_finetune, train

WORDS = ["red", "green", "blue", "small", "large", "round", "fast", "slow", "old", "new", "warm", "cold", "loud"]


def chat(*turns: str) -> dict[str, Any]:
    """A row whose turns are the user's and the assistant's by turns."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


@pytest.fixture(scope="session")
def chats() -> list[dict[str, Any]]:
    """64 chats of unlike lengths."""
    rng = random.Random(0)
    rows = []
    for _ in range(64):
        words = rng.sample(WORDS, rng.randint(2, 9))
        rows.append(chat(f"Say {' '.join(words)}.", f"I say {', '.join(words[: rng.randint(1, len(words))])}."))
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def source(tmp_path: Path, chats: list[dict[str, Any]]) -> Path:
    return write(tmp_path / "chats.jsonl", chats)


@pytest.fixture
def task(source: Path) -> Callable[..., Any]:
    """Make a small task on `source`; any setting can be given."""

    def make(**settings: Any) -> Any:
        defaults = {
            "source": str(source),
            "train_size": 32,
            "validation_size": 8,
            "batch_size": 8,
            "micro_batch_size": 4,
            "lr": 5e-3,
            "eval_every": 2,
            "threshold": 0.01,
            "max_steps": 4,
            "max_length": 48,
        }
        return make_finetune("tulu3", defaults | settings)

    return make


TEXTS = [" ".join(WORDS), " Say I say <|user|> <|assistant|>"] * 10


@pytest.fixture
def gpt2_tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer("gpt2", TEXTS, vocab_size=400)


@pytest.fixture
def llama_tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer("llama", TEXTS, vocab_size=400)


@pytest.fixture
def gpt2(make_model: Callable[..., PreTrainedModel], gpt2_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return make_model("gpt2", gpt2_tokenizer)


@pytest.fixture
def llama(make_model: Callable[..., PreTrainedModel], llama_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return make_model("llama", llama_tokenizer)


@pytest.fixture
def tune(task, tmp_path):
    """Fine-tune a model on a small task with some settings changed, each time in another folder unless one is given."""
    count = itertools.count()

    def run(model, tokenizer, *, made=None, out=None, terms=None, seed=0, given=None, options=None, **settings):
        return train(
            model,
            tokenizer,
            made or task(**settings),
            terms=terms or Terms(),
            seed=seed,
            output_dir=out or tmp_path / f"work-{next(count)}",
            options=FinetuneOptions(**(options or {})),
            **(given or {}),
        )

    return run
