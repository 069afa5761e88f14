"""Score checkpoints that are there already, many of them on one live engine."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retention_bench.analysis import clustered, rate
from retention_bench.data import read_json
from retention_bench.data.durable import canonical, file_sha256
from retention_bench.display.progress import Progress, silent
from retention_bench.errors import RetentionBenchError, UsageError, unknown_name
from retention_bench.facts import FactSet
from retention_bench.models.explain import explained, reason, without_bars
from retention_bench.models.loading import load_config, local_folder, read_settings
from retention_bench.models.reference import Reference, fetch
from retention_bench.results.kinds import KINDS
from retention_bench.results.score_file import ScoreFile
from retention_bench.scoring.checkpoints.parity import check_parity
from retention_bench.scoring.engine_process import EngineError, EngineProcess
from retention_bench.scoring.stop_words import STOP_WORDS_VERSION
from retention_bench.store.fingerprints import config_file, model_fingerprint
from retention_bench.store.output import exclusive
from retention_bench.store.store import versions

if TYPE_CHECKING:
    from retention_bench.models import Checkpoint
    from retention_bench.scoring.engine import Engine

VERSION = 5
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
        tokenizer: A folder to take the tokenizer from, for checkpoints without one.
        tensor_parallel_size: GPUs that each layer is spread over, for `"vllm"`.
    """

    backend: str
    dtype: str
    device: str
    kinds: tuple[str, ...]
    also: tuple[str, ...] = ()
    include_path: str | None = None
    batch_size: int = 64
    allow_pickle: bool = False
    tokenizer: str | None = None
    tensor_parallel_size: int = 1


