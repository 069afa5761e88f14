"""`retention-bench list`: editors, fine-tunes, suites."""

from __future__ import annotations

import dataclasses

import click

from retention_bench.cli.options import json_option
from retention_bench.display import say, say_json
from retention_bench.errors import UsageError


@click.command("list")
@click.argument("what", type=click.Choice(["editors", "finetunes", "suites"]))
@click.option("--suite", help="With editors: also those of a suite, by model, as `--editor` takes them.")
@json_option("what there is")
def list_(what: str, suite: str | None, as_json: bool) -> None:
    """List the editors, the fine-tunes or the suites, those of installed packages with them."""
    if suite is not None and what != "editors":
        raise UsageError(f"--suite goes with `list editors`, not with `list {what}`. Leave it out.")
    if what == "suites":
        from retention_bench.pipeline.suite import suite_names

        say_json(suite_names(), indent=None) if as_json else say("\n".join(suite_names()))
        return
    from retention_bench.registry import EDITORS, FINETUNES, Entry

    entries = (EDITORS if what == "editors" else FINETUNES).entries()
    models = {}
    if suite is not None:
        from retention_bench.pipeline.suite import load_suite

        models = {name: model.registered for name, model in load_suite(suite).models.items()}
    if as_json:
        listed = [dataclasses.asdict(entry) for entry in entries]
        say_json({"editors": listed, "suite": suite, "models": models} if suite else listed, indent=None)
        return

    def told(entry: Entry) -> str:
        package = f" ({entry.package})" if entry.package else ""
        return f"{entry.name}{package}{f': {entry.error}' if entry.error else ''}"

    lines = [told(entry) for entry in entries]
    for model, editors in models.items():
        lines += ["", f"suite {suite}, model {model}:"]
        lines += [f"  {name}" + (f" ({editor})" if name != editor else "") for name, editor in editors.items()]
    say("\n".join(lines))
