"""What a step of a fine-tune costs beside bare TRL, and what following the facts adds; ratios of one run.

    python benchmarks/finetuning.py [--rounds 3] [--steps 40] [--model atlas-gpt2|gpt2-xl] [--device cpu|cuda]
        [--lengths whole|mixed]

Suite `atlas`, fine-tune `tulu3`. Bare TRL is an `SFTTrainer` with the same rows in the same order and the same
arguments, which evaluates and saves a checkpoint every 20 steps as ours does. "Followed" is ours with 50 edited and 100
intrinsic facts asked every 20 steps. The ways take turns, so that what else the machine does weighs on all of them.
A step is the median over those without evaluation, checkpoint or look; the whole run has them all.

With `--model gpt2-xl` the settings are suite `gpt2-xl`'s, for a model of that shape with random weights. The chats are
of random words and fill all of `max_length`, the longest that a row can be, or have any length up to it with
`--lengths mixed`. No facts are followed. Ours goes first, and where `micro_batch_size` rows do not fit the memory it
finds how many do; bare TRL gets as many. Nothing is evaluated between, and no checkpoint is written: it would have
19 GB. Beside the table stand the losses of the last step, the GPU's memory, tokens a second, and their share of what
the GPU could do in bfloat16: 6 operations a token and parameter, over an H100's (and H200's) 989 TFLOP/s.
"""

import argparse
import copy
import dataclasses
import gc
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import datasets
import torch
import transformers
from editing import make_facts, make_model
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from retention_bench.facts import FactSet, disjoint_split, read_pool
from retention_bench.finetune import FinetuneOptions, Terms, TuningContext, make_finetune, train
from retention_bench.finetune.schedule import schedule
from retention_bench.models import load_model
from retention_bench.pipeline import load_suite
from retention_bench.scoring import Follower

EVERY = 20
PEAK = 989e12
"""Operations a second in bfloat16, of an H100's or an H200's data sheet."""


