"""Key statistics as a thing of their own: measured, put together from shards, imported and inspected.

`evaluate` asks for them under the same key as `retention-bench statistics`, so what either computed the other finds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from retention_bench.data import checked, find_file, is_local, read_json, shortened
from retention_bench.editors.settings import MOST_LAYERS
from retention_bench.errors import RetentionBenchError, UsageError, unknown_name
from retention_bench.pipeline.cell import Stage
from retention_bench.pipeline.disk import disk_errors
from retention_bench.pipeline.inputs import Input, config_file, model_inputs
from retention_bench.pipeline.loading import load
from retention_bench.pipeline.planning import VERSIONS, statistics_stage
from retention_bench.pipeline.rows import Texts
from retention_bench.pipeline.store import Store, file_sha256, versions
from retention_bench.pipeline.suite import ModelConfig, StatisticsConfig
from retention_bench.progress import Progress, silent

FILE = "statistics.safetensors"
_DTYPES = ("float32", "bfloat16", "float16")
_MOST_GIB = 2**30

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

    def __post_init__(self) -> None:
        """Refuse numbers and names out of range.

        Raises:
            UsageError: One of them is; the option is named.
        """
        for option, value in (("--samples", self.samples), ("--max-length", self.max_length)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= sys.maxsize:
                raise UsageError(f"{option} is {shortened(value)}. Give a whole number from 1 to {sys.maxsize}.")
        if self.memory is not None and not (isinstance(self.memory, int | float) and 0 < self.memory <= _MOST_GIB):
            raise UsageError(f"--memory is {shortened(self.memory)}. Give GiB, above 0 and up to {_MOST_GIB}.")
        if self.dtype not in _DTYPES:
            raise unknown_name("dtype", str(self.dtype), _DTYPES)
        if self.device not in ("cpu", "cuda", ""):  # nothing is computed to merge files
            raise unknown_name("device", str(self.device), ["cpu", "cuda"])


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
    if request.inspect and request.out:
        raise UsageError("--inspect and --out were given together. Give one of them.")
    if request.inspect:
        return inspect(request.inspect)
    if request.out and not request.dry_run:
        _check_out(request.out, request.merge)
    if request.merge:
        file = merge(store, request.merge)
    elif request.from_npz:
        model = _model(request)
        corpus = _corpus(request) if request.corpus else None
        texts = Texts(corpus.source, corpus.revision, corpus.config, COMPARED) if corpus else None
        files = _files(request.from_npz)
        _check_config(model, files)
        file = import_npz(store, model, request.device, files, lambda: _load(model, request.device), texts)
    else:
        model, corpus = _model(request), _corpus(request)
        layers, shard = _layers(request.layers), _shard(request.shard, request.samples)
        _check_config(model, layers, request.max_length)
        stage = statistics_stage(model, request.device, corpus, layers, shard)
        held = store.holds(stage.name, stage.inputs)
        if request.dry_run:
            place = store.root / stage.name / store.key(stage.name, stage.inputs) / FILE
            return {"file": str(place), "in_store": held}
        announce(stage.title, held)
        memory = int(request.memory * 2**30) if request.memory is not None else None
        file = measure(store, stage, lambda: _load(model, request.device), corpus, memory=memory, progress=progress)
    if request.out:
        from retention_bench.models import replacing

        with disk_errors("the file for --out", request.out.parent), replacing(request.out) as partial:
            shutil.copyfile(file, partial)
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

        texts = Texts(corpus.source, corpus.revision, corpus.config, corpus.texts)
        # What is wrong with a file is found before hours of work are done, and before the model is loaded; of a data
        # set of the Hub, whether there is one.
        for _ in texts if is_local(corpus.source) else itertools.islice(texts, 1):
            pass
        model, tokenizer = loader()
        index, count = shard or (0, 1)
        # A file is passed round: where the corpus lay on one machine means nothing on another.
        named = Path(corpus.source).name if Path(corpus.source).is_file() else corpus.source
        collect_key_statistics(
            model,
            tokenizer,
            texts,
            stage.inputs["layers"],
            max_length=corpus.max_length,
            memory=memory,
            shard=(index, count) if shard else None,
            checkpoint=store.scratch(stage.name, stage.inputs) / "checkpoint.safetensors",
            source=f"the first {corpus.texts} texts of {named}",
            settings={"inputs": inputs, "versions": versions()},
            total=-(-(corpus.texts - index) // count),
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

    parts = [KeyStatistics.load(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if len(parts) > 1 and part.measured.shard is None:
            raise UsageError(f"{file} is a whole measurement, not a shard. Give it alone, or all shards of one.")
    merged = KeyStatistics.merged(parts)
    measured = merged.measured
    if "inputs" not in measured.settings:
        raise UsageError(
            f"{files[0]} does not say what model and corpus it was measured for, so there is no key to keep it under. "
            "Give files that `retention-bench statistics` measured."
        )
    settings = checked(_Settings, measured.settings, f"{files[0]}, metadata, settings")
    here = {"version": VERSIONS["statistics"], **versions()}
    there = {"version": settings.inputs.version, **settings.versions}
    other = {name: (there.get(name), here[name]) for name in here if there.get(name) != here[name]}
    if other:
        listed = ", ".join(f"{name} {theirs}, here {ours}" for name, (theirs, ours) in other.items())
        raise UsageError(
            f"The statistics were measured with other versions ({listed}), which may compute something else. "
            "Use the same versions here, or measure anew."
        )
    inputs = settings.inputs
    for name, found, wanted in (
        ("layers", sorted(merged.moments), inputs.layers),
        ("modules", [measured.modules.get(layer) for layer in inputs.layers], inputs.modules),
        ("dtype", measured.dtype, inputs.dtype),
        ("max_length", measured.max_length, inputs.max_length),
        ("texts", measured.texts, min(measured.texts or 0, inputs.texts)),  # a corpus may have fewer
    ):
        if found != wanted:
            raise RetentionBenchError(
                f"{files[0]} contradicts itself: it was measured for the {name} {wanted}, and holds {found}. Measure "
                "it anew."
            )
    given = dict(measured.settings["inputs"])
    return store.get("statistics", given, lambda folder: merged.save(folder / FILE)) / FILE


class _Inputs(pydantic.BaseModel):
    """What a measurement is filed under: the inputs of its stage, as `statistics_stage` makes them."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    version: int
    model: dict[str, Any]
    dtype: str
    device: str
    corpus: dict[str, Any]
    config: str | None
    texts: int
    max_length: int
    layers: list[int]
    modules: list[str]


