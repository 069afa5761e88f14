"""The group of all commands: loads a command when it is called, and shows errors in one line."""

from __future__ import annotations

import errno
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import click

from retention_bench.display import line, prepare_streams, say_error
from retention_bench.errors import RetentionBenchError

COMMANDS = {
    "compare": "retention_bench.cli.compare:compare",
    "covariance": "retention_bench.cli.covariance:covariance",
    "evaluate": "retention_bench.cli.evaluate:evaluate",
    "inspect": "retention_bench.cli.inspect:inspect",
    "list": "retention_bench.cli.list:list_",
    "score": "retention_bench.cli.score:score",
    "show": "retention_bench.cli.show:show",
    "stage": "retention_bench.cli.stage:stage",
    "statistics": "retention_bench.cli.covariance:statistics",
}
"""One line registers a command. Its module is imported when the command is called."""


class Commands(click.Group):
    """Loads a command when it is called, and shows errors that a user can act on in one line, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of that name, its module imported now."""
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run with the arguments, and exit: 2 for usage, 1 for failure."""
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
        """Run the command that was named."""
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
