"""`retention-bench list`: editors, fine-tunes, suites."""

from __future__ import annotations

import click

from retention_bench.cli.options import json_option
from retention_bench.display import say, say_json
from retention_bench.errors import UsageError


@click.command("list")
@click.argument("what", type=click.Choice(["editors", "finetunes", "suites"]))
@click.option("--suite", help="With editors: also those of a suite, by model, as `--editor` takes them.")
@json_option("the names")
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
