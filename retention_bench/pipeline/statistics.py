"""Key statistics as a thing of their own: measured, put together from shards, imported and inspected.

`evaluate` asks for them under the same key as `retention-bench statistics`, so what either computed the other finds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.pipeline.cell import Stage
from retention_bench.pipeline.disk import disk_errors
from retention_bench.pipeline.inputs import Input, model_inputs
from retention_bench.pipeline.loading import load
from retention_bench.pipeline.planning import VERSIONS, statistics_stage
from retention_bench.pipeline.rows import Texts
from retention_bench.pipeline.store import Store, file_sha256, versions
from retention_bench.pipeline.suite import ModelConfig, StatisticsConfig
from retention_bench.progress import Progress, silent

FILE = "statistics.safetensors"
COMPARED = 20
"""Texts of a corpus that imported statistics are compared with the model on."""

Load = Callable[[], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Request:
    """What `retention-bench statistics` was asked, as its options have it; see there.

    Exactly one of `inspect`, `merge` and `from_npz` may be given; with none of them, statistics are measured.
    """

    model: str | None = None
    revision: str | None = None
    layers: str | None = None
    corpus: str | None = None
    corpus_revision: str | None = None
    corpus_config: str | None = None
    samples: int = 100_000
    max_length: int = 1024
    dtype: str = "float32"
    device: str = "cpu"
    memory: float | None = None
    shard: str | None = None
    merge: tuple[Path, ...] = ()
    from_npz: tuple[str, ...] = ()
    inspect: Path | None = None
    out: Path | None = None
    dry_run: bool = False


def answer(
    request: Request,
    store: Store,
    *,
    announce: Callable[[str, bool], None] = lambda title, cached: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Do what was asked.

    Args:
        request: What was asked.
        store: Where statistics are kept.
        announce: Told what is done, and whether the store held it.
        progress: Told the texts done.

    Returns:
        With `inspect`, what the file holds; else `file`, the file in the store, and `in_store`, whether it is there.

    Raises:
        UsageError: Options that are missing, contradict each other or are not well formed; and as the functions below.
        RetentionBenchError: As the functions below.
    """
    ways = [name for name in ("inspect", "merge", "from_npz") if getattr(request, name)]
    if len(ways) > 1:
        named = " and ".join("--" + name.replace("_", "-") for name in ways)
        raise UsageError(f"{named} were given together. Give one of them.")
    if request.dry_run and ways:
        raise UsageError(f"--dry-run and --{ways[0].replace('_', '-')} were given together. It is for measuring.")
    if request.inspect:
        return inspect(request.inspect)
    if request.out:
        _check_out(request.out)
    if request.merge:
        file = merge(store, request.merge)
    elif request.from_npz:
        model = _model(request)
        corpus = _corpus(request) if request.corpus else None
        texts = Texts(corpus.source, corpus.revision, corpus.config, COMPARED) if corpus else None
        files = _files(request.from_npz)
        file = import_npz(store, model, request.device, files, lambda: _load(model, request.device), texts)
    else:
        model, corpus = _model(request), _corpus(request)
        stage = statistics_stage(model, request.device, corpus, _layers(request.layers), _shard(request.shard))
        held = store.holds(stage.name, stage.inputs)
        if request.dry_run:
            place = store.root / stage.name / store.key(stage.name, stage.inputs) / FILE
            return {"file": str(place), "in_store": held}
        announce(stage.title, held)
        memory = int(request.memory * 2**30) if request.memory else None
        file = measure(store, stage, lambda: _load(model, request.device), corpus, memory=memory, progress=progress)
    if request.out:
        with disk_errors("the file for --out", request.out.parent):
            request.out.parent.mkdir(parents=True, exist_ok=True)
            partial = request.out.with_name(f".{request.out.name}.{os.getpid()}")
            shutil.copyfile(file, partial)
            partial.replace(request.out)
    return {"file": str(file), "in_store": True}