class _Settings(pydantic.BaseModel):
    """The settings of a measurement."""

    inputs: _Inputs
    versions: dict[str, str]


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
    files = {layer: find_file(path, ".npz file") for layer, path in files.items()}
    hashes = {str(layer): file_sha256(path) for layer, path in sorted(files.items())}
    inputs = {"version": VERSIONS["statistics"], **model_inputs(model, device), "npz": hashes}
    reads = [Input(str(path), {"sha256": hashes[str(layer)]}) for layer, path in files.items()]
    reads.append(Input(model.path, inputs["model"]))

    def compute(folder: Path) -> None:
        from retention_bench.editors import KeyStatistics
        from retention_bench.editors.npz import SAMPLE

        texts = list(itertools.islice(corpus, COMPARED)) if corpus else SAMPLE
        found = KeyStatistics.from_npz(files, source=", ".join(path.name for path in files.values()))
        loaded, tokenizer = loader()
        found.of_model(loaded, tokenizer, texts).save(folder / FILE)

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


def _load(model: ModelConfig, device: str) -> tuple[Any, Any]:
    return load(model.path, model.revision, dtype=model.dtype, device=device)


def _needed(value: str | None, option: str) -> str:
    if value is None:
        raise UsageError(f"{option} is missing. See `retention-bench statistics --help`.")
    return value


