"""Small tokenizers trained on the spot, tiny random models, and chats of a few words."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from retention_bench.finetune import make_finetune

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
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
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


def _byte_level(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS), " Say I say <|user|> <|assistant|>"] * 10, trainer)
    return tokenizer


@pytest.fixture
def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that adds no BOS and has no padding token, as GPT-2's."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level([end]), bos_token=end, eos_token=end, unk_token=end)


@pytest.fixture
def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts a BOS in front of every text, as Llama 3's."""
    tokenizer = _byte_level(["<|begin|>", "<|end|>"])
    begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


@pytest.fixture
def gpt2(gpt2_tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    end = gpt2_tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(gpt2_tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def llama(llama_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(llama_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=llama_tokenizer.bos_token_id,
        eos_token_id=llama_tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()
