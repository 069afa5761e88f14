import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from retention_bench.facts import Fact, FactSet
from retention_bench.models import WeightDelta, load_model
from retention_bench.pipeline.suite import PACKAGED

WORDS = "red green blue small large round fast slow old new warm cold loud".split()


@pytest.fixture(scope="session")
def small_suite(tmp_path_factory):
    """The atlas suite cut down to a few facts, steps and texts, with two edited models: real, but quick."""
    suite = yaml.safe_load((PACKAGED / "atlas.yaml").read_text())
    suite["facts"] |= {"edited": 6, "intrinsic": 12}
    suite["covariance"] |= {"texts": 200}
    for model in suite["models"].values():
        model["path"] = str((PACKAGED / model["path"]).resolve())
        model["editors"]["alphaedit"] |= {"edits_per_model": 3, "v_num_grad_steps": 8}
        for name in ("ft", "lora"):
            model["editors"][name] |= {"edits_per_model": 3, "num_steps": 5}
        model["finetunes"]["tulu3"] |= {
            "source": str((PACKAGED / model["finetunes"]["tulu3"]["source"]).resolve()),
            "train_size": 96,
            "validation_size": 16,
            "batch_size": 16,
            "max_steps": 6,
            "eval_every": 3,
        }
    for part in ("facts", "covariance"):
        suite[part]["source"] = str((PACKAGED / suite[part]["source"]).resolve())
    path = tmp_path_factory.mktemp("suite") / "small.yaml"
    path.write_text(yaml.safe_dump(suite))
    return path


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
