"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import hashlib
import math
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retention_bench import __version__
from retention_bench.display import line, prepare_streams, say, say_error, say_json
from retention_bench.errors import RetentionBenchError, UsageError, unknown_name

if TYPE_CHECKING:
    from retention_bench.pipeline import Plan, Suite


class _Commands(click.Group):
    """Shows the errors that a user can act on in one line, without a traceback."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        prepare_streams()
        args = sys.argv[1:] if args is None else list(args)
        for given in args:
            if "\0" in given or any("\ud800" <= c <= "\udfff" for c in given):
                say_error(
                    f"Error: {line(_short(given))} holds a NUL, or bytes that are not UTF-8. Rename the file, or give "
                    "another value."
                )
                sys.exit(2)
        try:
            code = super().main(args, *rest, **(extra | {"standalone_mode": False}))
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            more = f" See `{context.command_path} --help`." if context else ""
            say_error(f"Error: {line(_short(' '.join(error.format_message().split())))}{more}")
            sys.exit(error.exit_code)
        except OSError as error:  # of what click prints itself: help, versions
            say_error(f"Error: {line(_reason(error))}")
            sys.exit(1)
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RetentionBenchError as error:
            message, *quoted = error.args
            say_error("\n".join([f"Error: {line(_short(message))}", *map(str, quoted)]))
            ctx.exit(error.exit_code)
        except MemoryError:
            say_error(
                "Error: Memory ran out. Every stage that had finished is kept; free some memory, or ask for less, and "
                "run the same command again."
            )
            ctx.exit(1)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # nobody reads our output any more, which click knows how to end
            say_error(f"Error: {line(_reason(error))}")
            ctx.exit(1)
        except KeyboardInterrupt:
            say_error("Interrupted. Every stage that had finished is kept; the same command goes on from there.")
            ctx.exit(130)


def _short(text: object) -> str:
    """An error without the middle of what takes several lines and is no words: a name of thousands of characters."""
    return re.sub(r"\S{400,}", lambda found: f"{found[0][:200]}...{found[0][-100:]}", str(text))


def _reason(error: OSError) -> str:
    """What the operating system refused, and what to do about it."""
    where = f" ({_short(error.filename)})" if error.filename is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what = "A file has reached the largest size allowed" if error.errno == errno.EFBIG else "The disk is full"
        return f"{what}{where}. Free some space, and run the same command again; what had finished is kept."
    said = error.strerror or str(error).partition("\n")[0] or type(error).__name__
    return f"{said}{where}. Correct the path or its permissions, or give another."


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="retention-bench")
def main() -> None:
    """Which edits of a language model's knowledge survive fine-tuning.

    retention-bench edits facts into a model, fine-tunes it downstream, and scores how many edited facts, and how many
    facts that were never edited, it still answers.
    """


def _json_option(what: str) -> Callable:
    return click.option("--json", "as_json", is_flag=True, help=f"Print {what} as JSON on standard output.")


_PATH = click.Path(path_type=Path)


class _Out(click.ParamType):
    """Where something is to be written; refused at once where it cannot be."""

    name = "path"

    def __init__(self, *, folder: bool) -> None:
        self.folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from retention_bench.data import output_file, output_folder

        try:
            return output_folder(value) if self.folder else output_file(value)
        except UsageError as error:
            self.fail(line(error), param, ctx)


class _Filled(click.ParamType):
    """A text that is not empty: an unset shell variable is no name, and an empty revision would be the newest."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail("It is empty. Give a value, or leave the option out.", param, ctx)
        return str(value)