@dataclasses.dataclass(frozen=True)
class _Found:
    """A checkpoint whose files are there.

    Attributes:
        reference: Which one it is.
        checkpoint: Its files.
        keys: By task, of the checkpoint's content and of all that its score depends on.
        architecture: Equal for checkpoints that one vLLM engine can take one after the other.
    """

    reference: Reference
    checkpoint: Checkpoint
    keys: Mapping[str, str]
    architecture: str


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

    Checkpoints of one architecture are scored one after another on one engine, while the next one's files are read. The
    first that is put together in a certain way is compared with a model that nothing of ours has loaded. One that
    cannot be scored, whatever goes wrong, is recorded with the reason, and the others go on.

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
        The lines of every checkpoint and task, in the order of `references`: see `ScoreFile`.

    Raises:
        UsageError: A name or a task occurs twice, or nothing is asked.
        RetentionBenchError: The output folder or a task cannot be used; what was scored before is kept.
    """
    unreadable = unreadable or {}
    if options.tokenizer is not None:
        options = dataclasses.replace(options, tokenizer=str(local_folder(options.tokenizer)))
    names = [*(reference.name for reference in references), *unreadable]
    for what, given in (("checkpoint", names), ("task", [*options.kinds, *options.also])):
        if len(set(given)) < len(given):
            twice = next(name for name in given if given.count(name) > 1)
            raise UsageError(f"The {what} {twice!r} is given twice. Give each once.")
    with exclusive(out, "score"), without_bars():
        file = ScoreFile(out / "scores.jsonl")
        failed = {name: [file.add({"checkpoint": name, "error": reason})] for name, reason in unreadable.items()}
        found = _Batch(facts, file, options, announce, progress, process).run(references)
    return [row for name in names for row in (found | failed)[name]]


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
        from retention_bench.scoring.judge import objects_of
        from retention_bench.scoring.tasks import documents

        self.facts, self.file, self.options = facts, file, options
        self.announce, self.progress = announce, progress
        self.tasks = [KINDS[kind].task for kind in options.kinds if documents(facts, kind)] + list(options.also)
        if not self.tasks:
            raise UsageError(
                f"The facts have no question of the kinds {', '.join(options.kinds)}. Edited facts have a target_new, "
                "paraphrases and neighborhood; the others are intrinsic."
            )
        self.manager = _task_manager(options) if options.also else None
        self.contents = {task: _task_content(self.manager, task, options.include_path) for task in options.also}
        self.engine: Engine | None = None
        self.asked = facts
        self.objects = objects_of(facts)
        self.left_out: Mapping[str, tuple[str, ...]] = {}
        self.process = process
        self.architecture = ""
        self.passed: dict[object, dict[str, Any]] = {}
        self.parity: dict[str, Any] | None = None
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def run(self, references: Sequence[Reference]) -> dict[str, list[dict[str, Any]]]:
        """Score all that is not in the file.

        Returns:
            The lines of each checkpoint by its name.
        """
        ordered = self._by_architecture(references)
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._find, ordered[0]) if ordered else None
            try:
                for number, reference in enumerate(ordered):
                    assert coming is not None
                    found = coming.result()
                    following = ordered[number + 1 : number + 2]
                    # Hashing it brings its files into memory, so that loading it afterwards takes next to nothing.
                    coming = reader.submit(self._find, following[0]) if following else None
                    self.rows[reference.name] = self._score(reference, found)
            finally:
                self._close()
                if self.process is not None:
                    self.process.close()  # there was nothing to score
        return self.rows

    def _by_architecture(self, references: Sequence[Reference]) -> list[Reference]:
        """The checkpoints that have a configuration of a supported model, those of one architecture together."""
        groups: dict[str, list[Reference]] = {}
        for reference in references:
            try:
                path = config_file(reference.base, reference.revision)
                load_config(path.parent)
                config = _config(path.parent)
            except Exception as error:
                self.announce(reference.name, False)
                self.rows[reference.name] = [self._fail(reference, error)]
                continue
            groups.setdefault(config, []).append(reference)
        return [reference for group in groups.values() for reference in group]

    def _fail(self, reference: Reference, error: BaseException, task: str | None = None) -> dict[str, Any]:
        """Record why a checkpoint cannot be scored, or not on one task."""
        if isinstance(error, RetentionBenchError):
            text = str(error)
        elif isinstance(error, OSError):
            text = f"{reference.name} cannot be read ({error}). Check the files and their permissions."
        else:
            text = f"{reference.name} cannot be scored ({reason(error)})."
        if task is not None:
            return self.file.add({"checkpoint": reference.name, "task": task, "error": f"Task {task!r}: {text}"})
        return self.file.add({"checkpoint": reference.name, "error": text})

    def _find(self, reference: Reference) -> _Found | Exception:
        """Fetch a checkpoint and hash it."""
        import torch

        from retention_bench.models import Checkpoint

        try:
            folder = fetch(reference, allow_pickle=self.options.allow_pickle)
            checkpoint = Checkpoint(
                str(folder),
                reference.delta,
                reference.adapter,
                self.options.tokenizer,
                getattr(torch, self.options.dtype),
                self.options.allow_pickle,
            )
            architecture = _config(folder) + _tokenizer(Path(self.options.tokenizer or folder))
            return _Found(reference, checkpoint, self._keys(reference), architecture)
        except Exception as error:
            return error

    def _keys(self, reference: Reference) -> dict[str, str]:
        """By task the key of all that a checkpoint's score depends on."""
        inputs = {
            "version": VERSION,
            "versions": versions(),
            "base": model_fingerprint(reference.base, reference.revision),
            "delta": file_sha256(Path(reference.delta)) if reference.delta else None,
            "adapter": _files(Path(reference.adapter)) if reference.adapter else None,
            "tokenizer": _files(Path(self.options.tokenizer)) if self.options.tokenizer else None,
            "facts": self.facts.sha256,
            "stop_words": STOP_WORDS_VERSION,
            "backend": self.options.backend,
            "dtype": self.options.dtype,
            "device": self.options.device,
        }
        own = hashlib.sha256(canonical(inputs).encode()).hexdigest()[:32]
        also = {
            task: hashlib.sha256(canonical([own, content]).encode()).hexdigest()[:32]
            for task, content in self.contents.items()
        }
        return dict.fromkeys(self.tasks, own) | also

    def _score(self, reference: Reference, found: _Found | Exception) -> list[dict[str, Any]]:
        if isinstance(found, Exception):
            self.announce(reference.name, False)
            return [self._fail(reference, found)]
        missing = [task for task in self.tasks if self.file.find(found.keys[task], task) is None]
        self.announce(reference.name, not missing)
        failed: list[dict[str, Any]] = []
        try:
            if missing:
                self._swap(found)
                if self._keys(reference) != found.keys:
                    raise RetentionBenchError(
                        f"The files of {reference.name} changed while they were read. Run the same command again."
                    )
                failed = self._ask(found, missing)
        except Exception as error:
            failed = [self._fail(reference, error)]
            if isinstance(error, EngineError) or not isinstance(error, RetentionBenchError):
                self._close()  # the next checkpoint starts another
        return [*self._kept(found), *failed]

    def _kept(self, found: _Found) -> list[dict[str, Any]]:
        """The checkpoint's lines; what was scored of the same content under another name is written under this too."""
        lines = []
        for task in self.tasks:
            line = self.file.find(found.keys[task], task)
            if line is None:
                continue
            latest = self.file.latest(found.reference.name, task)
            if latest is None or latest["key"] != line["key"]:
                copied = {k: v for k, v in line.items() if k not in ("sha256", "checkpoint")}
                latest = self.file.add({"checkpoint": found.reference.name, **copied})
            lines.append(latest)
        return lines

    def _swap(self, found: _Found) -> None:
        from retention_bench.scoring import describe_left_out, scorable

        if self.engine is None or found.architecture != self.architecture:
            self._close()
            process, self.process = self.process, None
            self.engine = _start(found.checkpoint, self.options, self.progress, process)
            self.architecture = found.architecture
        self.engine.swap(found.checkpoint)
        self.asked, self.left_out = scorable(
            self.facts, self.engine.lm.tokenizer, context=getattr(self.engine.lm, "max_length", None)
        )
        if not len(self.asked):
            raise RetentionBenchError(
                f"No fact can be asked: {describe_left_out(self.left_out)}. Give facts whose objects begin with "
                "content words of their own."
            )
        way = (found.architecture, found.checkpoint.way())
        if way not in self.passed:
            name = found.reference.name
            options = self.options
            self.passed[way] = check_parity(
                self.engine, name, found.checkpoint, self.asked, backend=options.backend, device=options.device
            )
        self.parity = self.passed[way]

    def _close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine, self.architecture = None, ""

    def _ask(self, found: _Found, tasks: Sequence[str]) -> list[dict[str, Any]]:
        """Ask for the tasks that are missing.

        Returns:
            A line for each of lm-eval's tasks that failed; the others are asked all the same.
        """
        from retention_bench.scoring import score_lm

        assert self.engine is not None

        def about(task: str) -> dict[str, Any]:
            return {
                "checkpoint": found.reference.name,
                "key": found.keys[task],
                "backend": self.options.backend,
                "dtype": self.options.dtype,
                "device": self.options.device,
                "facts": self.facts.sha256,
                "stop_words": STOP_WORDS_VERSION,
                "versions": versions(),
                "parity": self.parity,
                "task": task,
            }

        kinds = [kind for kind in self.options.kinds if KINDS[kind].task in tasks]
        began = time.monotonic()
        samples = (
            [sample.to_json() for sample in score_lm(self.engine.lm, self.asked, kinds=kinds, objects=self.objects)]
            if kinds
            else []
        )
        seconds = time.monotonic() - began
        for kind in kinds:
            own = [sample for sample in samples if sample["kind"] == kind]
            answered = rate(sum(s["hit"] for s in own), len(own))
            if len({s["fact_id"] for s in own}) < len(own):
                answered = clustered(((s["fact_id"], s["hit"]) for s in own), "fact")
            share = round(seconds * len(own) / max(1, len(samples)), 3)
            left_out = {why: {"facts": len(ids), "first": list(ids[:10])} for why, ids in self.left_out.items()}
            line = {**about(KINDS[kind].task), **answered.to_json(), "left_out": left_out}
            self.file.add({**line, "seconds": share, "samples": own})
        failed = []
        for task in self.options.also:
            if task in tasks:
                began = time.monotonic()
                try:
                    metrics = self._general(task)
                except EngineError:
                    raise
                except (Exception, SystemExit) as error:  # a task brings code of its own
                    failed.append(self._fail(found.reference, error, task))
                    continue
                seconds = round(time.monotonic() - began, 3)
                self.file.add({**about(task), "metrics": metrics, "seconds": seconds})
        return failed

    def _general(self, task: str) -> dict[str, float | None]:
        """What lm-eval finds on one of its own tasks; None for what is no number, as a perplexity of a broken model.

        Raises:
            RetentionBenchError: The task's data cannot be loaded.
        """
        from lm_eval.evaluator import evaluate

        from retention_bench.scoring.quiet_lm_eval import quiet_lm_eval

        assert self.engine is not None
        assert self.manager is not None
        with quiet_lm_eval():
            with explained(f"task {task!r}", "task"):
                loaded = self.manager.load([task])
            found = evaluate(lm=self.engine.lm, task_dict=loaded, bootstrap_iters=0)
        own = found["results"].get(task) or found.get("groups", {}).get(task, {})
        numbers = _numbers(own) or {  # of a tag, or a group without an aggregate
            f"{part} {name}": v for part, values in found["results"].items() for name, v in _numbers(values).items()
        }
        return {name: v if math.isfinite(v) else None for name, v in numbers.items()}


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    return {name: v for name, v in results.items() if isinstance(v, (int, float)) and name != "sample_len"}