def _model(request: Request) -> ModelConfig:
    """The model with its path absolute."""
    path = _needed(request.model, "--model")
    try:
        if Path(path).is_dir():
            path = str(Path(path).resolve())
    except (OSError, ValueError) as error:
        raise UsageError(f"--model is {shortened(path)}, and there can be no such folder ({error}).") from error
    dtype: Any = request.dtype  # one of those that it allows
    return ModelConfig(path=path, revision=request.revision, dtype=dtype, editors={}, finetunes={})


def _corpus(request: Request) -> StatisticsConfig:
    """The corpus with its path absolute."""
    source = _needed(request.corpus, "--corpus")
    if is_local(source):
        source = str(find_file(source, "data file").resolve())
    return StatisticsConfig(
        source=source,
        revision=request.corpus_revision,
        config=request.corpus_config,
        texts=request.samples,
        max_length=request.max_length,
    )


def _check_config(model: ModelConfig, layers: Iterable[int], max_length: int = 1) -> None:
    """Refuse what the model lacks before it is loaded; where its config does not say, that comes later."""
    config = read_json(config_file(model.path, model.revision), dict[str, Any], "model configuration")
    count = config.get("num_hidden_layers", config.get("n_layer"))
    if isinstance(count, int) and max(layers) >= count:
        raise UsageError(f"There is no layer {max(layers)}: the model has {count} layers, 0 to {count - 1}.")
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(positions, int) and max_length > positions:
        raise UsageError(f"--max-length is {max_length}; the model has {positions} positions. Give 1 to {positions}.")


def _check_out(out: Path, merged: Sequence[Path]) -> None:
    """Refuse a file that cannot be written, or that holds something else, and make its folder."""
    from retention_bench.editors.statistics import KIND
    from retention_bench.models import check_place, kind_of

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out is {out}, and its folder cannot be made ({error}). Give another.") from error
    check_place(out)
    if not out.exists():
        return
    if any(file.exists() and file.samefile(out) for file in merged):
        raise UsageError(f"--out is {out}, which is one of the files to merge. Give another.")
    if kind_of(out) != KIND:
        raise UsageError(f"--out is {out}, which is there and holds no key statistics. Give another, or delete it.")


def _layers(given: str | None) -> list[int]:
    """Layers out of `0,1,2` or `13-17`."""
    layers: set[int] = set()
    for part in _needed(given, "--layers").split(","):
        first, dash, last = part.strip().partition("-")
        begin, end = _whole(first), _whole(last if dash else first)
        if begin is None or end is None or not begin <= end < MOST_LAYERS:
            raise UsageError(
                f"--layers is {shortened(given)}. Give numbers from 0 to {MOST_LAYERS - 1}, as 0,1,2 or 13-17."
            )
        layers.update(range(begin, end + 1))
    return sorted(layers)


def _shard(given: str | None, texts: int) -> tuple[int, int] | None:
    """A shard out of `I/N`."""
    if given is None:
        return None
    first, _, second = given.partition("/")
    index, count = _whole(first), _whole(second)
    if index is None or count is None or index >= count:
        raise UsageError(f"--shard is {shortened(given)}. Of N shards, give 0/N to (N - 1)/N, as 0/4.")
    if count > texts:
        raise UsageError(f"--shard is {given!r}, and there are {texts} texts. Give at most as many shards as texts.")
    return index, count


def _files(given: Sequence[str]) -> dict[int, Path]:
    """Files by layer out of `LAYER=FILE`."""
    files: dict[int, Path] = {}
    for part in given:
        named, _, path = part.partition("=")
        layer = _whole(named)
        if layer is None or layer >= MOST_LAYERS or not path:
            raise UsageError(f"--from-npz is {shortened(part)}. Give LAYER=FILE, as 13=layer13.npz.")
        if layer in files:
            raise UsageError(f"--from-npz names layer {layer} twice. Give one file a layer.")
        files[layer] = Path(path)
    return files


def _whole(text: str) -> int | None:
    """A whole number that is written with up to 18 digits, or None."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