def measure(
    store: Store,
    stage: Stage,
    loader: Load,
    corpus: StatisticsConfig,
    *,
    memory: int | None = None,
    progress: Progress = silent,
) -> Path:
    """Measure key statistics, unless the store holds them; a run that was cut off goes on where it was.

    Args:
        store: The store.
        stage: From `statistics_stage`.
        loader: Gives the model and its tokenizer; called only where something is to be measured.
        corpus: The texts, their source absolute; the same that the stage was made from.
        memory: Bytes that the sums may take; see `collect_key_statistics`.
        progress: Told the texts done.

    Returns:
        The file.

    Raises:
        UsageError: A layer that the model lacks, texts longer than its positions, or too little memory.
        RetentionBenchError: The corpus cannot be read, or a key is not finite.
    """
    inputs = {name: value for name, value in stage.inputs.items() if name != "shard"}
    shard = stage.inputs.get("shard")

    def compute(folder: Path) -> None:
        from retention_bench.editors import collect_key_statistics

        model, tokenizer = loader()
        index, count = shard or (0, 1)
        # A file is passed round: where the corpus lay on one machine means nothing on another.
        named = Path(corpus.source).name if Path(corpus.source).is_file() else corpus.source
        collect_key_statistics(
            model,
            tokenizer,
            Texts(corpus.source, corpus.revision, corpus.config, corpus.texts),
            stage.inputs["layers"],
            max_length=corpus.max_length,
            memory=memory,
            shard=(index, count) if shard else None,
            checkpoint=store.scratch(stage.name, stage.inputs) / "checkpoint.safetensors",
            source=f"the first {corpus.texts} texts of {named}",
            settings={"inputs": inputs, "versions": versions()},
            total=len(range(index, corpus.texts, count)),
            progress=progress,
        ).save(folder / FILE)

    return store.get(stage.name, stage.inputs, compute, stage.reads) / FILE


def merge(store: Store, files: Sequence[Path]) -> Path:
    """Put statistics that were measured elsewhere, whole or in shards, where `evaluate` finds them.

    Args:
        store: The store.
        files: All shards of one measurement, or one whole file.

    Returns:
        The file in the store.

    Raises:
        UsageError: The files are not the whole of one measurement, do not say what they were measured for, or were
            measured with other versions of what computes them.
        RetentionBenchError: A file is missing or broken.
    """
    from retention_bench.editors import KeyStatistics

    merged = KeyStatistics.merged([KeyStatistics.load(file) for file in files])
    settings = merged.measured.settings
    if "inputs" not in settings:
        raise UsageError(
            f"{files[0]} does not say what model and corpus it was measured for, so there is no key to keep it under. "
            "Give files that `retention-bench statistics` measured."
        )
    here = {"version": VERSIONS["statistics"], **versions()}
    there = {"version": settings["inputs"]["version"], **settings["versions"]}
    other = {name: (there.get(name), here[name]) for name in here if there.get(name) != here[name]}
    if other:
        listed = ", ".join(f"{name} {theirs}, here {ours}" for name, (theirs, ours) in other.items())
        raise UsageError(
            f"The statistics were measured with other versions ({listed}), which may compute something else. "
            "Use the same versions here, or measure anew."
        )
    return store.get("statistics", settings["inputs"], lambda folder: merged.save(folder / FILE)) / FILE


def import_npz(
    store: Store, model: ModelConfig, device: str, files: Mapping[int, Path], loader: Load, corpus: Texts | None
) -> Path:
    """Import the covariance files of the reference editors' own code, checked against a model.

    Args:
        store: The store, which keeps the result under the files' hashes and the model's.
        model: The model that they belong to, its path absolute.
        device: `"cpu"` or `"cuda"`.
        files: The `.npz` file of each layer.
        loader: Gives the model and its tokenizer.
        corpus: Text to compare on; None for a little English.

    Returns:
        The file.

    Raises:
        UsageError: The files are not this model's.
        RetentionBenchError: A file is missing, not of that form, or its matrix is no second moment.
    """
    for path in files.values():
        if not path.is_file():
            raise UsageError(f"There is no file {path}. Give the .npz file of a layer as LAYER=FILE.")
    hashes = {str(layer): file_sha256(path) for layer, path in sorted(files.items())}
    inputs = {"version": VERSIONS["statistics"], **model_inputs(model, device), "npz": hashes}
    reads = [Input(str(path), {"sha256": hashes[str(layer)]}) for layer, path in files.items()]
    reads.append(Input(model.path, inputs["model"]))

    def compute(folder: Path) -> None:
        from retention_bench.editors import KeyStatistics

        loaded, tokenizer = loader()
        given = {"texts": list(itertools.islice(corpus, COMPARED))} if corpus else {}
        source = ", ".join(path.name for path in files.values())
        KeyStatistics.from_npz(files, model=loaded, tokenizer=tokenizer, source=source, **given).save(folder / FILE)

    return store.get("statistics", inputs, compute, reads) / FILE


