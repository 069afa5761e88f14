"""Fine-tuning a model in place with TRL and transformers until its stop rule holds.

What the paper leaves open is the same for every run. Our choice: the learning rate is constant, without warm-up. TRL's
defaults: gradients are clipped at norm 1, biases and norms are not decayed, dropout is the model's own. On a CPU
everything is float32; on a GPU the weights are float32 and the forward pass runs in bfloat16 autocast, through the
kernels of `kernels.py`.
"""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from retention_bench.display.progress import Progress, silent
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.facts import Fact
from retention_bench.finetune import processes
from retention_bench.finetune.adapters import adapted
from retention_bench.finetune.base import Finetune, TuningContext, TuningData
from retention_bench.finetune.cleanup import given_back, quiet
from retention_bench.finetune.contamination import Terms
from retention_bench.finetune.freezing import parse_freeze
from retention_bench.finetune.heads import Classifier, collator
from retention_bench.finetune.kernels import faster_steps
from retention_bench.finetune.log import FinetuneLog
from retention_bench.finetune.options import FinetuneOptions
from retention_bench.finetune.settings import TrainingSettings
from retention_bench.finetune.stopping import StopRule
from retention_bench.finetune.validation import ROWS, measure

_DEFAULTS = FinetuneOptions()

Track = Callable[[int], None]
"""Takes a point of a trajectory, given the optimiser steps done: it may run the model, and leaves it and the random
states as they are. It is called before the first step and every `track_every` steps, in every process; by a run that
goes on after a kill perhaps again for the same steps."""


def train(
    model: Any,
    tokenizer: Any,
    task: Finetune,
    *,
    terms: Terms,
    seed: int,
    output_dir: Path | str,
    device: str = "cpu",
    unknown: Sequence[Fact] = (),
    options: FinetuneOptions = _DEFAULTS,
    edited: Collection[int] = (),
    track: Track | None = None,
    progress: Progress = silent,
) -> FinetuneLog:
    """Fine-tune a model in place.

    On return, and when an error escapes, the model is in eval mode and carries no hooks, adapters or patches of the
    trainer. It holds the trained weights; saving them is the caller's business. On a CPU the same model, task, terms
    and seed give the same weights, bit for bit, also where a run was killed and went on.

    Processes of a process group may call this together, each with the same arguments and the same model on a device of
    its own. They share out the rows of every step, and all have the trained model in the end. Where `accelerate` is
    configured for FSDP the model can then be saved, but not run any more.

    Args:
        model: A causal language model with float32 weights.
        tokenizer: Its tokenizer; left as it is.
        task: What to train on and when to stop.
        terms: What no training row may mention.
        seed: Seed of the rows that are drawn, their order, dropout and what is new in the model. Sets the global random
            states.
        output_dir: A folder for the trainer's checkpoints, one at every evaluation, or at fewer where they take long to
            write. A run that finds one there goes on from it; the caller removes the folder when it has the result.
        device: `"cpu"` or `"cuda"`; the model is moved there and stays. A single process must see a single GPU, or the
            trainer would copy the model to all of them in every step.
        unknown: As in `TuningContext`.
        options: What is frozen, which adapter is trained, and how often `track` is called.
        edited: The layers that an edit changed, for `options.freeze`.
        track: Takes a point of the facts' trajectory, see `Track`; given with `options.track_every`, and not without.
        progress: Called at every step with the loss.

    Raises:
        UsageError: A setting, the tokenizer or the model's dtype does not fit.
        RetentionBenchError: The data cannot be used, the model is broken, or a single row does not fit the memory.
        torch.OutOfMemoryError: Memory ran out in one of several processes, which cannot go on together then. What a
            single process does about it, a smaller `micro_batch_size`, the caller may do by starting them again.
    """
    if (track is None) == bool(options.track_every):
        raise UsageError(
            f"track_every is {options.track_every}, and {'no ' if track is None else ''}track is given. Give both, or "
            "neither."
        )
    settings = task.settings
    with quiet(), given_back(model):
        layers = parse_freeze(options.freeze).apply(model, edited)
        _check_model(list(model.parameters()))
        share = _share(settings.batch_size)
        # Not what the configuration says: a head may have been trained apart under one that ties it.
        head = model.get_output_embeddings()
        tied = head is not None and head.weight is model.get_input_embeddings().weight
        data = task.prepare(TuningContext(tokenizer, terms, seed, unknown))
        _check_length(model, data)
        rank, alpha = settings.adapter_rank, settings.adapter_alpha
        with adapted(model, options.adapter, layers, rank=rank, alpha=alpha, seed=seed):
            trained = model if settings.classes is None else Classifier(model, settings.classes, seed)
            model.to(device)
            trained.to(device)  # the head too, where it is another
            if track is not None and trained is not model and processes.sharded():
                raise UsageError(
                    f"Under FSDP a model cannot be asked while {task.name} trains its backbone below another head. "
                    "Leave --track-every out, or give --accelerate-config ddp."
                )
            if track is not None:
                track = _without_autocast(model, track)
            micro_batch = _largest_divisor(share, settings.micro_batch_size)
            # Several processes can only begin again with a smaller micro-batch, so this must follow it.
            size = ROWS if processes.count() == 1 else min(ROWS, micro_batch)
            rule = StopRule(
                lambda: measure(trained, data.validation, settings.classes, size),
                metric=settings.metric,
                threshold=settings.threshold,
                every=settings.eval_every,
                budget=settings.max_steps,
                progress=progress,
            )
            count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
            checkpoint = rule.resume(Path(output_dir))
            if checkpoint is None and track is not None:
                track(0)
            started_below = checkpoint is None and rule.evaluate(step=0)
            if not started_below:
                run = _Run(trained, tokenizer, settings, data, rule, options, track, seed, Path(output_dir), device)
                with faster_steps(model, device):
                    micro_batch = run.fit(micro_batch, checkpoint)
            if processes.count() > 1:
                processes.unshard(trained)
                if tied:  # a head that is the embedding matrix is no part of a `Classifier`
                    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    gc.collect()  # trainer and optimiser refer to each other in circles, and the optimiser is as large as two models
    last = rule.curve[-1]
    return FinetuneLog(
        steps=last.step,
        stopped_by=rule.stopped_by,
        learned=rule.stopped_by == "threshold" and not started_below,
        why_not=_why_not(rule, settings, started_below),
        metric=settings.metric,
        value=last.value,
        threshold=settings.threshold,
        curve=tuple(rule.curve),
        started_below=started_below,
        train_rows=len(data.train),
        validation_rows=len(data.validation),
        removed=data.removed,
        dropped=data.dropped,
        freeze=options.freeze,
        adapter=options.adapter,
        trained_layers=layers,
        trainable_parameters=count,
        parameters=sum(p.numel() for p in model.parameters()),
        micro_batch_size=micro_batch,
        processes=processes.count(),
    )