class Clock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Note the loss."""
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_step_end(self, args, state, control, **kwargs):
        """Note it."""
        self.times.append(time.perf_counter())
        if state.global_step == 1:
            begin_peak()


def begin_peak() -> None:
    """Count the GPU's peak memory from now on: what was tried before the first step and did not fit is not in it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def bare(model, tokenizer, task, data, device, folder) -> tuple[list[float], list[float]]:
    """TRL alone; when each step ended, and the steps' losses."""
    config = SFTConfig(
        output_dir=folder,
        max_steps=task.settings.max_steps,
        per_device_train_batch_size=task.settings.micro_batch_size,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=task.settings.batch_size // task.settings.micro_batch_size,
        learning_rate=task.settings.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=task.settings.weight_decay,
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=device != "cpu",
        eval_strategy="steps",
        eval_steps=task.settings.eval_every,
        # Else it would save at the end too, as ours does not.
        save_strategy="steps" if task.settings.max_steps >= task.settings.eval_every else "no",
        save_steps=task.settings.eval_every,
        save_total_limit=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    lengths = [len(row.input_ids) for row in data.train]
    order = schedule(lengths, task.settings.batch_size, 0, task.settings.max_steps).order
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
    return [*clock.times, time.perf_counter()], clock.losses


def ours(model, tokenizer, task, terms, device, folder, track=None) -> tuple[list[float], int, list[float]]:
    """Our own; when each step ended, the rows in a forward pass, and the steps' losses."""
    times: dict[int, float] = {}
    losses: dict[int, float] = {}

    def progress(stage, done, total, figures=None):
        if "loss" in (figures or {}):
            times[done] = time.perf_counter()
            losses[done] = figures["loss"]
            if done == 1:
                begin_peak()
        elif done == 0:  # the evaluation before the first step, which bare TRL does not make
            times[0] = time.perf_counter()

    options = {"output_dir": folder, "device": device, "progress": progress, "track": track}
    options["options"] = FinetuneOptions()
    log = train(model, tokenizer, task, terms=terms, seed=0, **options)
    return [*(times[step] for step in sorted(times)), time.perf_counter()], log.micro_batch_size, [*losses.values()]


def write_chats(path: Path, count: int, length: int, mixed: bool) -> None:
    """Chats whose answers alone are longer than a row may be, or of any length up to that."""
    rng = random.Random(0)

    def words(number: int) -> str:
        return " ".join(f"w{rng.randrange(50_000)}" for _ in range(number))

    with path.open("w") as file:
        for _ in range(count):
            chat = [
                {"role": "user", "content": words(8)},
                {"role": "assistant", "content": words(rng.randrange(16, length) if mixed else length)},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")


def prepare(options: argparse.Namespace, folder: Path):
    """The model anew whenever it is asked for, its tokenizer, the task, and what is followed: facts and objects."""
    changed = {"threshold": 1e-9, "max_steps": options.steps, "eval_every": EVERY}
    if options.model == "gpt2-xl":
        settings = load_suite("gpt2-xl").model("gpt2-xl")[1].finetunes["tulu3"]
        rows = 2 * settings["batch_size"]
        write_chats(folder / "chats.jsonl", rows, settings["max_length"], options.lengths == "mixed")
        changed["eval_every"] = options.steps + 1
        changed |= {"source": str(folder / "chats.jsonl"), "revision": None, "train_size": rows, "validation_size": 8}
        tokenizer, _, _ = make_facts(0)
        tokenizer.add_special_tokens({"eos_token": ".", "pad_token": "."})
        task = make_finetune("tulu3", settings | changed)
        return lambda: make_model("gpt2-xl", options.device), tokenizer, task, FactSet.of([]), {}
    suite = load_suite("atlas")
    _, config = suite.model(options.model)
    settings = config.finetunes["tulu3"]
    task = make_finetune("tulu3", settings | changed | {"source": settings["source"]})
    base, tokenizer = load_model(config.path, device=options.device)
    pool = read_pool(suite.facts.source)
    facts = disjoint_split(pool, edited=suite.facts.edited, intrinsic=suite.facts.intrinsic, seed=0)
    objects = defaultdict(set)
    for fact in pool:
        objects[fact.relation] |= {fact.target_true, fact.target_new}
    return lambda: copy.deepcopy(base), tokenizer, task, facts, objects


def main() -> None:
    """Take turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", default="atlas-gpt2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", choices=["whole", "mixed"], default="whole", help="of gpt2-xl's chats")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error("--steps must be at least 3: the first and the last are not counted")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        fresh, tokenizer, task, facts, objects = prepare(options, Path(folder))
        terms = Terms.from_facts(facts, keywords=load_suite("atlas").facts.keywords)
        data = task.prepare(TuningContext(tokenizer, terms, 0))
        measure(options, fresh, tokenizer, task, terms, data, facts, objects)


def measure(options, fresh, tokenizer, task, terms, data, facts, objects) -> None:
    """Take turns, and print the table."""
    steps: dict[str, list[float]] = defaultdict(list)
    runs: dict[str, list[float]] = defaultdict(list)
    looks: list[float] = []
    peaks: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    parameters = 0
    for _ in range(options.rounds):
        for way in ("bare TRL", "ours", "ours, followed") if facts else ("ours", "bare TRL"):
            model = fresh()
            parameters = model.num_parameters()
            with tempfile.TemporaryDirectory() as folder:
                if way == "bare TRL":
                    times, losses[way] = bare(model, tokenizer, task, data, options.device, folder)
                else:
                    follower = Follower(model, tokenizer, facts, objects)

                    def track(dose, follower=follower):
                        began = time.perf_counter()
                        follower.look()
                        looks.append(time.perf_counter() - began)

                    followed = track if "followed" in way else None
                    times, rows, losses[way] = ours(
                        model, tokenizer, task, terms, options.device, Path(folder), followed
                    )
                    task = make_finetune("tulu3", dataclasses.asdict(task.settings) | {"micro_batch_size": rows})
            spans = [after - before for before, after in itertools.pairwise(times)][: options.steps]
            # An interval that begins or ends with an evaluation has it inside, on one side or the other.
            quiet = [
                span
                for number, span in enumerate(spans, 1)
                if number % task.settings.eval_every > 1 and number < options.steps
            ]
            steps[way].append(statistics.median(quiet))
            runs[way].append(times[-1] - times[0])
            if options.device == "cuda":
                peaks[way] = torch.cuda.max_memory_allocated() / 2**30
            del model
            gc.collect()  # trainer and optimiser refer to each other in circles
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.model}, {where}, {options.steps} steps, {options.rounds} rounds, torch {torch.__version__}\n")
    print("| way | s a step | ratio | s a run | ratio |")
    print("|---|---|---|---|---|")
    first = statistics.median(steps["bare TRL"]), statistics.median(runs["bare TRL"])
    for way in sorted(steps):
        step, run = statistics.median(steps[way]), statistics.median(runs[way])
        print(f"| {way} | {step:.3f} | {step / first[0]:.3f} | {run:.1f} | {run / first[1]:.3f} |")
    if looks:
        look = statistics.median(looks)
        share = look / (EVERY * statistics.median(steps["ours"]))
        print(f"\nA look at {len(facts)} facts takes {look:.2f} s, {100 * share:.1f} % of {EVERY} steps.")
    size, rows = task.settings.batch_size, task.settings.micro_batch_size
    tokens = sum(len(row.input_ids) for row in data.train) / len(data.train) * size
    print(f"\nA step has {size} rows, {tokens:.0f} tokens on average, {rows} rows in a pass.")
    for way, found in steps.items():
        rate = tokens / statistics.median(found)
        share = f", {100 * 6 * parameters * rate / PEAK:.1f} % of the peak" if options.device == "cuda" else ""
        print(f"{way}: the last step's loss {losses[way][-1]:.4f}, {rate:.0f} tokens a second{share}")
    print(json.dumps({"steps": steps, "runs": runs, "looks": looks, "peak GiB on the GPU": peaks}))


if __name__ == "__main__":
    main()
