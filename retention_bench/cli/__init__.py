"""The command line: parse, call the API, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import click

from retention_bench.cli.group import Commands
from retention_bench.version import __version__

__all__ = ["main"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="retention-bench")
def main() -> None:
    """Which edits of a language model's knowledge survive fine-tuning.

    retention-bench edits facts into a model, fine-tunes it downstream, and scores how many edited facts, and how many
    intrinsic facts, it still answers.
    """
