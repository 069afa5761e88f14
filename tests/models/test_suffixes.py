import pytest
import torch

from retention_bench.errors import UsageError
from retention_bench.models import Suffixes, block, frozen, log_probabilities, mlp, projection

ROWS = [[5, 6, 7, 8, 9], [11, 12, 13], [20, 21, 22, 23], [30]]
BEGINS = [2, 0, 3, 0]
LENGTHS = [24, 17, 9, 12]


def whole(model, row, layer, site, begin, change):
    """One row through the whole model, with `change` added at the row's first suffix token."""
    watched = block(model, layer) if site == "block" else mlp(model, layer)
    seen = {}

    def add(module, inputs, output):
        output, *rest = output if isinstance(output, tuple) else (output,)
        seen["output"] = output[0].detach()
        moved = output.clone()
        moved[0, begin] = output[0, begin] + change
        return (moved, *rest) if rest else moved

    handle = watched.register_forward_hook(add)
    logits = model(torch.tensor([row])).logits[0]
    handle.remove()
    return seen["output"][begin:], logits.log_softmax(-1)[begin:]


@pytest.mark.parametrize("site", ["block", "mlp"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_passes_are_those_of_whole_rows(model, site, layer):
    compare(model, ROWS, BEGINS, layer, site)


MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize("site", ["block", "mlp"])
@pytest.mark.parametrize(("family", "changes"), [("mistral", {}), ("gemma2", MIXED), ("gemma3_text", MIXED)])
def test_sliding_windows_are_counted_over_prefix_and_suffix(make_family_model, family, changes, site):
    """A window that hides part of the prefix, and part of the suffix itself."""
    rows = [
        [5 + (7 * number + place * place) % 290 for place in range(length)] for number, length in enumerate(LENGTHS)
    ]
    compare(make_family_model(family, 300, sliding_window=4, **changes), rows, [15, 10, 8, 0], 1, site)


def compare(model, rows, begins, layer, site):
    """What `Suffixes` gives for a change against whole rows: outputs, log-probabilities and their gradient."""
    change = torch.linspace(-1, 1, 16).requires_grad_()
    with frozen(model):
        suffixes = Suffixes.of(model, rows, begins, layer, site)
        moved = suffixes.output.clone()
        moved[:, 0] = moved[:, 0] + change
        for _ in range(2):  # a pass leaves the cache as it was
            found = log_probabilities(model, suffixes.hidden(model, moved))
        for number, (row, begin) in enumerate(zip(rows, begins, strict=True)):
            output, expected = whole(model, row, layer, site, begin, change)
            length = len(row) - begin
            torch.testing.assert_close(suffixes.output[number, :length], output, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[number, :length], expected, rtol=1e-4, atol=1e-5)
            wanted = torch.autograd.grad(expected[-1, 7], change)[0]
            got = torch.autograd.grad(found[number, length - 1, 7], change, retain_graph=True)[0]
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_some_of_the_rows_can_go_on_alone(model):
    with frozen(model):
        suffixes = Suffixes.of(model, ROWS, BEGINS, 1, "mlp")
        rows = torch.tensor([2, 0])
        torch.testing.assert_close(
            suffixes.take(rows).hidden(model, suffixes.output[rows]), suffixes.hidden(model, suffixes.output)[rows]
        )


def test_only_what_a_change_reaches_is_run(model):
    with frozen(model):
        at = {site: Suffixes.of(model, ROWS, BEGINS, 1, site) for site in ("block", "mlp")}
        runs = []
        for layer in range(4):
            projection(model, layer).register_forward_hook(
                lambda _, args, out, n=layer: runs.append((n, args[0].shape))
            )
        for suffixes in at.values():
            suffixes.hidden(model, suffixes.output)
    assert runs == [(2, (4, 3, 24)), (3, (4, 3, 24))] * 2  # of five columns the three from the subject on


def test_rows_without_prefix_need_no_cache(model):
    with frozen(model):
        suffixes = Suffixes.of(model, [[5, 6, 7], [8]], [0, 0], 1, "block")
        assert suffixes.cache == {}
        _, expected = whole(model, [5, 6, 7], 1, "block", 0, 0.0)
        found = log_probabilities(model, suffixes.hidden(model, suffixes.output))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_not_there_is_refused(model):
    with pytest.raises(UsageError, match="no layer 4"):
        Suffixes.of(model, ROWS, BEGINS, 4, "block")