def _start(checkpoint: Checkpoint, options: Options, progress: Progress, process: EngineProcess | None) -> Engine:
    if options.backend == "hf":
        from retention_bench.scoring.hf import HFEngine

        return HFEngine(device=options.device, batch_size=options.batch_size, progress=progress)
    from retention_bench.scoring.vllm import VLLMEngine

    return VLLMEngine(
        checkpoint.folder,
        device=options.device,
        dtype=checkpoint.dtype,
        load_format="dummy",
        tensor_parallel_size=options.tensor_parallel_size,
        progress=progress,
        process=process,
        tokenizer=checkpoint.tokenizer,
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


def _task_content(manager: Any, task: str, include_path: str | None) -> dict[str, str]:
    """What tells a task of one's own from itself after it was changed: its folder's files, and the data it names.

    Of lm-eval's own tasks the version is in the key already.
    """
    entry = manager.task_index[task]
    if include_path is None or not Path(entry.yaml_path or include_path).is_relative_to(include_path):
        return {}
    found: dict[str, str] = {}
    for path in sorted(Path(include_path).rglob("*")):
        if path.is_file():
            found[str(path.relative_to(include_path))] = file_sha256(path)
            if path.suffix in (".yaml", ".yml") or path.name.startswith("_"):
                named = (word.strip("\"',[]{}") for word in path.read_text(encoding="utf-8", errors="replace").split())
                found |= {name: file_sha256(Path(name)) for name in named if "/" in name and Path(name).is_file()}
    return found


def _config(folder: Path) -> str:
    """What of a folder's configuration decides whether a checkpoint fits the same engine."""
    left_out = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
    config = {name: value for name, value in read_settings(folder).items() if name not in left_out}
    path = folder / "generation_config.json"
    written = read_json(path, dict[str, Any]) if path.is_file() else {}
    return canonical([config, {name: value for name, value in written.items() if name not in left_out}])


def _tokenizer(folder: Path) -> str:
    """What of a tokenizer decides which ids a prompt gets."""
    path = folder / "tokenizer_config.json"
    config = read_json(path, dict[str, Any]) if path.is_file() else {}
    own = {name: value for name, value in config.items() if name.startswith("add_") or name.endswith("_token")}
    return canonical(
        [own, {name: file_sha256(folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file()}]
    )


def _files(folder: Path) -> dict[str, str]:
    kinds = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
    return {p.name: file_sha256(p) for p in sorted(folder.iterdir()) if p.suffix in kinds and p.is_file()}
