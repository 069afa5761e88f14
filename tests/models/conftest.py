import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXTS = ["The tower of Arlen stands in the old town.", "Mira Solberg plays the violin.", "Who wrote the book?"]


def tiny_model(family: str, vocabulary: int):
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=4, n_head=2, n_inner=24)
        return GPT2LMHeadModel(config).eval()
    sizes = {
        "vocab_size": vocabulary,
        "max_position_embeddings": 64,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
    }
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@pytest.fixture(params=["gpt2", "llama", "qwen3"])
def model(request):
    return tiny_model(request.param, 300)


@pytest.fixture
def folder(tmp_path, make_tokenizer):
    """A saved tiny Llama with its tokenizer."""
    tokenizer = make_tokenizer("llama", TEXTS, vocab_size=300)
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
