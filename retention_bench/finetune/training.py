"""Fine-tuning a model in place with TRL and transformers until its stop rule holds.

What the paper leaves open is the same for every run. Our choice: the learning rate is constant, without warm-up. TRL's
defaults: gradients are clipped at norm 1, biases and norms are not decayed, dropout is the model's own. On a CPU
everything is float32; on a GPU the weights are float32 and the forward pass runs in bfloat16 autocast, through the
kernels of `kernels.py`.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainingArguments
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
from retention_bench.finetune.horizon import Horizon, parse_horizon
from retention_bench.finetune.kernels import faster_steps
from retention_bench.finetune.log import FinetuneLog
from retention_bench.finetune.options import FinetuneOptions
from retention_bench.finetune.schedule import schedule
from retention_bench.finetune.settings import TrainingSettings
from retention_bench.finetune.stopping import StopRule
from retention_bench.finetune.tracking import Track, Tracker, without_autocast
from retention_bench.finetune.validation import ROWS, measure

_DEFAULTS = FinetuneOptions()


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
        options: What is frozen, which adapter is trained, how often `track` is called, and where the run ends.
        edited: The layers that an edit changed, for `options.freeze`.
        track: Takes a point of the facts' trajectory, see `Track`; not with `options.track_every` None.
        progress: Called at every step with the loss.

    Raises:
        UsageError: A setting, the tokenizer or the model's dtype does not fit.
        RetentionBenchError: The data cannot be used, the model is broken or beyond the threshold before the first step,
            or a single row does not fit the memory.
        torch.OutOfMemoryError: Memory ran out in one of several processes, which cannot go on together then. What a
            single process does about it, a smaller `micro_batch_size`, the caller may do by starting them again.
    """
    if track is not None and options.track_every is None:
        raise UsageError("track_every is off, and track is given. Leave track out, or let track_every be 0 or more.")
    settings, horizon = task.settings, parse_horizon(options.horizon)
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
                    "Give --track-every off, or --accelerate-config ddp."
                )
            if track is not None:
                track = without_autocast(model, track)
            micro_batch = _largest_divisor(share, settings.micro_batch_size)
            # Several processes can only begin again with a smaller micro-batch, so this must follow it.
            size = ROWS if processes.count() == 1 else min(ROWS, micro_batch)
            lengths = [len(row.input_ids) for row in data.train]
            rule = StopRule(
                lambda: measure(trained, data.validation, settings.classes, size),
                metric=settings.metric,
                threshold=settings.threshold,
                fixed=horizon.fixed,
                every=settings.eval_every,
                schedule=schedule(lengths, settings.batch_size, seed, settings.max_steps, horizon),
                progress=progress,
            )
            count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
            checkpoint = rule.resume(Path(output_dir))
            tracker = Tracker(track, rule, options.track_every or 0) if track is not None else None
            if checkpoint is None:
                rule.evaluate(step=0)
                if tracker is not None:
                    tracker.look(0)
            run = _Run(trained, tokenizer, settings, data, rule, options, tracker, seed, Path(output_dir), device)
            with faster_steps(model, device):
                micro_batch = run.fit(micro_batch, checkpoint)
            if processes.count() > 1:
                processes.unshard(trained)
                if tied:  # a head that is the embedding matrix is no part of a `Classifier`
                    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    gc.collect()  # trainer and optimiser refer to each other in circles, and the optimiser is as large as two models
    last, why_not = rule.curve[-1], _why_not(rule, settings, horizon)
    return FinetuneLog(
        steps=last.step,
        tokens=last.tokens,
        epochs=last.epoch,
        horizon=options.horizon,
        stopped_by=rule.stopped_by,
        passed_at=rule.passed_at,
        learned=why_not is None,
        why_not=why_not,
        metric=settings.metric,
        value=last.value,
        threshold=settings.threshold,
        curve=tuple(rule.curve),
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


def _why_not(rule: StopRule, settings: TrainingSettings, horizon: Horizon) -> str | None:
    """Why nothing was learned, in words; None where the threshold was passed in training."""
    metric, last, passed = settings.metric, rule.curve[-1], rule.passed_at
    if rule.diverged:
        return f"the run diverged: {rule.diverged}"
    if passed is None:
        allowed = "of its horizon" if horizon.fixed else "of its budget"
        return (
            f"after the {last.step} steps {allowed} the {metric} was {last.value:.4g}, and the threshold "
            f"{settings.threshold:g} was not reached"
        )
    if passed.step == 0:
        return (
            f"the {metric} was {passed.value:.4g} before the first step, beyond the threshold "
            f"{settings.threshold:g}, so passing it says nothing"
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
    tracker: Tracker | None
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
        arguments: Mapping[str, Any] = {
            "output_dir": str(self.output_dir),
            "max_steps": self.rule.schedule.steps,
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
        rows = datasets.Dataset.from_list([row._asdict() for row in self.data.train])
        common: Mapping[str, Any] = {
            "data_collator": collator(settings.classes),
            "train_dataset": rows.select(self.rule.schedule.order),
            "callbacks": [self.rule, *([self.tracker] if self.tracker is not None else [])],
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
