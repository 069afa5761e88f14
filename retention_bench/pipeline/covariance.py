"""The covariance of a model's keys as a thing of its own: measured, merged from shards, imported.

`evaluate` asks for it under the same key as `retention-bench covariance measure`, so either finds what the other
computed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from retention_bench.data import checked, find_file, is_local, read_json, shortened
from retention_bench.data.durable import file_sha256
from retention_bench.display.progress import Progress, silent
from retention_bench.errors import RetentionBenchError, UsageError
from retention_bench.pipeline.cell import model_of
from retention_bench.pipeline.loading import load
from retention_bench.pipeline.rows import Texts
from retention_bench.pipeline.stage import Announce, Bench, Rows
from retention_bench.pipeline.stages.covariance import FILE, Covariance
from retention_bench.pipeline.suite import CovarianceConfig, ModelConfig
from retention_bench.store import Entry, Input, Store
from retention_bench.store.disk import disk_errors
from retention_bench.store.fingerprints import config_file, source_fingerprint
from retention_bench.store.store import versions

COMPARED = 20
"""Texts of a corpus on which an imported covariance is compared with the model."""


class Found(NamedTuple):
    """Where a covariance is.

    Attributes:
        file: The file in the store.
        in_store: Whether it is there; after a dry run it may not be.
    """

    file: Path
    in_store: bool


def collect(
    store: Store,
    model: ModelConfig,
    device: str,
    corpus: CovarianceConfig,
    layers: Sequence[int],
    *,
    shard: tuple[int, int] | None = None,
    memory: int | None = None,
    dry_run: bool = False,
    announce: Announce = lambda title, cached: None,
    progress: Progress = silent,
) -> Found:
    """Measure a covariance, unless the store holds it, and say where it is.

    Args:
        store: Where it is kept.
        model: The model; see `model_at`.
        device: `"cpu"` or `"cuda"`.
        corpus: The texts; see `corpus_at`.
        layers: The layers.
        shard: (i, n) for every text whose index is i modulo n; None for all texts.
        memory: Bytes that the sums may take; see `collect_covariance`.
        dry_run: Only say where it would be.
        announce: Called with what is done, and whether the store held it.
        progress: Called with the texts done.

    Raises:
        UsageError: A layer that the model lacks, texts longer than its positions, more shards than texts, or too little
            memory.
        RetentionBenchError: The model or the corpus cannot be read, or a key is not finite.
    """
    if shard and shard[1] > corpus.texts:
        raise UsageError(
            f"The shard is {shard[0]}/{shard[1]}, and there are {corpus.texts} texts. Give at most as many shards as "
            "texts."
        )
    _check_config(model, layers, corpus.max_length)
    rows = Rows(corpus.source, source_fingerprint(corpus.source, corpus.revision), corpus.config, corpus.revision)
    stage = Covariance.of(
        model_of(model, device),
        rows,
        layers,
        texts=corpus.texts,
        max_length=corpus.max_length,
        shard=shard,
        memory=memory,
    )
    if dry_run:
        return Found(store.place(stage) / FILE, store.holds(stage))
    return Found(stage.file(Bench(store, progress, announce)), True)


def merge(store: Store, files: Sequence[Path]) -> Path:
    """Put a covariance that was measured elsewhere, whole or in shards, where `evaluate` finds it.

    Args:
        store: The store.
        files: All shards of one measurement, or one whole file.

    Returns:
        The file in the store.

    Raises:
        UsageError: A file is missing, or the files are not the whole of one measurement, do not say what they were
            measured for, or were measured with other versions of what computes them.
        RetentionBenchError: A file is broken, or lacks the hash or the fingerprint that proves what it is.
    """
    from retention_bench.editors.covariance import Covariance as File
    from retention_bench.editors.covariance import merged as merge_parts

    # Nothing but the files says whose they are, so each must hold what proves it.
    parts = [File.load(file, proven=True) for file in files]
    for file, part in zip(files, parts, strict=True):
        if len(parts) > 1 and part.measured.shard is None:
            raise UsageError(f"{file} is a whole measurement, not a shard. Give it alone, or all shards of one.")
    merged = merge_parts(parts)
    measured = merged.measured
    if "inputs" not in measured.settings:
        raise UsageError(
            f"{files[0]} does not say what model and corpus it was measured for, so there is no key to keep it under. "
            "Give files that `retention-bench covariance measure` wrote."
        )
    settings = checked(_Settings, measured.settings, f"{files[0]}, metadata, settings")
    here = {"version": Covariance.version, **versions()}
    there = {"version": settings.inputs.version, **settings.versions}
    other = {name: (there.get(name), here[name]) for name in here if there.get(name) != here[name]}
    if other:
        listed = ", ".join(f"{name} {theirs}, here {ours}" for name, (theirs, ours) in other.items())
        raise UsageError(
            f"The covariance was measured with other versions ({listed}), which may compute something else. "
            "Use the same versions here, or measure anew."
        )
    inputs = settings.inputs
    for name, found, wanted in (
        ("layers", sorted(merged.mom2), inputs.layers),
        ("modules", [measured.modules.get(layer) for layer in inputs.layers], inputs.modules),
        ("dtype", measured.dtype, inputs.model.dtype),
        ("max_length", measured.max_length, inputs.max_length),
        ("texts", measured.texts, min(measured.texts or 0, inputs.texts)),  # a corpus may have fewer
    ):
        if found != wanted:
            raise RetentionBenchError(
                f"{files[0]} contradicts itself: it was measured for the {name} {wanted}, and holds {found}. Measure "
                "it anew."
            )
    given = dict(measured.settings["inputs"])
    return store.get(Entry(Covariance.name, given), lambda folder: merged.save(folder / FILE)) / FILE


class _ModelInputs(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    fingerprint: dict[str, Any]
    dtype: str
    device: str


class _Inputs(pydantic.BaseModel):
    """What a measurement is filed under: the inputs of its stage, as `Covariance` makes them."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    version: int
    model: _ModelInputs
    corpus: dict[str, Any]
    texts: int
    max_length: int
    layers: list[int]
    modules: list[str]
    shard: None


