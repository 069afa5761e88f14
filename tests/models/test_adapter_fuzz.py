"""An adapter's configuration with anything in it: a line that says what is wrong, or what peft makes of it."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

from retention_bench.errors import RetentionBenchError
from retention_bench.models import Checkpoint
from retention_bench.models.loading import read_model

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])
FIELDS = (
    "peft_type r lora_alpha target_modules exclude_modules use_rslora use_dora fan_in_fan_out bias init_lora_weights "
    "rank_pattern alpha_pattern layers_to_transform layers_pattern modules_to_save layer_replication "
    "alora_invocation_tokens base_model_name_or_path revision task_type lora_dropout target_parameters lora_bias "
    "trainable_token_indices loftq_config corda_config eva_config megatron_config auto_mapping inference_mode"
).split()
NUMBERS = st.one_of(st.integers(-3, 9), st.sampled_from([10**9, 2**63, -(2**40)]), st.floats(allow_nan=False, width=32))
NAMES = st.sampled_from(
    ["q_proj", "down_proj", "lm_head", "all-linear", ".*", "(", "LORA", "IA3", "pissa", "", "é", "a" * 300]
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, NAMES)
VALUES = st.one_of(PLAIN, st.lists(PLAIN, max_size=3), st.dictionaries(NAMES, PLAIN, max_size=2))
CHANGES = st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_tokenizer, make_model):
    """A tiny Llama and a LoRA adapter for it."""
    root = tmp_path_factory.mktemp("fuzz")
    tokenizer = make_tokenizer("llama", ["red green blue small large round"] * 9, vocab_size=300)
    make_model("llama", tokenizer, std=0.3).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(read_model(root / "base", dtype=torch.float32), config).save_pretrained(root / "adapter")
    return root


def check(saved: Path, change: dict) -> None:
    folder = saved / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    began = time.monotonic()
    try:
        model, _ = Checkpoint(str(saved / "base"), adapter=str(folder)).load()
    except RetentionBenchError as error:
        said = str(error)
    else:
        said = ""
    assert time.monotonic() - began < 30  # it is some hundredths of a second; the machine may be busy
    event("refused" if said else "put on")
    assert "\n" not in said
    if said:
        return
    theirs = PeftModel.from_pretrained(read_model(saved / "base", dtype=torch.float32), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)


COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@settings(max_examples=30, derandomize=True, **COMMON)
@given(CHANGES)
def test_any_configuration_is_an_error_in_one_line_or_what_peft_makes_of_it(saved, change):
    check(saved, change)


@pytest.mark.slow
@settings(max_examples=300, **COMMON)
@given(CHANGES)
def test_fuzz_at_length(saved, change):
    check(saved, change)
