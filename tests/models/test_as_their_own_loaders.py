"""What is scored has the logits that transformers and peft give to the same files, or is refused by name."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VBLoRAConfig,
)
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import retention_bench
from retention_bench.errors import RetentionBenchError
from retention_bench.models import Checkpoint

from ..checkpoints import (
    EMBEDDINGS,
    GENERATION,
    KINDS,
    LAYOUTS,
    LINEAR,
    family_of,
    head_of_its_own,
    lora,
    make_adapter,
    make_adapter_with_vocabulary,
    theirs,
)

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request, tmp_path_factory, make_tokenizer, make_model):
    """A saved model: a Llama whose head is its own, or a GPT-2 whose head is tied."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(request.param, ["red green blue small large round"] * 9, vocab_size=300)
    make_model(request.param, tokenizer, std=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def assert_as_theirs(checkpoint, expected):
    found = logits(checkpoint.load()[0])
    torch.testing.assert_close(found, logits(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", LAYOUTS, ids=lambda change: change.__name__)
def test_a_folder_is_read_as_transformers_reads_it(base, tmp_path, change):
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    change(folder)
    assert_as_theirs(Checkpoint(str(folder)), theirs(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_too(base, dtype):
    found = logits(Checkpoint(str(base), dtype=dtype).load()[0])
    assert torch.equal(found, logits(theirs(base, dtype)))


@pytest.mark.parametrize("sharded_too", [False, True])
def test_pickles_on_request_alone(base, tmp_path, sharded_too):
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if sharded_too:
        names = sorted(weights)
        where = {}
        for number, part in enumerate((names[::2], names[1::2])):
            torch.save({name: weights[name] for name in part}, folder / f"part-{number}.bin")
            where |= dict.fromkeys(part, f"part-{number}.bin")
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(RetentionBenchError, match="only pickled weights.*--allow-pickle"):
        Checkpoint(str(folder)).load()
    assert_as_theirs(Checkpoint(str(folder), allow_pickle=True), theirs(base))
    if sharded_too:  # nor by a safetensors index that names them
        (folder / "pytorch_model.bin.index.json").rename(folder / "model.safetensors.index.json")
        for allowed in (False, True):
            with pytest.raises(RetentionBenchError, match="which is no .safetensors file beside it"):
                Checkpoint(str(folder), allow_pickle=allowed).load()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_put_on_as_peft_does(base, tmp_path, kind):
    adapter = make_adapter(base, tmp_path / "adapter", lora(base, **KINDS[kind]))
    expected = PeftModel.from_pretrained(theirs(base), adapter).eval()
    if kind == "init-olora" and lora(base).fan_in_fan_out:  # which peft itself cannot merge
        with pytest.raises(RetentionBenchError, match="could not be loaded"):
            Checkpoint(str(base), adapter=str(adapter)).load()
        return
    assert_as_theirs(Checkpoint(str(base), adapter=str(adapter)), expected)
    assert not torch.allclose(logits(expected), logits(theirs(base)), atol=1e-3)


def test_an_adapter_on_a_tied_head_and_on_embeddings(base, tmp_path):
    names = EMBEDDINGS[family_of(base)]
    for number, target in enumerate([names[:1], names[1:], names]):
        config = lora(base, target_modules=target, fan_in_fan_out=False)
        adapter = make_adapter(base, tmp_path / str(number), config)
        # As it was trained; peft's own merge puts the change of one into both.
        expected = PeftModel.from_pretrained(theirs(base), adapter).eval()
        assert_as_theirs(Checkpoint(str(base), adapter=str(adapter)), expected)


def test_a_head_of_its_own_is_no_weight_of_a_model_that_its_configuration_ties(base, tmp_path):
    """A model made from the configuration, as vLLM's, would answer by the embeddings."""
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    head_of_its_own(folder)
    adapter = make_adapter(base, tmp_path / "adapter", lora(base, **KINDS["head"]))
    for checkpoint in (Checkpoint(str(folder)), Checkpoint(str(base), adapter=str(adapter))):
        if family_of(base) == "gpt2":
            with pytest.raises(RetentionBenchError, match="was trained apart from the embeddings"):
                dict(checkpoint)
        else:
            assert torch.equal(dict(checkpoint)["lm_head.weight"], checkpoint.load()[0].lm_head.weight)


@pytest.mark.parametrize("added", [5, -20])
@pytest.mark.parametrize("saved", [False, True])
def test_an_adapter_that_was_trained_with_another_vocabulary(base, tmp_path, added, saved):
    tuned = make_adapter_with_vocabulary(base, tmp_path / "adapter", added, saved=saved)
    assert_as_theirs(Checkpoint(str(base), adapter=str(tmp_path / "adapter")), tuned)


def test_an_adapter_with_half_of_another_vocabulary_is_refused(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", lora(base))
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = torch.zeros(300, 32)
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    if family_of(base) == "llama":
        with pytest.raises(RetentionBenchError, match="has 300 tokens in base_model.model.lm_head, the base model"):
            Checkpoint(str(base), adapter=str(adapter)).load()


def test_other_adapters_that_can_be_merged(base, tmp_path):
    family = family_of(base)
    linear = LINEAR[family]
    config = IA3Config(target_modules=linear, feedforward_modules=linear[1:], fan_in_fan_out=family == "gpt2")
    adapter = make_adapter(base, tmp_path / "ia3", config)
    assert_as_theirs(Checkpoint(str(base), adapter=str(adapter)), PeftModel.from_pretrained(theirs(base), adapter))
    one = "q_proj" if family == "llama" else "attn.c_proj"
    shared = VBLoRAConfig(target_modules=[one], num_vectors=8, vector_length=8, fan_in_fan_out=family == "gpt2")
    adapter = make_adapter(base, tmp_path / "vblora", shared)  # its vectors stand in the file once, for all modules
    assert_as_theirs(Checkpoint(str(base), adapter=str(adapter)), PeftModel.from_pretrained(theirs(base), adapter))
    if family == "llama":  # a rank of 0 is one that the size of blocks gives
        adapter = make_adapter(base, tmp_path / "oft", OFTConfig(target_modules=[one], oft_block_size=4, r=0))
        assert_as_theirs(Checkpoint(str(base), adapter=str(adapter)), PeftModel.from_pretrained(theirs(base), adapter))


def test_an_adapter_in_pickles_on_request_alone(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", lora(base))
    expected = PeftModel.from_pretrained(theirs(base), adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(RetentionBenchError, match="only pickled weights.*--allow-pickle"):
        Checkpoint(str(base), adapter=str(adapter)).load()
    assert_as_theirs(Checkpoint(str(base), adapter=str(adapter), allow_pickle=True), expected)


REFUSED = {
    "random-base": ({"init_lora_weights": "pissa_niter_4"}, "changed the base model"),
    "by-data": ({"init_lora_weights": "corda"}, "changed the base model"),
    "by-gradients": ({"init_lora_weights": "lora_ga"}, "changed the base model"),
    "quantised": ({"init_lora_weights": "loftq"}, "changed the base model"),
    "alora": ({"alora_invocation_tokens": [5, 6]}, "cannot be merged"),
    "file-has-more": ({"layers_to_transform": [0]}, "do not agree on"),
    "file-has-less": ({"target_modules": "all-linear"}, "do not agree on|could not be loaded"),
    "rank": ({"r": 10**9}, "rank of 1000000000"),
    "no-rank": ({"r": 0}, "r is 0, and a rank is 1 or more"),
    "layers-twice": ({"layer_replication": [[0, 2], [0, 2]]}, "uses layers several times"),
    "mixture": ({"peft_type": "XLORA", "adapters": {"0": "/somewhere"}}, "mixes others by the text"),
    "rank-of-text": ({"r": "many"}, "r: Input should be a valid integer"),
    "another-rank": ({"r": 2}, "could not be loaded"),
    "alpha-of-text": ({"lora_alpha": "big"}, "could not be loaded"),
    "alpha-list": ({"lora_alpha": [1]}, "could not be loaded"),
    "no-kind": ({"peft_type": "NOTHING"}, "could not be loaded"),
    "no-pattern": ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    "endless-pattern": ({"alpha_pattern": {"([a-z0-9._]+)+!": 1}}, "takes for ever"),
    "endless-target": ({"target_modules": "([a-z0-9._]+)+!"}, "takes for ever"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_cannot_be_put_on_is_refused_by_name(base, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("retention_bench.models.adapter._MATCHED_WITHIN_S", 1.0)
    change, message = REFUSED[kind]
    adapter = make_adapter(base, tmp_path / "adapter", lora(base))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(RetentionBenchError, match=message):
        Checkpoint(str(base), adapter=str(adapter)).load()


def test_an_adapter_that_is_no_change_of_weights_is_refused(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(RetentionBenchError, match="PROMPT_TUNING.*cannot be merged"):
        Checkpoint(str(base), adapter=str(adapter)).load()
    if family_of(base) == "llama":
        config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
        adapter = make_adapter(base, tmp_path / "between", config)
        with pytest.raises(RetentionBenchError, match="ADAPTION_PROMPT.*peft cannot merge"):
            Checkpoint(str(base), adapter=str(adapter)).load()


@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION)
def test_generation_settings_change_no_logits_and_can_be_saved(base, tmp_path, settings):
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    checkpoint = Checkpoint(str(folder))
    assert_as_theirs(checkpoint, theirs(base))
    checkpoint.load()[0].save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    for name, value in settings.items():
        if name in ("eos_token_id", "repetition_penalty") or settings.get("do_sample"):
            assert getattr(saved, name) == value


CONFIGS = {
    "layers": ({"num_hidden_layers": 10**10, "n_layer": 10**10}, "and 0 to 1000 are built"),
    "less-than-no-layers": ({"num_hidden_layers": -1, "n_layer": -1}, "is -1, and 0 to 1000 are built"),
    "labels": ({"num_labels": 10**9}, "num_labels is 1000000000, and 0 to 1000000 are built"),
    "another-width": (
        {"vocab_size": 100},
        r"weight in .* has the shape \[28\d, 32\], and config.json asks for \[100, 32\]",
    ),
    "memory": ({"vocab_size": 10**12}, "this machine has"),
    "heads": ({"num_attention_heads": 0, "n_head": 0}, "could not be loaded"),
    "quantised": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "are quantised"),
    "code": ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "'mine' are not supported"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_of_no_model_is_refused_before_anything_is_allocated(base, tmp_path, kind):
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    change, message = CONFIGS[kind]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(RetentionBenchError, match=message):
        Checkpoint(str(folder)).load()


def cut_settings(folder):
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|beg')


def empty_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def generation_list(folder):
    (folder / "generation_config.json").write_text("[1]")


def pipe(folder):
    import os

    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")


def index_of_nothing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def end_behind_every_text(folder):
    whole = json.loads((folder / "tokenizer.json").read_text())
    end = whole["added_tokens"][0]["content"]
    ids = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}]
    special = {end: {"id": end, "ids": [whole["added_tokens"][0]["id"]], "tokens": [end]}}
    whole["post_processor"] = {"type": "TemplateProcessing", "single": ids, "pair": ids, "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(whole))


DAMAGED = {
    cut_settings: "tokenizer_config.json: not JSON",
    empty_tokenizer: "tokenizer in .* could not be loaded",
    generation_list: "generation_config.json: Input should be a valid dictionary, got a list of 1",
    pipe: "tokenizer.json is no regular file",
    pointer: "is a Git LFS pointer",
    index_of_nothing: "is no index of weights",
    end_behind_every_text: "behind every text, so no prompt could be answered",
}


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_one_line(base, tmp_path, damage):
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    damage(folder)
    with pytest.raises(RetentionBenchError, match=DAMAGED[damage]):
        Checkpoint(str(folder)).load()


def test_no_loader_runs_code_that_comes_with_a_model():
    """Auto classes would ask on the terminal whether it may, were they not told that it may not."""
    package = Path(retention_bench.__file__).parent
    seen = []
    for path in sorted(package.rglob("*.py")):
        if path.is_relative_to(package / "atlas"):
            continue  # makes the embedded models
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if not isinstance(called, ast.Attribute) or not ast.unparse(called.value).startswith("Auto"):
                continue
            told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert told.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
            seen.append(path.relative_to(package).as_posix())
    assert set(seen) == {"models/loading.py", "scoring/checkpoints/parity.py"}