class _Positive(click.FloatRange):
    """A number above 0 that is one."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number to count with.", param, ctx)
        return number


def _count(least: int) -> click.IntRange:
    return click.IntRange(min=least, max=2**31 - 1)


_SEED = click.IntRange(min=0, max=2**32 - 1)


@main.command()
@click.option(
    "--editor",
    required=True,
    help="The editor, by its name in the suite; see `retention-bench list editors --suite NAME`.",
)
@click.option(
    "--finetune",
    required=True,
    help="The downstream fine-tune, see `retention-bench list finetunes`; or path:FILE or path:OWNER/NAME@REVISION for "
    "data of your own.",
)
@click.option("--suite", default="atlas", show_default=True, help="A suite's name, or a YAML file of your own.")
@click.option(
    "--model", type=_Filled(), help="A model of the suite, a folder, or a Hub id.  [default: the suite's first]"
)
@click.option(
    "--seed", type=_SEED, default=0, show_default=True, help="Seed of the facts drawn, the edits and the fine-tunes."
)
@click.option(
    "--paraphrases",
    type=click.IntRange(min=0, max=1000),
    default=0,
    show_default=True,
    metavar="N",
    help="Edit each fact with N more prompts.",
)
@click.option(
    "--paraphrase-source",
    default="own",
    show_default=True,
    metavar="own|template|model:NAME",
    help="Where those come from: the fact's own paraphrases (which are not asked then), other words before its prompt, "
    "or an instruct model (one of the suite, a folder, or a Hub id) that writes them.",
)
@click.option(
    "--freeze",
    default="none",
    show_default=True,
    metavar="none|edited|unedited|below:K|window:C:W",
    help="What the fine-tunes leave as it is: the edited layers; all but those; layers below K, counted from 0; all "
    "but the W layers around C.",
)
@click.option(
    "--adapter",
    default="none",
    show_default=True,
    metavar="none|lora|dora",
    help="Train adapters, merged for scoring, and not the weights.",
)
@click.option(
    "--probe-every",
    type=_count(0),
    default=0,
    metavar="N",
    help="Also ask all facts every N steps of the fine-tunes, and write trajectory.jsonl.",
)
@click.option(
    "--probe-fact",
    multiple=True,
    metavar="ID",
    help="With --probe-every: also print this fact's most probable tokens, step by step.",
)
@click.option(
    "--accelerate-config",
    type=_Filled(),
    metavar="ddp|fsdp|FILE",
    help="Fine-tune on all visible GPUs: ddp for models that fit one of them, fsdp for larger ones; or a file that "
    "`accelerate config` wrote.",
)
@click.option("--out", type=_Out(folder=True), help="Folder for the results.  [default: below runs/]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--save-checkpoints", is_flag=True, help="Also write every scored model as a full checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print the stages that would run, and which are in the store already.")
@_json_option("the results")
def evaluate(
    editor: str,
    finetune: str,
    suite: str,
    model: str | None,
    seed: int,
    paraphrases: int,
    paraphrase_source: str,
    freeze: str,
    adapter: str,
    probe_every: int,
    probe_fact: tuple[str, ...],
    accelerate_config: str | None,
    out: Path | None,
    device: str,
    save_checkpoints: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Edit, fine-tune and score one cell: an editor and a fine-tune on one model.

    What was computed before is taken from the store ($RETENTION_BENCH_STORE, or retention-bench in your cache folder),
    so an interrupted run goes on with the stage it was in.
    """
    from retention_bench import console
    from retention_bench.pipeline import Cell, Store, check_data, default_root, estimate, load_suite, plan
    from retention_bench.pipeline.run import FILES
    from retention_bench.pipeline.store import check_output

    if probe_fact and not probe_every:
        raise UsageError("--probe-fact goes with --probe-every N, which says how often the facts are asked.")
    store = Store(default_root())
    cell = Cell(
        load_suite(suite),
        model=model,
        editor=editor,
        finetune=finetune,
        seed=seed,
        device=_device(device),
        paraphrases=paraphrases,
        paraphrase_source=paraphrase_source,
        freeze=freeze,
        adapter=adapter,
        probe_every=probe_every,
        accelerate_config=accelerate_config,
    )
    planned = plan(cell, store)
    out = out or _folder(planned)
    if probe_fact:
        _check_known(cell.suite, probe_fact)
    if dry_run:
        check_output(out, "evaluate", FILES)
        stages = [
            {
                "stage": s.name,
                "title": s.title,
                "key": store.key(s.name, s.inputs),
                "in_store": store.holds(s.name, s.inputs),
            }
            for s in planned.stages()
        ]
        data = check_data(planned, store)
        looked = data.to_json() if data else None
        found = estimate(planned, store).to_json()
        if as_json:
            say_json({"store": str(store.root), "stages": stages, "estimate": found, "data": looked})
        else:
            console.print_plan(stages, store.root, found, looked)
        return
    from retention_bench.pipeline import evaluate as run

    with console.progress(len(planned.stages())) as (announce, progress):
        results = run(
            cell, store=store, out=out, progress=progress, announce=announce, save_checkpoints=save_checkpoints
        )
    if as_json:
        say_json(results)
    else:
        console.print_results(results, out, real=cell.suite.real)
    if probe_fact:
        from retention_bench.pipeline.store import read_jsonl

        rows = read_jsonl(out / "trajectory.jsonl")
        ids = dict.fromkeys(row["fact_id"] for row in rows)
        for fact in probe_fact:
            if fact not in ids:
                raise unknown_name("fact of this cell:", fact, ids)
            if not as_json:
                console.print_tokens(fact, [row for row in rows if row["fact_id"] == fact])