def inspect(path: Path) -> dict[str, Any]:
    """What a file of key statistics holds, as JSON values.

    Args:
        path: The file.

    Returns:
        `source`, `tokens`, `probe` (whether it can tell its model), the fields of `Measurement`, and by layer in
        `layers` the projection's name, `size` and the fields of `Spectrum`, an infinite condition as None.

    Raises:
        RetentionBenchError: There is no such file, or it holds no statistics.
    """
    from retention_bench.editors import KeyStatistics

    statistics = KeyStatistics.load(path)
    measured = dataclasses.asdict(statistics.measured)
    modules = measured.pop("modules")
    layers = {}
    for layer, moment in statistics.moments.items():
        spectrum = dataclasses.asdict(statistics.spectrum(layer))
        if not math.isfinite(spectrum["condition"]):
            spectrum["condition"] = None
        layers[str(layer)] = {"module": modules.get(layer), "size": len(moment), **spectrum}
    return {
        "file": str(path),
        "source": statistics.source,
        "tokens": statistics.tokens,
        "probe": set(statistics.probe) == set(statistics.moments),
        **measured,
        "layers": layers,
    }


def _check_out(path: Path) -> None:
    """Refuse to write over a file that holds no key statistics.

    Raises:
        UsageError: There is something else, or there can be no such file.
    """
    from retention_bench.editors import KeyStatistics

    remedy = "Give the name of a new file with --out."
    try:
        regular = stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UsageError(
            f"There can be no file {str(path)!r}: {getattr(error, 'strerror', error)}. {remedy}"
        ) from error
    try:
        if regular:
            KeyStatistics.load(path)
            return
    except RetentionBenchError as error:
        raise UsageError(
            f"{path} is there already and holds no key statistics. Nothing was touched. {remedy}"
        ) from error
    raise UsageError(f"{path} is there already and is no regular file. Nothing was touched. {remedy}")


def _load(model: ModelConfig, device: str) -> tuple[Any, Any]:
    return load(model.path, model.revision, dtype=model.dtype, device=device)


def _needed(value: str | None, option: str) -> str:
    if value is None:
        raise UsageError(f"{option} is missing. See `retention-bench statistics --help`.")
    return value


def _model(request: Request) -> ModelConfig:
    """The model with its path absolute."""
    path = _needed(request.model, "--model")
    if Path(path).is_dir():
        path = str(Path(path).resolve())
    dtype: Any = request.dtype  # checked here
    return ModelConfig(path=path, revision=request.revision, dtype=dtype, editors={}, finetunes={})


def _corpus(request: Request) -> StatisticsConfig:
    """The corpus with its path absolute."""
    source = _needed(request.corpus, "--corpus")
    if Path(source).is_file() or source.endswith((".jsonl", ".gz")):
        source = str(Path(source).resolve())
    return StatisticsConfig(
        source=source,
        revision=request.corpus_revision,
        config=request.corpus_config,
        texts=request.samples,
        max_length=request.max_length,
    )


def _layers(given: str | None) -> list[int]:
    """Layers out of `0,1,2` or `13-17`."""
    layers: list[int] = []
    for part in _needed(given, "--layers").split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UsageError(f"--layers is {given!r}. Give numbers from 0 on, as 0,1,2 or 13-17.")
        layers += range(int(first), int(last if dash else first) + 1)
    return layers


def _shard(given: str | None) -> tuple[int, int] | None:
    """A shard out of `I/N`."""
    if given is None:
        return None
    index, _, count = given.partition("/")
    if not index.isdecimal() or not count.isdecimal() or int(index) >= int(count):
        raise UsageError(f"--shard is {given!r}. Of N shards, give 0/N to (N - 1)/N, as 0/4.")
    return int(index), int(count)


def _files(given: Sequence[str]) -> dict[int, Path]:
    """Files by layer out of `LAYER=FILE`."""
    files: dict[int, Path] = {}
    for part in given:
        layer, _, path = part.partition("=")
        if not layer.isdecimal() or not path:
            raise UsageError(f"--from-npz is {part!r}. Give LAYER=FILE, as 13=layer13.npz.")
        if int(layer) in files:
            raise UsageError(f"--from-npz names layer {int(layer)} twice. Give one file a layer.")
        files[int(layer)] = Path(path)
    return files
