"""Start a fine-tune in several processes, one a GPU, with `accelerate launch`."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from retention_bench.data import checked, find_file, shortened
from retention_bench.data.yaml_files import read_yaml
from retention_bench.display.progress import Progress
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.pipeline.plan_file import write_plan
from retention_bench.pipeline.stage import Stage
from retention_bench.store import Input, Store
from retention_bench.store.fingerprints import source_fingerprint

_log = logging.getLogger("retention_bench")

CONFIGS = Path(__file__).parent.parent.parent / "accelerate_configs"


class _Message(pydantic.BaseModel):
    """A line that a worker says; see `worker`."""

    model_config = pydantic.ConfigDict(extra="forbid")


class _Progress(_Message):
    progress: tuple[str, int, int, dict[str, float]]


class _Error(_Message):
    error: str
    usage: bool


class _OutOfMemory(_Message):
    out_of_memory: Literal[True]


class _Bug(_Message):
    bug: str


class _Notice(_Message):
    notice: str


@dataclasses.dataclass(frozen=True)
class Launcher:
    """A checked configuration of `accelerate`.

    Attributes:
        file: Its file.
        content: What the file says.
        processes: How many processes it starts.
    """

    file: Input
    content: Mapping[str, Any]
    processes: int

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients and optimiser are spread over the processes."""
        return self.content["distributed_type"] == "FSDP"


def launcher(named: str, device: str) -> Launcher:
    """Read a configuration and check that fine-tunes can be started with it.

    Args:
        named: `ddp`, `fsdp`, or a file that `accelerate config` wrote.
        device: `"cpu"` or `"cuda"`.

    Raises:
        UsageError: No such file, not one for processes on this machine, or more of them than GPUs.
    """
    shipped = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    allowed = f"Allowed: {', '.join(shipped)}, or a YAML file that `accelerate config` wrote."
    try:
        path = shipped[named] if named in shipped else find_file(named, "configuration").resolve()
        content = read_yaml(path, "configuration")
    except UsageError as error:
        raise UsageError(f"--accelerate-config: {error} {allowed}") from error
    kind = content.get("distributed_type") if isinstance(content, dict) else None
    if kind not in ("MULTI_GPU", "FSDP"):
        raise UsageError(f"{path} has the distributed_type {shortened(kind)}. Allowed: MULTI_GPU, FSDP.")
    if content.get("num_machines", 1) != 1:
        raise UsageError(f"{path} has num_machines {shortened(content['num_machines'])}. Allowed: 1.")
    if kind == "FSDP":
        settings = content.get("fsdp_config") or {}
        if not isinstance(settings, dict):
            raise UsageError(f"{path}: fsdp_config is {shortened(settings)}. Allowed: a mapping.")
        _check_fsdp(path, settings, device)
    processes = content.get("num_processes")
    if device != "cpu":
        import torch

        count = torch.cuda.device_count()
        processes = count if processes is None else processes
        if isinstance(processes, int) and processes > count:
            raise UsageError(f"{path} asks for {processes} processes and {count} GPUs are visible. Set num_processes.")
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 2:
        raise UsageError(
            f"{path} starts {shortened(processes)} processes with --device {device}. Allowed: num_processes from 2; "
            "for one, leave --accelerate-config out. Without a GPU one process uses all cores."
        )
    return Launcher(Input(str(path), source_fingerprint(str(path), None)), content, processes)


def check_one_gpu() -> None:
    """Refuse to fine-tune in one process that sees several GPUs: the trainer would use them all, and badly.

    Raises:
        UsageError: Several GPUs are visible.
    """
    import torch

    count = torch.cuda.device_count()
    if count > 1:
        raise UsageError(
            f"{count} GPUs are visible. Fine-tune on all of them with --accelerate-config ddp, or fsdp where a model "
            "does not fit one; or choose one: CUDA_VISIBLE_DEVICES=0."
        )


