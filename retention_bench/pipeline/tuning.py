"""One fine-tune, from files to files, so that it can run in this process or in others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retention_bench.data.durable import write_text
from retention_bench.facts import FactSet
from retention_bench.finetune import FinetuneOptions, Terms, make_finetune
from retention_bench.pipeline.loading import load, save
from retention_bench.progress import Progress

if TYPE_CHECKING:
    from retention_bench.finetune import Track


@dataclasses.dataclass(frozen=True)
class Job:
    """What is fine-tuned, on what and how: plain values and paths, which survive being written as JSON.

    Attributes:
        model: The base model's folder or Hub id.
        revision: Its Hub revision.
        dtype: The name of a torch dtype.
        device: `"cpu"` or `"cuda"`.
        delta: The file of the edit that is applied first; None for the unedited model.
        edits: The files of the edits whose layers `freeze` goes by.
        facts: The file of the facts that no training row may mention.
        keywords: Keywords of their relations.
        unknown: The file of the facts that the base model does not know, for a task that teaches those.
        finetune: The task's registered name.
        settings: Its settings.
        freeze: As in `Cell`.
        adapter: As in `Cell`.
        seed: As in `Cell`.
        track_every: As in `Cell`.
        asked: The file of the facts that are asked every `track_every` steps.
        objects: Names of objects by relation, for the token classes of the answers.
        work: A folder that outlives a kill; a run that finds another's there goes on from it.
    """

    model: str
    revision: str | None
    dtype: str
    device: str
    delta: str | None
    edits: tuple[str, ...]
    facts: str
    keywords: Mapping[str, tuple[str, ...]]
    unknown: str | None
    finetune: str
    settings: Mapping[str, Any]
    freeze: str
    adapter: str
    seed: int
    track_every: int
    asked: str | None
    objects: Mapping[str, list[str]]
    work: str


def tune(job: Job, folder: Path, progress: Progress) -> None:
    """Edit a model, fine-tune it, and write it to `folder/model` with `log.json`, and `trajectory.jsonl` if asked for.

    Processes of a process group may call this together, see `train`; the first of them writes.

    Args:
        job: The job.
        folder: A folder that exists.
        progress: Told every step.

    Raises:
        UsageError: As `train`.
        RetentionBenchError: As `train`.
        torch.OutOfMemoryError: As `train`.
    """
    import torch

    from retention_bench.finetune import processes, train
    from retention_bench.finetune.stopping import TRAJECTORY
    from retention_bench.models import WeightDelta

    torch.manual_seed(job.seed)
    model, tokenizer = load(job.model, job.revision, dtype=job.dtype, device=job.device)
    edits = [WeightDelta.load(Path(edit)) for edit in job.edits]
    if job.delta:
        WeightDelta.load(Path(job.delta)).apply_(model)
    work = Path(job.work)
    log = train(
        model,
        tokenizer,
        make_finetune(job.finetune, job.settings),
        terms=Terms.from_facts(FactSet.read(job.facts), keywords=job.keywords),
        seed=job.seed,
        output_dir=work,
        device=job.device,
        unknown=FactSet.read(job.unknown).facts if job.unknown else (),
        options=FinetuneOptions(job.freeze, job.adapter, job.track_every),
        edited={layer for edit in edits for layer in edit.layers(model)},
        track=_track(job, model, tokenizer),
        progress=progress,
    )
    if processes.index():
        return
    save(model, tokenizer, folder / "model")
    write_text(folder / "log.json", json.dumps(log.to_json(), indent=2, allow_nan=False))
    if job.track_every:
        # A run that was cut off may have come further than the one that ended. All names are of one length.
        last = f"trajectory-{log.steps:09}.jsonl"
        points = sorted(path for path in work.glob(TRAJECTORY) if path.name <= last)
        write_text(folder / "trajectory.jsonl", "".join(point.read_text(encoding="utf-8") for point in points))


def _track(job: Job, model: Any, tokenizer: Any) -> Track | None:
    """What asks the facts during a fine-tune; every point has a file of its own, which outlives a kill."""
    from retention_bench.finetune import processes
    from retention_bench.scoring import Prober

    if not job.track_every:
        return None
    assert job.asked is not None  # they come together
    prober = Prober(model, tokenizer, FactSet.read(job.asked), job.objects)

    def track(step: int) -> None:
        probes = prober.look()
        if processes.index() == 0:
            points = ({"step": step, **probe.to_json()} for probe in probes)
            rows = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in points)
            write_text(Path(job.work) / f"trajectory-{step:09}.jsonl", "".join(rows))

    return track
