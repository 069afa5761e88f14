import dataclasses

import pytest
import torch

from retention_bench.editors.locate.keys import SubjectStates
from retention_bench.errors import UsageError
from retention_bench.models import WeightDelta, projection_name

TEMPLATES = ("Then the old man came. {}", "Because. {}")


def test_keys_and_outputs_are_the_references(gpt2, golden, distance):
    arrays = golden.arrays("alphaedit")
    states = SubjectStates(*gpt2, golden.requests, golden.templates)
    assert distance(states.mean_keys(0), arrays["batch5.b0.layer0.ks"]) < 1e-5
    assert distance(states.outputs(2), arrays["batch5.b0.layer0.cur_zs"]) < 1e-5


@pytest.mark.parametrize("templates", [(), TEMPLATES])
def test_keys_are_those_of_whole_passes_while_layers_are_edited(
    llama, llama_requests, distance, plain_key, plain_output, templates
):
    model, tokenizer = llama
    requests = [dataclasses.replace(llama_requests[0], paraphrases=("The book is by {} and",)), *llama_requests[1:]]
    states = SubjectStates(model, tokenizer, requests, templates)

    def compare(layer):
        keys, outputs = states.mean_keys(layer), states.outputs(3)
        for request, key, output in zip(requests, keys, outputs, strict=True):
            weight = 0.5 if templates else 1.0
            expected = plain_key(model, tokenizer, request, templates or TEMPLATES, layer, bare_weight=weight)
            assert distance(key, expected.float()) < 1e-5
            assert distance(output, plain_output(model, tokenizer, request, 3).float()) < 1e-5

    torch.manual_seed(0)
    first, second = (f"{projection_name(model, layer)}.weight" for layer in (0, 2))
    compare(0)
    with WeightDelta({first: torch.randn(model.get_parameter(first).shape)}).applied(model):
        compare(2)
        with WeightDelta({second: torch.randn(model.get_parameter(second).shape)}).applied(model):
            compare(3)


def test_contexts_stand_in_order(llama, llama_requests, plain_key, distance):
    model, tokenizer = llama
    request = dataclasses.replace(llama_requests[0], paraphrases=("The book is by {} and",))
    [keys] = SubjectStates(model, tokenizer, [request], TEMPLATES).keys(1)
    assert keys.shape == (2, 3, 64)
    for number, prompt in enumerate(request.prompts):
        for place, template in enumerate(("{}", *TEMPLATES)):
            alone = dataclasses.replace(request, prompt=template.replace("{}", prompt), paraphrases=())
            assert distance(keys[number, place], SubjectStates(model, tokenizer, [alone], ()).mean_keys(1)[0]) < 1e-5


def test_a_layer_below_the_last_is_refused(llama, llama_requests):
    states = SubjectStates(*llama, llama_requests, TEMPLATES)
    states.keys(3)
    for read in (states.keys, states.outputs):
        with pytest.raises(ValueError, match="layer 0 was asked for after layer 3"):
            read(0)


def test_a_layer_that_is_not_there_is_refused(llama, llama_requests):
    with pytest.raises(UsageError, match="no layer 4"):
        SubjectStates(*llama, llama_requests, ()).keys(4)
