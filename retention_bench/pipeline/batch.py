"""Score checkpoints that are there already, many of them on one live engine."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retention_bench.analysis import clustered, rate
from retention_bench.engine_process import EngineError, EngineProcess
from retention_bench.errors import RetentionBenchError, UsageError, unknown_name
from retention_bench.facts import FactSet
from retention_bench.models.reference import Reference, fetch
from retention_bench.pipeline.inputs import config_file, model_fingerprint
from retention_bench.pipeline.parity import MismatchError, check_parity
from retention_bench.pipeline.score_file import ScoreFile
from retention_bench.pipeline.store import canonical, exclusive, file_sha256, versions
from retention_bench.progress import Progress, silent

if TYPE_CHECKING:
    from retention_bench.models import Layout
    from retention_bench.scoring import Kind
    from retention_bench.scoring.engine import Engine

VERSION = 2
"""Raised when what is computed changes, so that nothing of the old is taken for the new."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclasses.dataclass(frozen=True)
class Options:
    """How checkpoints are scored.

    Attributes:
        backend: `"hf"` or `"vllm"`.
        dtype: What weights are converted to, `"float32"`, `"bfloat16"` or `"float16"`.
        device: `"cpu"` or `"cuda"`.
        kinds: The kinds of question to ask.
        also: Tasks of lm-eval's own that are run besides.
        include_path: A folder with more tasks for `also`.
        batch_size: Prompts a forward pass at most, for `"hf"`; see `RetentionHFLM`.
        allow_pickle: Also read pickled weights.
        tensor_parallel_size: GPUs that each layer is spread over, for `"vllm"`.
    """

    backend: str
    dtype: str
    device: str
    kinds: tuple[Kind, ...]
    also: tuple[str, ...] = ()
    include_path: str | None = None
    batch_size: int = 64
    allow_pickle: bool = False
    tensor_parallel_size: int = 1


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A checkpoint that can be swapped in.

    Attributes:
        reference: Which one it is.
        key: Of its content and of all that its scores depend on.
        folder: Its base model's folder.
        architecture: Equal for checkpoints that fit the same engine.
        weights: Its weights, read already for `"hf"`; None where there is nothing left to score.
    """

    reference: Reference
    key: str
    folder: Path
    architecture: str
    weights: Iterable[tuple[str, Any]] | None


def score_checkpoints(
    references: Sequence[Reference],
    facts: FactSet,
    out: Path,
    options: Options,
    *,
    unreadable: Mapping[str, str] | None = None,
    announce: Callable[[str, bool], None] = lambda title, cached: None,
    progress: Progress = silent,
    process: EngineProcess | None = None,
) -> list[dict[str, Any]]:
    """Score checkpoints; what `out/scores.jsonl` holds already is not scored again.

    Checkpoints of one architecture are scored one after another on one engine, while the next is being read. The first
    of each architecture is compared with a fresh model. One that cannot be scored is recorded with the reason, and
    the others go on.

    Args:
        references: The checkpoints; no name twice.
        facts: What to ask.
        out: Folder for `scores.jsonl`.
        options: How.
        unreadable: Names that stand for no checkpoint, each with the reason; recorded like those that cannot be scored.
        announce: Told the name of each checkpoint as it comes up, and whether all of it was scored before.
        progress: Told how many prompts are decoded.
        process: For `"vllm"`, one that has been started and not asked anything; it saves its start.

    Returns:
        The last line of every checkpoint and task, in the order of `references`: see `ScoreFile`.

    Raises:
        UsageError: A name occurs twice, or nothing is asked.
        RetentionBenchError: The engine's answers are not those of a fresh model; what was scored before is kept.
    """
    unreadable = unreadable or {}
    names = [*(reference.name for reference in references), *unreadable]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"The checkpoint {twice!r} is given twice. Give each once.")
    with exclusive(out):
        file = ScoreFile(out / "scores.jsonl")
        for name, reason in unreadable.items():
            file.add({"checkpoint": name, "error": reason})
        _Batch(facts, file, options, announce, progress, process).run(references)
    latest = {row["checkpoint"]: row.get("key") for row in file}
    # What was scored of another content, or failed once and was scored later, does not count any more.
    last = {(row["checkpoint"], row.get("task")): row for row in file if row.get("key") == latest[row["checkpoint"]]}
    order = {name: number for number, name in enumerate(names)}
    return sorted((row for row in last.values() if row["checkpoint"] in order), key=lambda r: order[r["checkpoint"]])


class _Batch:
    """One run over many checkpoints."""

    def __init__(
        self,
        facts: FactSet,
        file: ScoreFile,
        options: Options,
        announce: Callable[[str, bool], None],
        progress: Progress,
        process: EngineProcess | None,
    ) -> None:
        from retention_bench.scoring.tasks import documents

        self.facts, self.file, self.options = facts, file, options
        self.announce, self.progress = announce, progress
        self.tasks = [f"retention_{kind}" for kind in options.kinds if documents(facts, kind)] + list(options.also)
        if not self.tasks:
            raise UsageError(
                f"The facts have no question of the kinds {', '.join(options.kinds)}. Edited facts have a target_new, "
                "paraphrases and neighborhood; the others are intrinsic."
            )
        self.layouts: dict[str, Layout] = {}
        self.manager = _task_manager(options) if options.also else None
        self.engine: Engine | None = None
        self.process = process
        self.architecture = ""
        self.parity: dict[str, Any] | None = None

    def run(self, references: Sequence[Reference]) -> None:
        """Score all that is not in the file."""
        ordered = self._by_architecture(references)
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._load, ordered[0]) if ordered else None
            try:
                for number, reference in enumerate(ordered):
                    assert coming is not None
                    found = coming.result()
                    following = ordered[number + 1 : number + 2]
                    coming = reader.submit(self._load, following[0]) if following else None
                    self._score(reference, found)
                    del found
            finally:
                self._close()
                if self.process is not None:
                    self.process.close()  # there was nothing to score

    def _by_architecture(self, references: Sequence[Reference]) -> list[Reference]:
        """The checkpoints that have a configuration of a supported model, those of one architecture together."""
        groups: dict[str, list[Reference]] = {}
        for reference in references:
            try:
                path = config_file(reference.base, reference.revision)
                config = _config(path)
                if config not in self.layouts:
                    # Here and not by the reader: making a model sets torch's default dtype, for all threads.
                    self.layouts[config] = _layout(path)
            except (RetentionBenchError, OSError) as error:
                self.announce(reference.name, False)
                self._fail(reference, _unreadable(reference, error))
                continue
            groups.setdefault(config, []).append(reference)
        return [reference for group in groups.values() for reference in group]

    def _fail(self, reference: Reference, error: RetentionBenchError) -> None:
        self.file.add({"checkpoint": reference.name, "error": str(error)})

    def _load(self, reference: Reference) -> _Loaded | RetentionBenchError:
        """Fetch a checkpoint and read it, unless all of it has been scored."""
        import torch

        from retention_bench.models import Checkpoint

        try:
            folder = fetch(reference, allow_pickle=self.options.allow_pickle)
            key = self._key(reference)
            config = _config(folder / "config.json")
            architecture = config + _tokenizer(folder)
            if all((key, task) in self.file.done() for task in self.tasks):
                return _Loaded(reference, key, folder, architecture, None)
            weights = Checkpoint(
                str(folder),
                self.layouts[config],
                reference.delta,
                getattr(torch, self.options.dtype),
                reference.adapter,
                self.options.allow_pickle,
            )
            # vLLM's process reads the files itself.
            ready: Iterable[tuple[str, Any]] = list(weights) if self.options.backend == "hf" else weights
            return _Loaded(reference, key, folder, architecture, ready)
        except (RetentionBenchError, OSError) as error:
            return _unreadable(reference, error)

    def _key(self, reference: Reference) -> str:
        inputs = {
            "version": VERSION,
            "versions": versions(),
            "base": model_fingerprint(reference.base, reference.revision),
            "delta": file_sha256(Path(reference.delta)) if reference.delta else None,
            "adapter": _files(Path(reference.adapter)) if reference.adapter else None,
            "facts": self.facts.sha256,
            "backend": self.options.backend,
            "dtype": self.options.dtype,
            "device": self.options.device,
        }
        return hashlib.sha256(canonical(inputs).encode()).hexdigest()[:32]

    def _score(self, reference: Reference, found: _Loaded | RetentionBenchError) -> None:
        done = self.file.done()
        missing = (
            [] if isinstance(found, RetentionBenchError) else [t for t in self.tasks if (found.key, t) not in done]
        )
        self.announce(reference.name, not isinstance(found, RetentionBenchError) and not missing)
        if isinstance(found, RetentionBenchError):
            self._fail(reference, found)
            return
        if not missing:
            self._rename(found)
            return
        try:
            self._swap(found)
            self._ask(found, missing)
        except MismatchError:
            raise
        except RetentionBenchError as error:
            self._fail(reference, error)
            if isinstance(error, EngineError):
                self._close()  # the next checkpoint starts another

    def _rename(self, found: _Loaded) -> None:
        """Scores of the same content under another name are this checkpoint's too."""
        rows = {row["task"]: row for row in self.file if row.get("key") == found.key and row.get("task") in self.tasks}
        own = {row["task"] for row in self.file if row["checkpoint"] == found.reference.name and "key" in row}
        for task, row in rows.items():
            if task not in own:
                copied = {k: v for k, v in row.items() if k not in ("sha256", "checkpoint")}
                self.file.add({"checkpoint": found.reference.name, **copied})

    def _swap(self, found: _Loaded) -> None:
        assert found.weights is not None  # or there would be nothing to score
        if self.engine is None or found.architecture != self.architecture:
            self._close()
            process, self.process = self.process, None
            self.engine = _start(found.folder, self.options, self.progress, process)
            self.architecture = found.architecture
        self.engine.swap(found.weights)
        if self.parity is None:
            self.parity = check_parity(self.engine, found.reference, found.folder, self.facts, self.options)

    def _close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine, self.architecture, self.parity = None, "", None

    def _ask(self, found: _Loaded, tasks: Sequence[str]) -> None:
        from retention_bench.scoring import score_lm

        assert self.engine is not None
        about = {
            "checkpoint": found.reference.name,
            "key": found.key,
            "backend": self.options.backend,
            "dtype": self.options.dtype,
            "device": self.options.device,
            "facts": self.facts.sha256,
            "versions": versions(),
            "parity": self.parity,
        }
        kinds = [kind for kind in self.options.kinds if f"retention_{kind}" in tasks]
        began = time.monotonic()
        samples = [sample.to_json() for sample in score_lm(self.engine.lm, self.facts, kinds=kinds)] if kinds else []
        seconds = time.monotonic() - began
        for kind in kinds:
            own = [sample for sample in samples if sample["kind"] == kind]
            answered = rate(sum(s["hit"] for s in own), len(own))
            if len({s["fact_id"] for s in own}) < len(own):
                answered = clustered(((s["fact_id"], s["hit"]) for s in own), "fact")
            share = round(seconds * len(own) / len(samples), 3)
            self.file.add(
                {**about, "task": f"retention_{kind}", **answered.to_json(), "seconds": share, "samples": own}
            )
        for task in self.options.also:
            if task in tasks:
                began = time.monotonic()
                metrics = self._general(task)
                seconds = round(time.monotonic() - began, 3)
                self.file.add({**about, "task": task, "metrics": metrics, "seconds": seconds})

    def _general(self, task: str) -> dict[str, float]:
        """What lm-eval finds on one of its own tasks.

        Raises:
            RetentionBenchError: The task's data cannot be loaded.
        """
        from lm_eval.evaluator import evaluate

        from retention_bench.scoring import contained_lm_eval

        assert self.engine is not None
        assert self.manager is not None
        with contained_lm_eval():
            try:
                loaded = self.manager.load([task])
            except (OSError, ValueError, RuntimeError) as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise RetentionBenchError(f"The task {task!r} could not be loaded ({reason}).") from error
            found = evaluate(lm=self.engine.lm, task_dict=loaded, bootstrap_iters=0)
        own = found["results"].get(task) or found["groups"][task]
        return {name: v for name, v in own.items() if isinstance(v, (int, float)) and name != "sample_len"}