@main.command()
@click.option("--model", type=_Filled(), help="A folder, or a Hub id.")
@click.option("--revision", type=_Filled(), help="The model's Hub revision; pin it.")
@click.option("--layers", metavar="LAYERS", help="Layers, counted from 0: 0,1,2 or 13-17.")
@click.option("--corpus", type=_Filled(), help="A .jsonl or .jsonl.gz file with a column `text`, or a Hub data set id.")
@click.option("--corpus-revision", type=_Filled(), help="The data set's Hub revision; it must be pinned.")
@click.option("--corpus-config", type=_Filled(), help="The data set's configuration.")
@click.option("--samples", type=_count(1), default=100_000, show_default=True, help="Texts, from the front.")
@click.option("--max-length", type=_count(1), default=1024, show_default=True, help="Tokens of a text that count.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="The dtype of the model.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--memory", type=_Positive(), metavar="GIB", help="What the sums may take.")
@click.option("--shard", metavar="I/N", help="Only every N-th text, from the I-th on, I from 0 to N - 1.")
@click.option(
    "--merge", type=_PATH, multiple=True, metavar="FILE", help="Put all shards, or a whole file, in the store."
)
@click.option(
    "--from-npz", multiple=True, metavar="LAYER=FILE", help="Import a file of ROME's, MEMIT's, AlphaEdit's code."
)
@click.option("--inspect", type=_PATH, metavar="FILE", help="Say what a file holds.")
@click.option("--out", type=_Out(folder=False), metavar="FILE.safetensors", help="Also write the result here.")
@click.option("--dry-run", is_flag=True, help="Print where the result will be, and whether it is there already.")
@_json_option("the answer")
def statistics(**options: Any) -> None:
    """Measure the key statistics that editors need, once for a model; or merge, import or inspect them.

    \b
    retention-bench statistics --model M --layers 13-17 --corpus C      measure
    retention-bench statistics --merge A --merge B                      put shards together
    retention-bench statistics --model M --from-npz 13=F --from-npz ... import
    retention-bench statistics --inspect FILE                           look into a file

    Prints the file. It is kept in the store under everything it depends on, where `evaluate` finds it. A run that was
    cut off goes on where it was when it is started again.
    """  # noqa: D301 - click keeps lines as they are behind a backspace
    from retention_bench import console
    from retention_bench.pipeline import Store, default_root
    from retention_bench.pipeline.statistics import Request, answer

    as_json, device = options.pop("as_json"), options.pop("device")
    request = Request(**options, device="" if options["inspect"] or options["merge"] else _device(device))
    with console.progress(1) as (announce, progress):
        found = answer(request, Store(default_root()), announce=announce, progress=progress)
    if as_json:
        say_json(found)
    elif request.inspect:
        console.print_statistics(found)
    elif request.dry_run:
        say(f"{found['file']} ({'in the store' if found['in_store'] else 'not there yet'})")
    else:
        say(found["file"])


_KINDS = click.Choice(["edited", "intrinsic", "paraphrase", "locality"])
_STAGES = click.Choice(["base", "post_edit", "post_finetune", "control_finetune"])


@main.command()
@click.argument("sides", nargs=-1, required=True, metavar="A B...")
@click.option(
    "--stage", type=_STAGES, default="post_finetune", show_default=True, help="The stage of a run without one."
)
@click.option("--kind", "kinds", type=_KINDS, multiple=True, help="Compare only this kind of question; repeatable.")
@_json_option("the comparison")
def compare(sides: tuple[str, ...], stage: str, kinds: tuple[str, ...], as_json: bool) -> None:
    """Compare runs or scored checkpoints, fact by fact: what was lost, gained and kept.

    \b
    A side is one of
      RUN               a folder that `evaluate` wrote, after its fine-tune or at --stage
      RUN:STAGE         the same at base, post_edit, post_finetune or control_finetune
      FILE              all checkpoints in a file that `score` wrote
      FILE:CHECKPOINT   one of them

    Only questions that both sides of a pair were asked are compared. The p-values are McNemar's exact test's, with
    Holm's correction for all pairs and kinds shown.
    """  # noqa: D301 - click keeps lines as they are behind a backspace
    from retention_bench import tables
    from retention_bench.pipeline.scored import compared

    found = compared(sides, stage=stage, **({"kinds": kinds} if kinds else {}))
    if as_json:
        say_json(found)
    else:
        tables.print_comparisons(found)


@main.command()
@click.argument("fact")
@click.argument("sides", nargs=-1, required=True, metavar="A...")
@_json_option("the answers")
def inspect(fact: str, sides: tuple[str, ...], as_json: bool) -> None:
    """Show everything that is known about one fact: its prompts and targets, and every answer to them.

    FACT is its id, as `compare` prints it and facts.jsonl has it. A side is what `compare` takes; of a RUN without a
    stage all stages are shown.
    """
    from retention_bench import tables
    from retention_bench.pipeline.scored import inspected

    found = inspected(fact, sides)
    if as_json:
        say_json(found)
    else:
        tables.print_fact(found)


@main.command()
@click.argument("checkpoints", nargs=-1)
@click.option(
    "--facts",
    type=_PATH,
    required=True,
    metavar="FACTS.jsonl",
    help="What to ask: facts in any form that a suite takes.",
)
@click.option(
    "--manifest", type=_PATH, metavar="FILE", help="More checkpoints: a line each, or a JSON object with name."
)
@click.option(
    "--tasks",
    default="edited,intrinsic,paraphrase,locality",
    show_default=True,
    help="The kinds of question to ask, by commas.",
)
@click.option("--also", default="", metavar="TASK,TASK", help="Tasks of lm-eval's own to run on the same live engine.")
@click.option(
    "--include-path", type=click.Path(exists=True, file_okay=False), help="A folder with more tasks for --also."
)
@click.option("--backend", type=click.Choice(["auto", "hf", "vllm"]), default="auto", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="What weights are converted to.  [auto: float32 on a CPU, bfloat16 on a GPU]",
)
@click.option("--batch-size", type=_count(1), default=64, show_default=True, help="For --backend hf.")
@click.option("--tensor-parallel-size", type=_count(1), default=1, show_default=True, help="For --backend vllm.")
@click.option("--allow-pickle", is_flag=True, help="Also read pickled weights; loading those of a stranger is a risk.")
@click.option(
    "--tokenizer", type=_Filled(), metavar="FOLDER", help="Take the tokenizer from here, for checkpoints without one."
)
@click.option("--out", type=_Out(folder=True), default="scores", show_default=True, help="Folder for scores.jsonl.")
@_json_option("the scores")
def score(checkpoints: tuple[str, ...], facts: Path, manifest: Path | None, out: Path, **options: Any) -> None:
    """Score checkpoints that are there already, hundreds of them on one live engine.

    \b
    CHECKPOINT is one of
      FOLDER  or  OWNER/NAME[@REVISION]      a model
      MODEL+DELTA.safetensors                a base model and an edit
      MODEL+ADAPTER_FOLDER, ADAPTER_FOLDER   a base model and a peft adapter
      'runs/*/model'                         every folder that fits, in quotes

    What OUT/scores.jsonl holds already is not scored again, so a run that was cut off goes on. A checkpoint that cannot
    be scored is recorded with the reason, and the others are scored; the exit code is 1 then.
    """  # noqa: D301 - click keeps lines as they are behind a backspace
    from retention_bench.engine_process import EngineProcess, resolve_backend

    as_json, device = options.pop("as_json"), _device(options.pop("device"))
    backend = resolve_backend(options.pop("backend"), device)
    # It takes some seconds to get ready, and so do the imports here.
    process = EngineProcess(device) if backend == "vllm" else None

    from retention_bench import console, tables
    from retention_bench.data import find_file
    from retention_bench.facts import load_pool
    from retention_bench.models import read_manifest, read_references
    from retention_bench.pipeline.batch import Options, score_checkpoints
    from retention_bench.scoring.tasks import KINDS

    kinds: Any = _listed("--tasks", options.pop("tasks"), KINDS)
    also = _listed("--also", options.pop("also"))
    if ours := set(also) & {f"retention_{kind}" for kind in KINDS}:
        raise UsageError(f"--also names {min(ours)}, a kind of question of our own. Give it with --tasks.")
    if not kinds and not also:
        raise UsageError(f"--tasks and --also name nothing to ask. Give --tasks some of {', '.join(KINDS)}.")
    manifested = [] if manifest is None else read_manifest(manifest)
    references, unreadable = read_references([*checkpoints, *manifested], say_error)
    if not references and not unreadable:
        raise UsageError("No checkpoint is given. Name some, or give --manifest FILE.")
    pool = load_pool(str(find_file(facts, "facts file").absolute()))
    if pool.rows.dropped:
        say_error(pool.rows)
    dtype = options.pop("dtype")
    dtype = ("float32" if device == "cpu" else "bfloat16") if dtype == "auto" else dtype
    chosen = Options(backend=backend, dtype=dtype, device=device, kinds=kinds, also=also, **options)
    with console.progress(len(references)) as (announce, progress):
        rows = score_checkpoints(
            references,
            pool.facts,
            out,
            chosen,
            unreadable=unreadable,
            announce=announce,
            progress=progress,
            process=process,
        )
    if as_json:
        say_json(rows)
    else:
        tables.print_scores(rows, out / "scores.jsonl")
    if any("error" in row for row in rows):
        click.get_current_context().exit(1)


@main.command("list")
@click.argument("what", type=click.Choice(["editors", "finetunes", "suites"]))
@click.option("--suite", help="With editors: also those of a suite, by model, as `--editor` takes them.")
@_json_option("the names")
def list_(what: str, suite: str | None, as_json: bool) -> None:
    """List the editors, the fine-tunes or the suites."""
    if suite is not None and what != "editors":
        raise UsageError(f"--suite goes with `list editors`, not with `list {what}`. Leave it out.")
    if what == "editors":
        from retention_bench.editors import editor_names as names
    elif what == "finetunes":
        from retention_bench.finetune import finetune_names as names
    else:
        from retention_bench.pipeline.suite import suite_names as names
    if suite is None:
        say_json(names(), indent=None) if as_json else say("\n".join(names()))
        return
    from retention_bench.pipeline.suite import load_suite

    entries = {name: model.registered for name, model in load_suite(suite).models.items()}
    if as_json:
        say_json({"editors": names(), "suite": suite, "models": entries}, indent=None)
        return
    lines = names()
    for model, editors in entries.items():
        lines += ["", f"suite {suite}, model {model}:"]
        lines += [f"  {name}" + (f" ({editor})" if name != editor else "") for name, editor in editors.items()]
    say("\n".join(lines))


def _listed(option: str, given: str, allowed: Collection[str] | None = None) -> tuple[str, ...]:
    """Names separated by commas.

    Raises:
        UsageError: One is not allowed, or stands twice.
    """
    names = tuple(name.strip() for name in given.split(",") if name.strip())
    for number, name in enumerate(names):
        if allowed is not None and name not in allowed:
            raise unknown_name("kind of question", name, allowed)
        if name in names[:number]:
            raise UsageError(f"{option} names {name} twice. Give each once.")
    return names


def _check_known(suite: Suite, facts: Collection[str]) -> None:
    """Refuse ids that no fact of a suite has; which of its facts a cell takes is found out when it runs."""
    from retention_bench.facts import load_pool

    source = suite.facts
    pool = load_pool(suite.locate(source.source), source.revision, source.config).facts
    ids = [fact.id for fact in pool]
    for fact in set(facts) - set(ids):
        raise unknown_name("fact of this suite:", fact, ids)


def _folder(planned: Plan) -> Path:
    """The folder of a cell's results where none is named; what differs from the usual is in its name."""
    cell = planned.cell
    model = _model_folder(planned.model_name, cell.model, planned.model.path, planned)
    folder = Path("runs") / cell.suite.name / model / _part(cell.editor) / _part(planned.finetune_name)
    if cell.paraphrases:
        source = str(planned.paraphrase_source)
        if planned.writer:
            given = cell.paraphrase_source.partition(":")[2]
            source = f"model-{_model_folder(source.partition(':')[2], given, planned.writer.path, planned)}"
        folder /= _part(f"paraphrases-{cell.paraphrases}-{source}")
    if cell.freeze != "none":
        folder /= _part(f"freeze-{cell.freeze}")
    if cell.adapter != "none":
        folder /= _part(cell.adapter)
    return folder / f"seed-{cell.seed}"


def _model_folder(name: str, given: str | None, path: str, planned: Plan) -> str:
    """A model's part of that; folders of one name are told apart by where they lie and what is in them."""
    if given in (None, *planned.cell.suite.models) or not Path(path).is_dir():
        return _part(name)
    from retention_bench.pipeline.inputs import model_fingerprint
    from retention_bench.pipeline.store import canonical

    told_apart = hashlib.sha256(canonical([path, model_fingerprint(path, None)]).encode()).hexdigest()
    return f"{_part(name)}-{told_apart[:8]}"


def _part(name: str) -> str:
    """A name as one part of a path: of the characters that every file system has, and not too long."""
    part = re.sub(r"[^A-Za-z0-9._@-]", "-", name)
    if part.startswith(".") or len(part) > 150:
        part = f"{part[:140].lstrip('.')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return part


def _device(asked: str) -> str:
    """The device to run on.

    Raises:
        RetentionBenchError: CUDA was asked for and is not there.
    """
    if asked == "cpu":
        return "cpu"
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise RetentionBenchError(
            "--device cuda: torch finds no CUDA device here. Give --device cpu, or run on a machine with a GPU."
        )
    return "cuda" if there else "cpu"


if __name__ == "__main__":
    sys.exit(main())