def _check_fsdp(path: Path, settings: Mapping[str, Any], device: str) -> None:
    if device == "cpu":
        raise UsageError(f"{path} spreads a model over GPUs, and the device is cpu. Leave --accelerate-config out.")
    # The second version alone spreads a model so that it can be put together again in place. A model that only the
    # first process has read could not be evaluated before it is spread, nor one on the CPU in between.
    usual = {"fsdp_version": 1, "fsdp_cpu_ram_efficient_loading": True, "fsdp_offload_params": False}
    for name, wanted in (
        ("fsdp_version", 2),
        ("fsdp_cpu_ram_efficient_loading", False),
        ("fsdp_offload_params", False),
    ):
        if settings.get(name, usual[name]) != wanted:
            given = shortened(settings[name]) if name in settings else "left out"
            raise UsageError(f"{path}: {name} under fsdp_config is {given}. Allowed: {str(wanted).lower()}.")


def launch(
    stage: Stage,
    start: Launcher,
    settings: Mapping[str, Any],
    folder: Path,
    work: Path,
    store: Store,
    progress: Progress,
) -> None:
    """Train in several processes; with half the micro-batch, from their last checkpoint, where memory runs out.

    Args:
        stage: The fine-tune; the store holds all that it needs.
        start: How to start the processes.
        settings: The fine-tune's settings.
        folder: Where the result goes.
        work: A folder that outlives a kill.
        store: The store.
        progress: Told every step.

    Raises:
        UsageError: As `Finetune.train`.
        RetentionBenchError: As `Finetune.train`, or a process was ended from outside; what they printed last is quoted.
        RuntimeError: A process raised another error, whose traceback is quoted.
    """
    batch_size: int = settings["batch_size"]
    micro_batch = min(max(1, batch_size // start.processes), settings["micro_batch_size"])
    write_plan(stage, work / "plan.json")
    order = [str(work / "plan.json"), stage.key, str(store.root), str(folder), str(work)]
    while not _finished([*order, str(micro_batch)], start, progress):
        if micro_batch == 1:
            raise RetentionBenchError(
                f"A single row of up to {settings['max_length']} tokens does not fit the memory of a GPU. Lower "
                "max_length, train an adapter, or spread the model over GPUs with --accelerate-config fsdp."
            )
        micro_batch = next(n for n in range(micro_batch // 2, 0, -1) if batch_size % n == 0)


def _finished(order: Sequence[str], start: Launcher, progress: Progress) -> bool:
    """Start the processes with an order for `worker`, and wait for them; False where memory ran out.

    Raises:
        RetentionBenchError: As `launch`.
        RuntimeError: As `launch`.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", start.file.path, "--num_processes", str(start.processes)]
    command += ["--module", "retention_bench.pipeline.distributed.worker", *order]
    said: list[dict[str, Any]] = []
    printed: collections.deque[str] = collections.deque(maxlen=60)  # torch alone says forty about a process that ended
    # The processes end when their standard input does: nothing is left running where this process is killed.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                message = _message(line)
                if message is None:
                    printed.append(line)
                elif "progress" in message:
                    stage, done, total, figures = message["progress"]
                    progress(stage, done, total, figures)
                elif "notice" in message:
                    _log.warning("%s", message["notice"])
                else:
                    said.append(message)
        finally:
            process.terminate()
    # Where one process ends, others may fail because they lost it: the first of these is the reason.
    for message in said:
        if "error" in message:
            raise (UsageError if message["usage"] else RetentionBenchError)(message["error"])
    if any("out_of_memory" in message for message in said):
        return False
    for message in said:
        raise RuntimeError(f"A process of the fine-tune failed:\n{message['bug']}")
    if process.returncode != 0:
        raise RetentionBenchError(
            f"A process of the fine-tune ended with code {process.returncode}. The same command goes on from its last "
            "checkpoint. They printed last:",
            "".join(printed).rstrip(),
        )
    return True


def _message(line: str) -> dict[str, Any] | None:
    """What a worker said, or None for what a library printed."""
    try:
        message = json.loads(line)
        checked(_Progress | _Notice | _Error | _OutOfMemory | _Bug, message, "")  # type: ignore[arg-type]
    except (ValueError, RecursionError, RetentionBenchError):
        return None
    return message