def _unreadable(reference: Reference, error: RetentionBenchError | OSError) -> RetentionBenchError:
    if isinstance(error, RetentionBenchError):
        return error
    return RetentionBenchError(f"{reference.name} cannot be read ({error}). Check the files and their permissions.")


def _start(folder: Path, options: Options, progress: Progress, process: EngineProcess | None) -> Engine:
    import torch

    dtype = getattr(torch, options.dtype)
    if options.backend == "hf":
        from retention_bench.scoring.hf import HFEngine

        return HFEngine(folder, dtype=dtype, device=options.device, batch_size=options.batch_size, progress=progress)
    from retention_bench.scoring.vllm import VLLMEngine

    return VLLMEngine(
        folder,
        device=options.device,
        dtype=dtype,
        load_format="dummy",
        tensor_parallel_size=options.tensor_parallel_size,
        progress=progress,
        process=process,
    )


def _task_manager(options: Options) -> Any:
    """lm-eval's tasks by name.

    Raises:
        UsageError: One of those that are asked for is not among them.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=options.include_path)
    for task in options.also:
        if task not in manager.all_tasks:
            raise unknown_name("task of lm-eval", task, manager.all_tasks)
    return manager


def _config(path: Path) -> str:
    """What of a configuration decides whether weights fit the same engine.

    Raises:
        RetentionBenchError: It is no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RetentionBenchError(
            f"{path} cannot be read ({error}). Give a folder that save_pretrained wrote."
        ) from error
    if not isinstance(config, Mapping):
        raise RetentionBenchError(f"{path} holds no JSON object. Give a folder that save_pretrained wrote.")
    left_out = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
    return canonical({name: value for name, value in config.items() if name not in left_out})


def _layout(path: Path) -> Layout:
    """Of the model that a configuration describes.

    Raises:
        UsageError: Its family is not supported.
        RetentionBenchError: It describes no model.
    """
    from transformers import AutoConfig

    from retention_bench.models import Layout, family

    try:
        config = AutoConfig.from_pretrained(path.parent)
        family(config.model_type)
        return Layout.of(config)
    except (OSError, ValueError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise RetentionBenchError(f"{path} describes no model that can be made ({reason}).") from error


def _tokenizer(folder: Path) -> str:
    """What of a tokenizer decides which ids a prompt gets."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own = {name: value for name, value in config.items() if name.startswith("add_") or name.endswith("_token")}
    return canonical(
        [own, {name: file_sha256(folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file()}]
    )


def _files(folder: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in sorted(folder.iterdir()) if p.suffix in (".json", ".safetensors")}