def _without_autocast(model: Any, track: Track) -> Track:
    """The same, without the autocast that the trainer puts around the model on a GPU: scores are taken without it.

    The parameters of an FSDP model are gathered in bfloat16 for every forward pass, also for this one.
    """

    def tracked(step: int) -> None:
        wrapped = model.__dict__.pop("forward", None)
        try:
            track(step)
        finally:
            if wrapped is not None:
                model.forward = wrapped

    return tracked


def _why_not(rule: StopRule, settings: TrainingSettings, started_below: bool) -> str | None:
    metric, value, threshold = settings.metric, rule.curve[-1].value, settings.threshold
    if started_below:
        return f"the {metric} was {value:.4g} before the first step, beyond the threshold {threshold:g}"
    if rule.stopped_by == "diverged":
        return f"the run diverged: {rule.diverged}"
    if rule.stopped_by == "budget":
        return (
            f"after the {settings.max_steps} steps of its budget the {metric} was {value:.4g}, and the threshold "
            f"{threshold:g} was not reached"
        )
    return None


@dataclasses.dataclass
class _Run:
    """One fine-tune under the trainer, begun again with smaller micro-batches where memory runs out."""

    trained: Any
    tokenizer: Any
    settings: TrainingSettings
    data: TuningData
    rule: StopRule
    options: FinetuneOptions
    track: Track | None
    seed: int
    output_dir: Path
    device: str

    def fit(self, micro_batch: int, checkpoint: Path | None) -> int:
        """Train.

        Args:
            micro_batch: Rows in a forward pass, to begin with.
            checkpoint: The trainer's checkpoint to go on from.

        Returns:
            The rows in a forward pass, in the end.

        Raises:
            RetentionBenchError: A single row does not fit.
            torch.OutOfMemoryError: As `train`.
        """
        if processes.count() > 1:
            self._train(micro_batch, checkpoint)
            return micro_batch
        # What a run that ran out of memory before its first checkpoint begins again from.
        start = {
            name: p.detach().to("cpu", copy=True) for name, p in self.trained.named_parameters() if p.requires_grad
        }
        while True:
            try:
                self._train(micro_batch, checkpoint)
                return micro_batch
            except torch.OutOfMemoryError as error:
                if micro_batch == 1:
                    raise RetentionBenchError(
                        f"A single row of up to {self.settings.max_length} tokens does not fit the memory of "
                        f"{self.device}. Lower max_length, train an adapter, or take a larger device."
                    ) from error
            micro_batch = _largest_divisor(self.settings.batch_size, micro_batch // 2)
            gc.collect()
            torch.cuda.empty_cache()
            checkpoint = self.rule.resume(self.output_dir)
            if checkpoint is None:
                self.trained.load_state_dict(start, strict=False)
                self.rule.evaluate(step=0)

    def _train(self, micro_batch: int, checkpoint: Path | None) -> None:
        settings, on_cpu = self.settings, self.device == "cpu"
        order = _order(
            [len(row.input_ids) for row in self.data.train], settings.batch_size, settings.max_steps, self.seed
        )
        arguments: Mapping[str, Any] = {
            "output_dir": str(self.output_dir),
            "max_steps": settings.max_steps,
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": settings.batch_size // (micro_batch * processes.count()),
            "learning_rate": settings.lr if self.options.adapter == "none" else settings.adapter_lr,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch" if on_cpu else "adamw_torch_fused",
            "adam_beta1": settings.betas[0],
            "adam_beta2": settings.betas[1],
            "weight_decay": settings.weight_decay,
            "seed": self.seed,
            "use_cpu": on_cpu,
            "bf16": not on_cpu,
            "gradient_checkpointing": False,
            # What FSDP did not bring together after each micro-batch it would keep whole on every GPU.
            "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": processes.sharded()}},
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": not on_cpu,
            "eval_strategy": "no",  # the stop rule evaluates: see `Measured` for why
            "save_strategy": "steps",
            "save_steps": settings.eval_every,  # the stop rule says where not
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "report_to": "none",
            "disable_tqdm": True,
        }
        common: Mapping[str, Any] = {
            "data_collator": collator(settings.classes),
            "train_dataset": datasets.Dataset.from_list([row._asdict() for row in self.data.train]).select(order),
            "callbacks": [self.rule, *([_Tracker(self.track, self.options.track_every)] if self.track else [])],
        }
        if settings.classes is None:
            config = SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
            trainer: Trainer = SFTTrainer(self.trained, config, processing_class=self.tokenizer, **common)
        else:
            trainer = Trainer(self.trained, TrainingArguments(**arguments), **common)
        trainer.remove_callback(PrinterCallback)
        if processes.sharded() and not on_cpu:
            # By itself accelerate would also sum gradients, and give out logits, in bfloat16.
            trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
            )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


