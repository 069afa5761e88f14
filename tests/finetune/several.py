"""Run by `test_processes.py` in two processes: fine-tune one model after another, and write what became of each.

The only argument is a JSON file: whether to shard, and a list of what `fine_tune` takes.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate.state
import torch
from accelerate import PartialState

from retention_bench.finetune import Dose, FinetuneOptions, Terms, make_finetune, processes, train
from retention_bench.models import load_model
from retention_bench.scoring import RetentionHFLM


def pretend_accelerators() -> None:
    """`accelerate` shards on accelerators alone, but torch does so on CPUs as well: say that these are some."""
    join = PartialState.__init__

    def joined(self: PartialState, *args: object, **kwargs: object) -> None:
        join(self, *args, **kwargs)
        self._shared_state["distributed_type"] = accelerate.state.DistributedType.MULTI_GPU

    PartialState.__init__ = joined  # type: ignore[method-assign]


def fine_tune(run: Mapping[str, Any], work: str) -> tuple[Any, Any, dict[str, Any], list[tuple[int, float]]]:
    """The model, its tokenizer, the log, and the points of its trajectory."""
    model, tokenizer = load_model(run["model"])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # each process draws its own
    points = []

    def track(dose: Dose) -> None:
        def keep(prompts: Any, logits: torch.Tensor) -> None:
            points.extend((dose.step, row.log_softmax(-1).max().item()) for row in logits)

        RetentionHFLM(model.eval(), tokenizer).answer([(5, 6, 7), (5, 6, 8, 9)], keep)
        model.train()

    task = make_finetune(run["task"], run["settings"])
    tracked = run["tracked"]
    options = FinetuneOptions(**run["options"])
    log = train(
        model,
        tokenizer,
        task,
        terms=Terms(),
        seed=0,
        output_dir=Path(run["folder"]) / work,
        options=options,
        track=track if tracked else None,
    )
    return model, tokenizer, log.to_json(), points


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    if given["shard"]:
        pretend_accelerators()
    PartialState(cpu=True)
    for run in given["runs"]:
        model, tokenizer, log, points = fine_tune(run, "work")
        if processes.index() == 0:
            model.save_pretrained(Path(run["folder"]) / "model")
            tokenizer.save_pretrained(Path(run["folder"]) / "model")
            (Path(run["folder"]) / "log.json").write_text(json.dumps({"log": log, "points": points}))
        processes.gathered(None)
    os._exit(0)  # as the worker does, see there


if __name__ == "__main__":
    main()