class _Settings(pydantic.BaseModel):
    """The settings of a measurement."""

    inputs: _Inputs
    versions: dict[str, str]


def import_npz(
    store: Store, model: ModelConfig, device: str, files: Mapping[int, Path], corpus: CovarianceConfig | None = None
) -> Path:
    """Import the covariance files of the reference editors' own code, checked against a model.

    Args:
        store: The store, which keeps the result under the files' hashes and the model's.
        model: The model that they belong to, see `model_at`.
        device: `"cpu"` or `"cuda"`.
        files: The `.npz` file of each layer.
        corpus: Text to compare on, of which the first `COMPARED` are read; None for a little English.

    Returns:
        The file.

    Raises:
        UsageError: The files are not this model's.
        RetentionBenchError: A file is missing, not of that form, or its matrix is no covariance.
    """
    _check_config(model, files)
    files = {layer: find_file(path, ".npz file") for layer, path in files.items()}
    hashes = {str(layer): file_sha256(path) for layer, path in sorted(files.items())}
    base = model_of(model, device)
    inputs = {"version": Covariance.version, "model": base.fingerprint, "dtype": base.dtype, "device": device}
    reads = [Input(str(path), {"sha256": hashes[str(layer)]}) for layer, path in files.items()]
    entry = Entry(Covariance.name, {**inputs, "npz": hashes}, (*reads, base))

    def compute(folder: Path) -> None:
        from retention_bench.editors.covariance import SAMPLE, read_rome_npz, with_fingerprint

        texts: Sequence[str] = SAMPLE
        if corpus:
            texts = list(Texts(corpus.source, corpus.revision, corpus.config, COMPARED))
        found = read_rome_npz(files, source=", ".join(path.name for path in files.values()))
        loaded, tokenizer = _load(model, device)
        with_fingerprint(found, loaded, tokenizer, texts).save(folder / FILE)

    return store.get(entry, compute) / FILE


def model_at(path: str, revision: str | None = None, dtype: str = "float32") -> ModelConfig:
    """A model by itself, without a suite.

    Args:
        path: A folder, which is made absolute, or a Hub id.
        revision: The Hub revision.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        UsageError: There can be no such folder.
    """
    try:
        if Path(path).is_dir():
            path = str(Path(path).resolve())
    except (OSError, ValueError) as error:
        raise UsageError(f"The model is {shortened(path)}, and there can be no such folder ({error}).") from error
    given: Any = dtype  # pydantic checks it
    return ModelConfig(path=path, revision=revision, dtype=given, editors={}, finetunes={})


def corpus_at(
    source: str, revision: str | None = None, config: str | None = None, texts: int = 100_000, max_length: int = 1024
) -> CovarianceConfig:
    """A corpus by itself, without a suite; arguments as the fields of `CovarianceConfig`, a file's path made absolute.

    Raises:
        UsageError: There is no such file.
    """
    if is_local(source):
        source = str(find_file(source, "data file").resolve())
    return CovarianceConfig(source=source, revision=revision, config=config, texts=texts, max_length=max_length)


def copy_out(file: Path, out: Path) -> None:
    """Copy a covariance out of the store; see `check_out`."""
    from retention_bench.models import replacing

    with disk_errors("the file for --out", out.parent), replacing(out) as partial:
        shutil.copyfile(file, partial)


def check_out(out: Path, merged: Sequence[Path] = ()) -> None:
    """Refuse a place for a covariance that cannot be written, or that holds something else, and make its folder.

    Args:
        out: The place.
        merged: Files that are still to be read.

    Raises:
        UsageError: It is one of those.
    """
    from retention_bench.editors.covariance import KINDS
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
    if kind_of(out) not in KINDS:
        raise UsageError(f"--out is {out}, which is there and holds no covariance. Give another, or delete it.")


def _load(model: ModelConfig, device: str) -> tuple[Any, Any]:
    return load(model.path, model.revision, dtype=model.dtype, device=device)


def _check_config(model: ModelConfig, layers: Iterable[int], max_length: int = 1) -> None:
    """Refuse what the model lacks before it is loaded; where its config does not say, that comes later."""
    config = read_json(config_file(model.path, model.revision), dict[str, Any], "model configuration")
    count = config.get("num_hidden_layers", config.get("n_layer"))
    if isinstance(count, int) and max(layers) >= count:
        raise UsageError(f"There is no layer {max(layers)}: the model has {count} layers, 0 to {count - 1}.")
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(positions, int) and max_length > positions:
        raise UsageError(f"--max-length is {max_length}; the model has {positions} positions. Give 1 to {positions}.")