class _Tracker(TrainerCallback):
    """Calls `track` every few steps."""

    def __init__(self, track: Track, every: int) -> None:
        self._track, self._every = track, every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._track(state.global_step)


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


def _share(batch_size: int) -> int:
    """The rows of a step that each process takes.

    Raises:
        UsageError: They cannot take equally many.
    """
    share, rest = divmod(batch_size, processes.count())
    if rest:
        raise UsageError(
            f"A step's {batch_size} rows cannot be shared out equally among {processes.count()} processes. Start a "
            "number of processes that divides batch_size."
        )
    return share


def _largest_divisor(number: int, limit: int) -> int:
    return next(n for n in range(min(number, limit), 0, -1) if number % n == 0)


def _check_model(parameters: list[Any]) -> None:
    if not any(p.requires_grad for p in parameters):
        raise UsageError("All of the model's parameters are frozen, so there is nothing to fine-tune.")
    others = {p.dtype for p in parameters} - {torch.float32}
    if others:
        # An AdamW step at a rate of 2e-5 is smaller than bfloat16 can add to a weight: the model would hardly move, and
        # keep its edits for that reason.
        raise UsageError(f"A fine-tune needs float32 weights, the model has {others.pop()}. Set its `dtype: float32`.")


def _check_length(model: Any, data: TuningData) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(row.input_ids) for row in (*data.train, *data.validation))
    if limit is not None and longest > limit:
        raise UsageError(f"The model takes {limit} tokens, the longest row has {longest}. Set max_length to {limit}.")
