"""Small tokenizers trained on the spot and tiny random models, for all folders."""

import gc
import os
from collections.abc import Callable, Iterable, Sequence

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes that each use all cores wait for one another; torch reads this when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


def train_tokenizer(
    family: str,
    texts: Iterable[str],
    *,
    pad: str | None = None,
    specials: Sequence[str] = (),
    vocab_size: int = 1000,
    min_frequency: int = 0,
    digits: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE.

    `family` is `"gpt2"`, whose `<|endoftext|>` is BOS, EOS and unknown in one and is put in front of nothing, or
    `"llama"`, whose BOS `<|begin|>` is put in front of every text and whose EOS is `<|end|>`. Neither has a padding
    token unless `pad` gives one; `specials` are further special tokens. With `digits` each digit is a token, and the
    space before a number one of its own, as with Qwen's.
    """
    begin, end = ("<|endoftext|>", "<|endoftext|>") if family == "gpt2" else ("<|begin|>", "<|end|>")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits:
        alone = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*dict.fromkeys([begin, end]), *specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if family == "llama":
        special = (begin, tokenizer.token_to_id(begin))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        unk_token=end if family == "gpt2" else None,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_searched_for_garbage() -> None:
    """What was imported stays. Without this, each full collection, as after every fine-tune, searches all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """See `train_tokenizer`."""
    return train_tokenizer


def random_model(
    family: str, tokenizer: PreTrainedTokenizerFast, *, layers: int = 2, std: float = 0.02
) -> PreTrainedModel:
    """A GPT-2, or a Llama with grouped heads, of width 32; the same weights each time."""
    torch.manual_seed(0)
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": std,
    }
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=layers, n_head=4, **common)).eval()
    config = LlamaConfig(
        max_position_embeddings=64,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        **common,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """See `random_model`."""
    return random_model


GPT = {"n_embd": 16, "n_inner": 24, "n_layer": 4, "n_head": 2, "n_positions": 64}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GROUPED = LLAMA | {"num_key_value_heads": 1, "head_dim": 8}
PHI = LLAMA | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "gemma": GROUPED,
    "gemma2": GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 16, "final_logit_softcapping": 2.0},
    "gemma3_text": GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 16},
    "gpt2": GPT,
    "gpt_neox": LLAMA,
    "gptj": GPT | {"rotary_dim": 4},
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 16},
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "phi": PHI,
    "phi3": PHI,
    "qwen2": LLAMA | {"num_key_value_heads": 1},
    "qwen3": GROUPED,
}
"""What makes a tiny model of each family in `FAMILIES`: 4 layers, d_model 16, d_mlp 24."""


def family_model(family: str, vocabulary: int, **changes: object) -> PreTrainedModel:
    """A tiny random model of a family in `SIZES`, its config changed as asked; the same weights each time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=vocabulary, initializer_range=0.2, **SIZES[family] | changes)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def make_family_model() -> Callable[..., PreTrainedModel]:
    """See `family_model`."""
    return family_model
