import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from retention_bench.models.families import FAMILIES

TEXTS = ["The tower of Arlen stands in the old town.", "Mira Solberg plays the violin.", "Who wrote the book?"]

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
    "gemma2": GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 16, "final_logit_softcapping": 0.05},
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


def tiny_model(family: str, vocabulary: int):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=vocabulary, initializer_range=0.2, **SIZES[family])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=sorted(FAMILIES))
def model(request):
    return tiny_model(request.param, 300)


@pytest.fixture
def folder(tmp_path, make_tokenizer):
    """A saved tiny Llama with its tokenizer."""
    tokenizer = make_tokenizer("llama", TEXTS, vocab_size=300)
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
