"""What a task trains: the whole model, or its backbone under a linear classification head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


class Classifier(torch.nn.Module):
    """A model's backbone under a new linear head on the last token's hidden state (the paper's classification task).

    The backbone is the model's own, not a copy: what is trained here is trained there. `*ForSequenceClassification` of
    transformers finds the last token by the padding id, and so passes over an EOS that pads as well.

    Attributes:
        backbone: The model without its head.
        head: The linear head, [classes, d_model], without a bias.
        config: The model's.
    """

    def __init__(self, model: Any, classes: int, seed: int) -> None:
        """Put a random head on a model, drawn as the model's own weights were.

        Args:
            model: A causal language model.
            classes: How many classes there are.
            seed: Seed of the head.
        """
        super().__init__()
        self.config = model.config
        self.backbone = model.base_model
        self._no_split_modules = model._no_split_modules  # says to accelerate what FSDP may cut a model between
        width = model.get_input_embeddings().weight.shape[1]
        spread = getattr(model.config, "initializer_range", 0.02)
        drawn = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)) * spread
        self.head = torch.nn.Linear(width, classes, bias=False)
        self.head.weight.data.copy_(drawn)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits of the classes [rows, classes], and the mean cross-entropy where labels [rows] are given.

        Args:
            input_ids: Token ids [rows, length], padded on the right.
            attention_mask: 1 for tokens, 0 for padding [rows, length].
            labels: The rows' classes.
        """
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.sum(1) - 1
        logits = self.head(states[torch.arange(len(states), device=states.device), last])
        if labels is None:
            return {"logits": logits}
        return {"loss": torch.nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def collator(classes: int | None) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    """What makes a batch of rows, for training and for evaluation.

    Args:
        classes: As in `Finetune`.

    Returns:
        A function from rows with the keys of `Example` to `input_ids` and `attention_mask`, int64 [rows, length],
        padded on the right, and `labels`, [rows, length] with -100 for padding, or [rows] for a task with classes.
    """
    padded = DataCollatorForLanguageModeling(pad_token_id=0)  # any id: it is masked and never a target

    def classed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = padded([{"input_ids": row["input_ids"]} for row in rows])
        return {**batch, "labels": torch.tensor([label for row in rows for label in row["labels"]])}

    return padded if classes is None else classed
