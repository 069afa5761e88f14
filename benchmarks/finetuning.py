"""What a step of a fine-tune costs beside bare TRL, and what following the facts adds; ratios of one run.

    python benchmarks/finetuning.py [--rounds 3] [--steps 40] [--model atlas-gpt2] [--device cpu|cuda]

Suite `atlas`, fine-tune `tulu3`. Bare TRL is an `SFTTrainer` with the same rows in the same order and the same
arguments, which evaluates and saves a checkpoint every 20 steps as ours does. "Followed" is ours with 50 edited and 100
intrinsic facts asked every 20 steps. The three take turns, so that what else the machine does weighs on all of them.
A step is the median over those without evaluation, checkpoint or look; the whole run has them all.
"""

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import datasets
import torch
import transformers
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from retention_bench.facts import disjoint_split, read_pool
from retention_bench.finetune import Terms, TuningContext, Watch, make_finetune, train
from retention_bench.finetune.training import _order
from retention_bench.models import load_model
from retention_bench.pipeline import load_suite
from retention_bench.scoring import Prober

EVERY = 20


class Clock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, args, state, control, **kwargs):
        """Note it."""
        self.times.append(time.perf_counter())


def bare(model, tokenizer, task, data, device, folder) -> list[float]:
    """TRL alone; when each step ended."""
    config = SFTConfig(
        output_dir=folder,
        max_steps=task.max_steps,
        per_device_train_batch_size=task.micro_batch_size,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=task.batch_size // task.micro_batch_size,
        learning_rate=task.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=task.weight_decay,
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=device != "cpu",
        eval_strategy="steps",
        eval_steps=EVERY,
        save_strategy="steps",
        save_steps=EVERY,
        save_total_limit=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    order = _order([len(row.input_ids) for row in data.train], task.batch_size, task.max_steps, 0)
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=config,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.eos_token_id),
        train_dataset=datasets.Dataset.from_list([row._asdict() for row in data.train]).select(order),
        eval_dataset=datasets.Dataset.from_list([row._asdict() for row in data.validation]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    clock.times = [time.perf_counter()]
    trainer.train()
    return [*clock.times, time.perf_counter()]


def ours(model, tokenizer, task, terms, device, folder, watch=None) -> list[float]:
    """Our own; when each step ended."""
    times: dict[int, float] = {}

    def progress(stage, done, total, figures=None):
        if "loss" in (figures or {}):
            times[done] = time.perf_counter()
        elif done == 0:  # the evaluation before the first step, which bare TRL does not make
            times[0] = time.perf_counter()

    options = {"output_dir": folder, "device": device, "progress": progress, "watch": watch}
    train(model, tokenizer, task, terms=terms, seed=0, **options)
    return [*(times[step] for step in sorted(times)), time.perf_counter()]


def main() -> None:
    """Take turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", default="atlas-gpt2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    suite = load_suite("atlas")
    _, config = suite.model(options.model)
    settings = config.finetunes["tulu3"] | {"threshold": 1e-9, "max_steps": options.steps, "eval_every": EVERY}
    task = make_finetune("tulu3", settings | {"source": suite.locate(settings["source"])})
    base, tokenizer = load_model(config.path, device=options.device)
    pool = read_pool(suite.locate(suite.facts.source))
    facts = disjoint_split(pool, edited=suite.facts.edited, intrinsic=suite.facts.intrinsic, seed=0)
    terms = Terms.from_facts(facts, keywords=suite.facts.keywords)
    data = task.prepare(TuningContext(tokenizer, terms, 0))
    objects = defaultdict(set)
    for fact in pool:
        objects[fact.relation] |= {fact.target_true, fact.target_new}

    steps: dict[str, list[float]] = defaultdict(list)
    runs: dict[str, list[float]] = defaultdict(list)
    looks: list[float] = []
    for _ in range(options.rounds):
        for way in ("bare TRL", "ours", "ours, followed"):
            model = copy.deepcopy(base)
            with tempfile.TemporaryDirectory() as folder:
                if way == "bare TRL":
                    times = bare(model, tokenizer, task, data, options.device, folder)
                else:
                    prober = Prober(model, tokenizer, facts, objects)

                    def look(step, prober=prober):
                        began = time.perf_counter()
                        prober.look()
                        looks.append(time.perf_counter() - began)

                    watch = Watch(EVERY, look) if "followed" in way else None
                    times = ours(model, tokenizer, task, terms, options.device, Path(folder), watch)
            spans = [after - before for before, after in itertools.pairwise(times)][: options.steps]
            # An interval that begins or ends with an evaluation has it inside, on one side or the other.
            quiet = [span for number, span in enumerate(spans, 1) if number % EVERY > 1]
            steps[way].append(statistics.median(quiet))
            runs[way].append(times[-1] - times[0])
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.model}, {where}, {options.steps} steps, {options.rounds} rounds, torch {torch.__version__}\n")
    print("| way | s a step | ratio | s a run | ratio |")
    print("|---|---|---|---|---|")
    first = statistics.median(steps["bare TRL"]), statistics.median(runs["bare TRL"])
    for way in steps:
        step, run = statistics.median(steps[way]), statistics.median(runs[way])
        print(f"| {way} | {step:.3f} | {step / first[0]:.3f} | {run:.1f} | {run / first[1]:.3f} |")
    look = statistics.median(looks)
    share = look / (EVERY * statistics.median(steps["ours"]))
    print(f"\nA look at {len(facts)} facts takes {look:.2f} s, {100 * share:.1f} % of {EVERY} steps.")
    print(json.dumps({"steps": steps, "runs": runs, "looks": looks}))


if __name__ == "__main__":
    main()
