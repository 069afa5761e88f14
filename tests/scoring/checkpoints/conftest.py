import pytest
import torch
from peft import LoraConfig, get_peft_model

from retention_bench.facts import Fact, FactSet
from retention_bench.models import WeightDelta, load_model

WORDS = "red green blue small large round fast slow old new warm cold loud".split()


@pytest.fixture(scope="module")
def facts():
    return FactSet.of(
        Fact(
            str(n),
            f"{WORDS[n]} {WORDS[-n - 1]}",
            "R",
            "The {} is",
            WORDS[n + 1],
            WORDS[n + 2] if n % 2 else None,
            (f"It is {WORDS[n]} and",) if n % 2 else (),
        )
        for n in range(10)
    )


@pytest.fixture(scope="module")
def zoo(make_tokenizer, make_model, tmp_path_factory):
    """Models of two families, a delta and adapters, and what each should answer."""
    root = tmp_path_factory.mktemp("zoo")
    for family in ("gpt2", "llama"):
        tokenizer = make_tokenizer(family, [" ".join(WORDS), " The It is and " + " ".join(f" {w}" for w in WORDS)] * 9)
        model = make_model(family, tokenizer, std=0.5)
        model.save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        model.save_pretrained(root / f"{family}-tuned")
        tokenizer.save_pretrained(root / f"{family}-tuned")
    name = "transformer.h.0.mlp.c_proj.weight"
    shape = load_model(str(root / "gpt2"))[0].get_parameter(name).shape
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.3
    WeightDelta({name: delta}).save(root / "delta.safetensors")
    WeightDelta({"model.layers.0.mlp.down_proj.weight": torch.ones(32, 64)}).save(root / "other.safetensors")
    for kind, family in (("lora", "gpt2"), ("dora", "llama")):
        targets = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "down_proj"]}[family]
        config = LoraConfig(
            r=4,
            lora_alpha=12,
            use_dora=kind == "dora",
            use_rslora=kind == "lora",
            target_modules=targets,
            alpha_pattern={targets[0]: 3},
            fan_in_fan_out=family == "gpt2",
        )
        adapted = get_peft_model(load_model(str(root / family))[0], config)
        generator = torch.Generator().manual_seed(3)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        adapted.save_pretrained(root / kind)
    return root
