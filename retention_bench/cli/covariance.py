"""`retention-bench covariance`: the covariance of a model's keys, which locate-and-edit methods need."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retention_bench.cli.options import PATH, Filled, Out, Positive, count, json_option
from retention_bench.data import shortened
from retention_bench.device import chosen_device
from retention_bench.display import say, say_error, say_json
from retention_bench.errors import UsageError

if TYPE_CHECKING:
    from retention_bench.pipeline.covariance import Found

MOST_LAYERS = 10_000
"""More layers than any model has; `editors.settings` has the same, and would load pydantic for `--help`."""


class Layers(click.ParamType):
    """Layers as `0,1,2` or `13-17`."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The layers, ascending."""
        layers: set[int] = set()
        for part in str(value).split(","):
            first, dash, last = part.strip().partition("-")
            begin, end = _whole(first), _whole(last if dash else first)
            if begin is None or end is None or not begin <= end < MOST_LAYERS:
                self.fail(f"{shortened(value)}. Give numbers from 0 to {MOST_LAYERS - 1}, as 0,1,2 or 13-17.")
            layers.update(range(begin, end + 1))
        return sorted(layers)


class Shard(click.ParamType):
    """A shard as `I/N`."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """I and N."""
        first, _, second = str(value).partition("/")
        index, shards = _whole(first), _whole(second)
        if index is None or shards is None or index >= shards:
            self.fail(f"{shortened(value)}. Of N shards, give 0/N to (N - 1)/N, as 0/4.")
        return index, shards


class LayerFile(click.ParamType):
    """A layer's file as `LAYER=FILE`."""

    name = "layer=file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, Path]:
        """The layer and its file."""
        named, _, path = str(value).partition("=")
        layer = _whole(named)
        if layer is None or layer >= MOST_LAYERS or not path:
            self.fail(f"{shortened(value)}. Give LAYER=FILE, as 13=layer13.npz.")
        return layer, Path(path)


def _whole(text: str) -> int | None:
    """A whole number that is written with up to 18 digits, or None."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _together(*options: Callable) -> Callable:
    """Several options as one decorator, in the order of `--help`."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


MODEL = _together(
    click.option("--model", type=Filled(), required=True, help="A folder, or a Hub id."),
    click.option("--revision", type=Filled(), help="The model's Hub revision; pin it."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help="The dtype of the model.",
    ),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
)
CORPUS_OF = _together(
    click.option("--corpus-revision", type=Filled(), help="The data set's Hub revision; it must be pinned."),
    click.option("--corpus-config", type=Filled(), help="The data set's configuration."),
)
CORPUS_HELP = "A .jsonl or .jsonl.gz file with a column `text`, or a Hub data set id."
OUT = click.option("--out", type=Out(folder=False), metavar="FILE.safetensors", help="Also write the result here.")


@click.group()
def covariance() -> None:
    """Measure the covariance of a model's keys, which ROME, MEMIT and AlphaEdit need, or merge, import or inspect one.

    It is measured once for a model, and kept in the store under everything it depends on, where `evaluate` finds it.
    """


