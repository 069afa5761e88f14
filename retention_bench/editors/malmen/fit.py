"""The state of a MALMEN fit, in memory and in files: hyper-networks, Adam's state, the generator's, steps done."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retention_bench.editors.malmen.hypernetwork import HyperNetwork
from retention_bench.editors.malmen.steps import Networks
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.models import is_in_out, projection, read_tensors, write_tensors

_KIND = "MALMEN hyper-network"
_VERSION = 2
_SAMPLE = 256
_SAME = 0.1


def new_networks(
    model: PreTrainedModel, layers: Sequence[int], *, rank: int, n_blocks: int, lr: float, generator: torch.Generator
) -> dict[int, tuple[HyperNetwork, int]]:
    """Untrained hyper-networks, one for each distinct shape of the layers' projections.

    Raises:
        UsageError: The model has no such layer.
    """
    return _place(
        model,
        layers,
        lambda shape, modules: HyperNetwork.new(
            *shape, modules, rank=rank, n_blocks=n_blocks, lr=lr, generator=generator, device=model.device
        ),
    )


def save_networks(path: Path, model: PreTrainedModel, networks: Networks, settings: Mapping[str, Any]) -> None:
    """Write trained hyper-networks, and what identifies the model and the settings that they belong to."""
    _write(path, model, networks, {}, settings)


def load_networks(
    path: Path, model: PreTrainedModel, settings: Mapping[str, Any]
) -> dict[int, tuple[HyperNetwork, int]]:
    """Read hyper-networks that were fitted with these settings, `layers` among them.

    Raises:
        UsageError: They were fitted with other settings or for another model.
        RetentionBenchError: There is no such file, or it is broken.
    """
    return _read(path, model, settings)[0]


@dataclasses.dataclass(eq=False)
class Training:
    """A fit between two steps.

    Attributes:
        networks: By layer.
        adam: The optimiser of all their weights.
        generator: Draws the facts of each step.
        step: Meta steps done.
    """

    networks: Networks
    adam: torch.optim.Adam
    generator: torch.Generator
    step: int = 0

    @classmethod
    def of(cls, networks: Networks, meta_lr: float, generator: torch.Generator) -> Training:
        """The state before the first step."""
        distinct = {id(network): network for network, _ in networks.values()}
        weights = [weight for network in distinct.values() for weight in network.weights.values()]
        return cls(networks, torch.optim.Adam(weights, lr=meta_lr), generator)

    @property
    def weights(self) -> list[Tensor]:
        """All that is trained."""
        return self.adam.param_groups[0]["params"]

    def save(self, path: Path, model: PreTrainedModel, about: Mapping[str, Any]) -> None:
        """Write all of it, and `about`, which `load` compares."""
        tensors = {
            f"adam.{index}.{name}": moment
            for index, state in self.adam.state_dict()["state"].items()
            for name, moment in state.items()
        }
        tensors["generator"] = self.generator.get_state()
        _write(path, model, self.networks, tensors, {**about, "step": self.step})

    @classmethod
    def load(cls, path: Path, model: PreTrainedModel, about: Mapping[str, Any], meta_lr: float) -> Training:
        """Read what `save` wrote; going on from it gives the same bits as never having stopped.

        Raises:
            UsageError: It was begun with other settings, facts or another seed, or for another model.
            RetentionBenchError: It is broken.
        """
        networks, tensors, found = _read(path, model, about)
        generator = torch.Generator()
        generator.set_state(tensors["generator"])
        training = cls.of(networks, meta_lr, generator)
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = tensor
        training.adam.load_state_dict({"state": state, "param_groups": training.adam.state_dict()["param_groups"]})
        training.step = found["step"]
        return training


def _place(
    model: PreTrainedModel, layers: Sequence[int], make: Callable[[tuple[int, int], int], HyperNetwork]
) -> dict[int, tuple[HyperNetwork, int]]:
    """By layer the network of its shape, and its module's index there; `make` makes a network per shape."""
    shapes = {layer: _shape(model, layer) for layer in layers}
    made = {shape: make(shape, modules) for shape, modules in Counter(shapes.values()).items()}
    placed, seen = {}, Counter[tuple[int, int]]()
    for layer, shape in shapes.items():
        placed[layer] = (made[shape], seen[shape])
        seen[shape] += 1
    return placed


def _shape(model: PreTrainedModel, layer: int) -> tuple[int, int]:
    """(d_in, d_out) of a layer's projection."""
    linear = projection(model, layer)
    first, second = linear.get_parameter("weight").shape
    return (first, second) if is_in_out(linear) else (second, first)


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _sample(model: PreTrainedModel, layer: int) -> Tensor:
    """Every n-th weight of a projection: tells models apart, and is nearly the same in another precision."""
    flat = projection(model, layer).get_parameter("weight").detach().flatten()
    return flat[:: max(1, len(flat) // _SAMPLE)].float().cpu()


def _write(
    path: Path, model: PreTrainedModel, networks: Networks, more: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    tensors = {f"model.{layer}": _sample(model, layer) for layer in networks}
    for layer, (network, _) in networks.items():
        tensors |= {f"{_name(_shape(model, layer))}.{name}": tensor for name, tensor in network.state().items()}
    tensors |= more
    write_tensors(path, tensors, kind=_KIND, version=_VERSION, **about)


def _read(
    path: Path, model: PreTrainedModel, about: Mapping[str, Any]
) -> tuple[dict[int, tuple[HyperNetwork, int]], dict[str, Tensor], dict[str, Any]]:
    """Networks, all tensors, and the file's metadata; checked against the model and `about`."""
    tensors, found = read_tensors(path, dict[str, Any], kind=_KIND, version=_VERSION, also=("I64", "U8"))
    for name, wanted in about.items():
        if found.get(name) != wanted:
            raise UsageError(
                f"{path} is of a MALMEN fit with {name} {found.get(name)}; {wanted} was asked for. Take the fit's own, "
                "or fit again into an empty folder."
            )
    for layer in about["layers"]:
        if f"model.{layer}" not in tensors:
            raise RetentionBenchError(f"{path} is damaged: it lacks model.{layer}. Fit MALMEN again.")
        sample, here = tensors[f"model.{layer}"], _sample(model, layer)
        if sample.shape != here.shape or (sample - here).norm() > _SAME * sample.norm():
            raise UsageError(
                f"{path} was fitted for another model: the weights of layer {layer} differ. Fit MALMEN on the model "
                "that is edited."
            )

    def network(shape: tuple[int, int], modules: int) -> HyperNetwork:
        prefix = f"{_name(shape)}."
        state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        return HyperNetwork.of(state, model.device)

    return _place(model, about["layers"], network), tensors, found
