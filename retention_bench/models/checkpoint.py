"""A checkpoint to be scored: a model with an edit or an adapter on top, loaded as transformers and peft load it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from retention_bench.errors import RetentionBenchError
from retention_bench.models.adapter import WEIGHTS, adapted, adapter_config
from retention_bench.models.delta import WeightDelta
from retention_bench.models.loading import empty_model, load_config, load_tokenizer, read_model, weight_files


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint's files are. It can be pickled, and is small: another process loads it by itself.

    Attributes:
        folder: The base model's.
        delta: File of a `WeightDelta` for that model; None for the model as it is.
        adapter: Folder of a peft adapter for that model.
        tokenizer: A folder to take the tokenizer from; None for the model's own.
        dtype: What the weights are converted to, before anything is added.
        allow_pickle: Also read pickled weights; loading those of an unknown origin is a risk.
    """

    folder: str
    delta: str | None = None
    adapter: str | None = None
    tokenizer: str | None = None
    dtype: torch.dtype = torch.float32
    allow_pickle: bool = False

    def load(self, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, in evaluation mode, and its tokenizer.

        Raises:
            UsageError: As `load_model`.
            RetentionBenchError: As `load_model`; or the delta or the adapter does not fit.
        """
        tokenizer = load_tokenizer(self.tokenizer or self.folder)
        return self._model().to(device).eval(), tokenizer  # type: ignore[arg-type]

    def _model(self) -> PreTrainedModel:
        model = read_model(Path(self.folder), dtype=self.dtype, allow_pickle=self.allow_pickle)
        if self.delta is not None:
            WeightDelta.load(self.delta).apply_(model)
        if self.adapter is not None:
            model = adapted(model, self.adapter, allow_pickle=self.allow_pickle)
        return model

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """The weights under the names that `save_pretrained` gives them, each once, on the CPU.

        Raises:
            UsageError: As `load`.
            RetentionBenchError: As `load`; or the head was trained apart from the embeddings that the configuration
                ties it to, so that a model made from the configuration could not hold it.
        """
        model = self._model()
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        apart = head is not None and head.weight is not embeddings.weight
        # The folder's own configuration: in the model's, peft has put that they are not tied where it merged a head.
        if apart and load_config(self.folder).get_text_config().tie_word_embeddings:
            raise RetentionBenchError(
                f"The output head in {self.adapter or self.folder} was trained apart from the embeddings, and "
                "config.json says that they are tied. Set tie_word_embeddings to false there, or give --backend hf."
            )
        tied = getattr(model, "all_tied_weights_keys", {})
        own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        yield from revert_weight_conversion(model, own).items()

    def way(self) -> tuple[object, ...]:
        """How it is loaded: what is equal for two checkpoints whose files are read and put together alike."""
        files = weight_files(Path(self.folder), allow_pickle=self.allow_pickle)
        beside = tuple(sorted(path.name for path in Path(self.folder).glob("*.index.json")))
        parts: set[object] = {path.suffix for path in files}
        for path in files:
            parts |= _tensors(path)
        delta = frozenset() if self.delta is None else {name.rpartition(":")[2] for name, _ in _tensors(self.delta)}
        way = (frozenset(parts), beside, frozenset(delta))
        if self.adapter is None:
            return way
        fields = adapter_config(Path(self.adapter)).model_dump(exclude={"base_model_name_or_path", "revision"})
        return *way, repr(sorted(fields.items())), frozenset(_tensors(Path(self.adapter) / WEIGHTS))


def _tensors(path: Path | str) -> set[tuple[str, str]]:
    """Names and dtypes of what a safetensors file holds; nothing of another."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return set()
    with safe_open(path, framework="pt") as file:
        return {(name, file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - no mapping


@dataclasses.dataclass(frozen=True)
class Layout:
    """The weights that a model consists of, known from its config alone.

    Attributes:
        shapes: By name, as `save_pretrained` writes them; tied weights are among them. The names are those of
            `model.state_dict()`, but for GPT-NeoX' head.
        tied: Names of weights that are another one's tensor, as a tied head; a checkpoint may leave them out.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tied: frozenset[str]

    @classmethod
    def of(cls, config: PretrainedConfig) -> Layout:
        """The layout of the causal language model that a config describes; nothing is allocated."""
        model = empty_model(config)
        everything = model.state_dict()
        own = {name: tensor for name, tensor in everything.items() if name not in model.all_tied_weights_keys}
        shapes = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, everything).items()}
        return cls(shapes=shapes, tied=frozenset(shapes.keys() - revert_weight_conversion(model, own).keys()))

    def check(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass a model's weights through, each checked before it is handed on, and without the tied ones.

        Args:
            weights: Names and tensors, in any order.

        Yields:
            The same pairs; where a weight is tied, only the one that it is tied to.

        Raises:
            RetentionBenchError: A name is not known, a shape differs, or the stream ended without a weight.
        """
        missing = set(self.shapes) - self.tied
        for name, tensor in weights:
            if name not in self.shapes:
                near = difflib.get_close_matches(name, self.shapes, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise RetentionBenchError(f"The model has no weight {name!r}.{hint} {_SAME_MODEL}")
            if tuple(tensor.shape) != self.shapes[name]:
                raise RetentionBenchError(
                    f"The weight {name} has the shape {list(tensor.shape)}; the model's has "
                    f"{list(self.shapes[name])}. {_SAME_MODEL}"
                )
            missing.discard(name)
            if name not in self.tied:
                yield name, tensor
        if missing:
            raise RetentionBenchError(
                f"The weights ended without {len(missing)} that the model needs, {min(missing)} among them. "
                f"{_SAME_MODEL}"
            )


_SAME_MODEL = "Give the weights of a model of the same config, whole."