@covariance.command()
@MODEL
@click.option("--layers", type=Layers(), required=True, metavar="LAYERS", help="Counted from 0: 0,1,2 or 13-17.")
@click.option("--corpus", type=Filled(), required=True, help=CORPUS_HELP)
@CORPUS_OF
@click.option("--samples", type=count(1), default=100_000, show_default=True, help="Texts, from the front.")
@click.option("--max-length", type=count(1), default=1024, show_default=True, help="Tokens of a text that count.")
@click.option("--memory", type=Positive(), metavar="GIB", help="What the sums may take.")
@click.option("--shard", type=Shard(), metavar="I/N", help="Only every N-th text, from the I-th on, I from 0 to N - 1.")
@OUT
@click.option("--dry-run", is_flag=True, help="Print where the result will be, and whether it is there already.")
@json_option("the answer")
def measure(
    model: str,
    revision: str | None,
    dtype: str,
    device: str,
    layers: list[int],
    corpus: str,
    corpus_revision: str | None,
    corpus_config: str | None,
    samples: int,
    max_length: int,
    memory: float | None,
    shard: tuple[int, int] | None,
    out: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure the covariance over a corpus, and print its file.

    A run that was cut off goes on where it was when it is started again.
    """
    from retention_bench.display.progress import show_progress
    from retention_bench.pipeline import covariance as pipeline
    from retention_bench.store import Store, default_root

    if memory is not None and memory > 2**30:
        raise UsageError(f"--memory is {memory:g} GiB. Give up to {2**30}.")
    on = chosen_device(device)
    if out and not dry_run:
        pipeline.check_out(out)
    with show_progress(1) as (announce, progress):
        found = pipeline.collect(
            Store(default_root()),
            pipeline.model_at(model, revision, dtype),
            on,
            pipeline.corpus_at(corpus, corpus_revision, corpus_config, samples, max_length),
            layers,
            shard=shard,
            memory=None if memory is None else int(memory * 2**30),
            dry_run=dry_run,
            announce=announce,
            progress=progress,
        )
    if out and not dry_run:
        pipeline.copy_out(found.file, out)
    if dry_run and not as_json:
        say(f"{found.file} ({'in the store' if found.in_store else 'not there yet'})")
    else:
        _say_found(found, as_json)


@covariance.command()
@click.argument("files", type=PATH, nargs=-1, required=True, metavar="FILE...")
@OUT
@json_option("the answer")
def merge(files: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Put all shards of one measurement, or a whole file from elsewhere, into the store, and print the file there."""
    from retention_bench.pipeline import covariance as pipeline
    from retention_bench.store import Store, default_root

    if out:
        pipeline.check_out(out, files)
    file = pipeline.merge(Store(default_root()), files)
    if out:
        pipeline.copy_out(file, out)
    _say_found(pipeline.Found(file, True), as_json)


@covariance.command("import")
@MODEL
@click.argument("files", type=LayerFile(), nargs=-1, required=True, metavar="LAYER=FILE...")
@click.option("--corpus", type=Filled(), help="Text to compare on.  [default: a little English]  " + CORPUS_HELP)
@CORPUS_OF
@OUT
@json_option("the answer")
def import_(
    model: str,
    revision: str | None,
    dtype: str,
    device: str,
    files: tuple[tuple[int, Path], ...],
    corpus: str | None,
    corpus_revision: str | None,
    corpus_config: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Import the .npz files of ROME's, MEMIT's or AlphaEdit's own code, one for each layer, and print the file.

    They are compared with the model, and refused where they are another model's or layer's. Give the file that is
    printed to `evaluate`.
    """
    from retention_bench.pipeline import covariance as pipeline
    from retention_bench.store import Store, default_root

    by_layer = dict(files)
    if len(by_layer) < len(files):
        twice = next(layer for layer in by_layer if sum(layer == other for other, _ in files) > 1)
        raise UsageError(f"Layer {twice} is named twice. Give one file for each layer.")
    if out:
        pipeline.check_out(out)
    file = pipeline.import_npz(
        Store(default_root()),
        pipeline.model_at(model, revision, dtype),
        chosen_device(device),
        by_layer,
        pipeline.corpus_at(corpus, corpus_revision, corpus_config) if corpus else None,
    )
    if out:
        pipeline.copy_out(file, out)
    _say_found(pipeline.Found(file, True), as_json)


@covariance.command()
@click.argument("file", type=PATH)
@json_option("the answer")
def inspect(file: Path, as_json: bool) -> None:
    """Say what a file holds: how it was measured, and what its eigenvalues are."""
    from retention_bench.display import tables
    from retention_bench.editors import Covariance

    about = {"file": str(file), **Covariance.load(file).summary()}
    if as_json:
        say_json(about)
    else:
        tables.print_covariance(about)


@click.command(
    hidden=True, add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
@click.pass_context
def statistics(ctx: click.Context) -> None:
    """The old name of `covariance`, with its options --merge, --from-npz and --inspect for the commands there."""
    command, words = _renamed(ctx.args)
    now = f"covariance {command}".rstrip()
    say_error(f"`retention-bench statistics` is now called `retention-bench {now}`.")
    parent = ctx.parent
    covariance.main(
        [command, *words] if command else words,
        prog_name=f"{parent.command_path if parent else 'retention-bench'} covariance",
        standalone_mode=False,
    )


_WAYS = {"--merge": "merge", "--from-npz": "import", "--inspect": "inspect"}


def _renamed(given: Sequence[str]) -> tuple[str, list[str]]:
    """The command of `covariance` for the words after `statistics`, and what follows it.

    Raises:
        UsageError: The words ask for several at once, or an option lacks its value.
    """
    words, files, asked = [], [], []
    rest = iter(given)
    for word in rest:
        option, equals, value = word.partition("=")
        if option not in _WAYS:
            words.append(word)
            continue
        asked.append(option)
        file = value if equals else next(rest, None)
        if file is None:
            raise UsageError(f"{option} needs a value. See `retention-bench covariance {_WAYS[option]} --help`.")
        files.append(file)
    ways = list(dict.fromkeys(asked))
    if len(ways) > 1:
        raise UsageError(f"{' and '.join(ways)} were given together. Give one of them.")
    if ways:
        return _WAYS[ways[0]], [*words, "--", *files]
    return ("", words) if not words or words == ["--help"] else ("measure", words)


def _say_found(found: Found, as_json: bool) -> None:
    if as_json:
        say_json({"file": str(found.file), "in_store": found.in_store})
    else:
        say(str(found.file))
