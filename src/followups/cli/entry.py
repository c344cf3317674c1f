"""The root command, and the exit codes: 0 success, 1 failure, 2 wrong usage.

Errors are printed on stderr.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command

from followups.cli.catalogue import Catalogue, examples
from followups.telemetry.escaping import escape

if TYPE_CHECKING:
    from collections.abc import Sequence

FAILED = 1
WRONG_USAGE = 2

app = typer.Typer(
    cls=Catalogue,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "followups demo", "followups up", "followups list --chat CHAT", "followups show ID", "followups COMMAND --help"
    ),
)


@dataclass
class Options:
    """The global options, which precede the command."""

    debug: bool = False


def _print_version(*, wanted: bool) -> None:
    if wanted:
        typer.echo(f"followups {version('chat-followups')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    *,
    debug: Annotated[bool, typer.Option("--debug", envvar="FOLLOWUPS_DEBUG", help="Show an error's trace.")] = False,
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Send each scheduled chat follow-up once, at its due date, unless something cancels it first.

    Settings are read from the environment (FOLLOWUPS_DATABASE_URL, FOLLOWUPS_BROKER_URL, ...); `up` and `demo` need
    none. Exit codes: 0 success, 1 failure, 2 wrong usage.

    Why was a follow-up not sent? Find it with `list`, by its chat or state; `show ID` explains it.
    """
    ctx.obj.debug = debug
    if ctx.invoked_subcommand is None:
        # the user did not request this help, so it is an error message rather than output
        with redirect_stdout(sys.stderr):
            ctx.get_help()
        raise typer.Exit(WRONG_USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in ``arguments``, which default to this process's arguments; return the exit code."""
    options = Options()
    if isinstance(sys.stdout, TextIOWrapper):
        # Characters that the terminal's encoding lacks are printed as escapes, as Python prints them on stderr.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command: Any = get_command(app)
        code = command.main(args=arguments, prog_name="followups", standalone_mode=False, obj=options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if options.debug:
            raise
        from followups.cli.failures import explain  # noqa: PLC0415 - loads SQLAlchemy, which only an error needs

        sentence, code = explain(error)
        quotes_a_log = getattr(error, "slug", "") == "embedded"
        sys.stderr.write(f"followups: {escape(sentence, lines=quotes_a_log)}\n")
    # Typer exits with 130 after Ctrl-C, but this command line has only three exit codes.
    return int(code or 0) if code in {None, 0, FAILED, WRONG_USAGE} else FAILED
