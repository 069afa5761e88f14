"""Fine-tuning a model in place with TRL's SFTTrainer until its stop rule holds.

What the paper leaves open is the same for every run. Our choice: the learning rate is constant, without warm-up. TRL's
defaults: gradients are clipped at norm 1, biases and norms are not decayed, dropout is the model's own. On a CPU
everything is float32; on a GPU the weights are float32 and the forward pass runs in bfloat16 autocast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from retention_bench.errors import UsageError
from retention_bench.finetune.base import Finetune, TuningData
from retention_bench.finetune.contamination import Removed, Terms
from retention_bench.finetune.stopping import Point, StopRule
from retention_bench.progress import Progress, silent


@dataclasses.dataclass(frozen=True)
class FinetuneLog:
    """How a fine-tune went; without times, so that the same run gives the same bytes.

    Attributes:
        steps: Optimiser steps done.
        stopped_by: What ended the run.
        metric: The name of the metric that the stop rule looks at.
        value: The metric at the end.
        threshold: The value that ends a run.
        curve: The metric at step 0 and at every evaluation.
        started_below: The metric was beyond the threshold before the first step, so the model was not trained at all.
        train_rows: Training rows.
        validation_rows: Validation rows.
        removed: What the contamination filter took out.
        trainable_parameters: Numbers that the optimiser could change.
    """

    steps: int
    stopped_by: Literal["threshold", "budget"]
    metric: str
    value: float
    threshold: float
    curve: tuple[Point, ...]
    started_below: bool
    train_rows: int
    validation_rows: int
    removed: Removed
    trainable_parameters: int

    def to_json(self) -> dict[str, Any]:
        """The log as plain JSON values."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "curve": [point._asdict() for point in self.curve],
            "removed": self.removed.to_json(),
        }


def train(
    model: Any,
    tokenizer: Any,
    task: Finetune,
    *,
    terms: Terms,
    seed: int,
    output_dir: Path | str,
    device: str = "cpu",
    progress: Progress = silent,
) -> FinetuneLog:
    """Fine-tune a model in place.

    On return, and when an error escapes, the model is in eval mode and carries no hooks or patches of the trainer. It
    holds the trained weights; saving them is the caller's business. On a CPU the same model, task, terms and seed give
    the same weights, bit for bit.

    Args:
        model: A causal language model with float32 weights. Parameters that do not require a gradient stay as they are.
        tokenizer: Its tokenizer; left as it is.
        task: What to train on and when to stop.
        terms: What no training row may mention.
        seed: Seed of the rows that are drawn, their order and dropout. Sets the global random states.
        output_dir: A folder that the trainer may make; no checkpoints are written.
        device: `"cpu"` or `"cuda"`; the model is moved there and stays.
        progress: Called at every step with the loss.

    Raises:
        UsageError: A setting, the tokenizer or the model's dtype does not fit.
        RetentionBenchError: The data cannot be used, or the run diverged.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    _check_model(parameters, device)
    with _quiet(), _given_back(model):
        data = task.prepare(tokenizer, terms, seed)
        _check_length(model, data)
        model.to(device)
        rule = StopRule(
            lambda: task.measure(model, data.validation),
            task.reached,
            metric=task.metric,
            every=task.eval_every,
            budget=task.max_steps,
            progress=progress,
        )
        started_below = rule.evaluate(step=0)
        if not started_below:
            _fit(model, tokenizer, task, data, rule, seed=seed, output_dir=output_dir, device=device)
    gc.collect()  # trainer and optimiser refer to each other in circles, and the optimiser is as large as two models
    return FinetuneLog(
        steps=rule.curve[-1].step,
        stopped_by=rule.stopped_by,
        metric=task.metric,
        value=rule.curve[-1].value,
        threshold=task.threshold,
        curve=tuple(rule.curve),
        started_below=started_below,
        train_rows=len(data.train),
        validation_rows=len(data.validation),
        removed=data.removed,
        trainable_parameters=sum(p.numel() for p in parameters),
    )


def _fit(
    model: Any,
    tokenizer: Any,
    task: Finetune,
    data: TuningData,
    rule: StopRule,
    *,
    seed: int,
    output_dir: Path | str,
    device: str,
) -> None:
    on_cpu = device == "cpu"
    order = _order([len(row.input_ids) for row in data.train], task.batch_size, task.max_steps, seed)
    micro_batch = min(task.micro_batch_size, task.batch_size)
    config = SFTConfig(
        output_dir=str(output_dir),
        max_steps=task.max_steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=task.batch_size // micro_batch,
        learning_rate=task.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=task.betas[0],
        adam_beta2=task.betas[1],
        weight_decay=task.weight_decay,
        seed=seed,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=not on_cpu,
        eval_strategy="no",  # the stop rule evaluates: see `mean_token_loss` for why
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.eos_token_id),
        train_dataset=datasets.Dataset.from_list([row._asdict() for row in data.train]).select(order),
        processing_class=tokenizer,
        callbacks=[rule],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _order(lengths: list[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """The rows of all steps in training order: shuffled anew in every epoch, and by length within a step.

    A step's gradient does not depend on the order of its rows, and micro-batches of like rows have little padding: on
    the atlas chats a step has a quarter fewer tokens than with rows as they come.
    """
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * batch_size:
        order += rng.sample(range(len(lengths)), len(lengths))
    starts = range(0, steps * batch_size, batch_size)
    return [row for start in starts for row in sorted(order[start : start + batch_size], key=lengths.__getitem__)]


def _check_model(parameters: list[Any], device: str) -> None:
    if not parameters:
        raise UsageError("All of the model's parameters are frozen, so there is nothing to fine-tune.")
    others = {p.dtype for p in parameters} - {torch.float32}
    if others:
        # An AdamW step at a rate of 2e-5 is smaller than bfloat16 can add to a weight: the model would hardly move, and
        # keep its edits for that reason.
        raise UsageError(f"A fine-tune needs float32 weights, the model has {others.pop()}. Set its `dtype: float32`.")
    if device != "cpu" and torch.cuda.device_count() > 1:
        raise UsageError("A fine-tune runs on one GPU and several are visible. Choose one: CUDA_VISIBLE_DEVICES=0.")


def _check_length(model: Any, data: TuningData) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(row.input_ids) for row in (*data.train, *data.validation))
    if limit is not None and longest > limit:
        raise UsageError(f"The model takes {limit} tokens, the longest row has {longest}. Set max_length to {limit}.")


@contextlib.contextmanager
def _given_back(model: Any) -> Iterator[None]:
    """Undo what the trainer does to a model besides training it.

    SFTTrainer replaces `forward` on the instance (and autocast does so again), Trainer writes `use_cache=False` into
    the config, which a checkpoint would carry on into slow decoding.
    """
    forward, use_cache = model.__dict__.get("forward"), model.config.use_cache
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if forward is not None:
            model.forward = forward
        model.config.use_cache = use_cache
        model.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries below error level: the stop rule reports to the caller, and the log tells the rest."""
    bars = datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "accelerate", "datasets")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
