"""The root command, the list of commands, and the exit codes (0 success, 1 failure, 2 usage).

The help text needs only the list of commands, so it appears at once. A command's module, with all its imports, is
loaded only when the command is called. Errors go to stderr.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from followups.telemetry.escaping import escape

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Entry:
    """A command's module, its help line, and its panel in the help."""

    module: str
    help: str
    panel: str


TRY = "Try it on this machine"
SET_UP = "Set up"
OPERATE = "Operate"

CATALOGUE = {
    "up": Entry("up", "Run everything on this machine, with a sandbox chat that receives the messages.", TRY),
    "demo": Entry("demo", "Watch follow-ups be sent, retried, rejected and cancelled by a reply.", TRY),
    "migrate": Entry("migrate", "Upgrade the database to the newest schema.", SET_UP),
    "workspace": Entry("workspace", "Create, list and delete workspaces; set their sending hours.", SET_UP),
    "api-key": Entry("api_key", "Create, list and revoke API keys.", SET_UP),
    "doctor": Entry("doctor", "Check database, broker, transport, beat and workers, and advise what to do.", SET_UP),
    "openapi": Entry("openapi", "Print the OpenAPI document of the REST API.", SET_UP),
    "list": Entry("list", "List follow-ups, newest first.", OPERATE),
    "show": Entry("show", "Explain why one follow-up was sent, was not sent, or is not sent yet.", OPERATE),
    "cancel": Entry("cancel", "Cancel a pending follow-up, or all that are pending in a chat or workspace.", OPERATE),
    "reschedule": Entry("reschedule", "Change the due date of a pending follow-up.", OPERATE),
    "retry": Entry("retry", "Create a new follow-up from a failed one, or from all that have failed.", OPERATE),
    "pause": Entry("pause", "Stop a workspace or channel from sending; --list shows what is paused.", OPERATE),
    "resume": Entry("pause", "End a pause.", OPERATE),
    "limit": Entry("limit", "Limit the follow-ups sent per second: by workspace, by channel, per chat.", OPERATE),
    "audit": Entry("audit", "Show who did what: keys, pauses, limits, hours, changes by hand or in bulk.", OPERATE),
    "chat": Entry("chat", "Delete a chat with everything in it.", OPERATE),
    "prune": Entry("prune", "Delete follow-ups that finished long ago, optionally into an archive.", OPERATE),
    "health": Entry("health", "Check whether worker, beat or web is alive, for process supervisors.", OPERATE),
    "bench": Entry("bench", "Measure throughput and lag on the configured servers, without using your data.", SET_UP),
    "console": Entry("console", "Create a link that signs a person in to the console.", SET_UP),
    "stats": Entry(
        "stats", "Show counts by state, the oldest overdue, lag and throughput; live with --watch.", OPERATE
    ),
}
"""The commands, in the order in which the help lists them."""


class Catalogue(TyperGroup):
    """The root command, which lists the commands of `CATALOGUE` and imports each only when it is called."""

    def list_commands(self, ctx: object) -> list[str]:  # noqa: ARG002 - the base class's signature
        """Return the command names, in the order in which the help lists them."""
        return list(CATALOGUE)

    def get_command(self, ctx: object, cmd_name: str) -> TyperCommand | None:  # noqa: ARG002 - likewise
        """Return a command's entry in the help, without importing the command."""
        entry = CATALOGUE.get(cmd_name)
        return TyperCommand(cmd_name, help=entry.help, rich_help_panel=entry.panel) if entry else None

    def resolve_command(
        self,
        ctx: Any,  # noqa: ANN401 - the base class's own type for it is private
        args: list[str],
    ) -> tuple[str | None, Any, list[str]]:
        """Find and import the command that was called."""
        self.commands = dict.fromkeys(CATALOGUE)  # type: ignore[assignment]  # the names suggested for a typo
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name else command, rest


def load(name: str) -> TyperCommand | TyperGroup:
    """Import a command's module and return the command."""
    app: typer.Typer = importlib.import_module(f"followups.cli.{CATALOGUE[name].module}").app
    loaded = cast("TyperCommand | TyperGroup", get_command(app))
    if isinstance(loaded, TyperGroup) and name in loaded.commands:
        return cast("TyperCommand", loaded.commands[name])
    return loaded


def examples(*lines: str) -> str:
    r"""Return the examples section of a help text, with one command on each line.

    >>> examples("followups up")
    'Examples:\n\n**$ followups up**'
    """
    # Without blank lines between the examples, the help would join them into one paragraph.
    return "\n\n".join(["Examples:", *(f"**$ {line}**" for line in lines)])


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
    debug: Annotated[
        bool, typer.Option("--debug", envvar="FOLLOWUPS_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Send each scheduled chat follow-up once, at its due date, unless something cancels it first.

    Settings are read from the environment (FOLLOWUPS_DATABASE_URL, FOLLOWUPS_BROKER_URL, ...); `up` and `demo` need
    none. Exit codes: 0 success, 1 failure, 2 wrong usage.

    Why was a follow-up not sent? Find the follow-up with `list`, by its chat or state, and then run `show ID`, which
    explains the reason.
    """
    ctx.obj.debug = debug
    if ctx.invoked_subcommand is None:
        # the user did not request this help, so it is an error message
        with redirect_stdout(sys.stderr):
            ctx.get_help()
        raise typer.Exit(WRONG_USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in ``arguments``, which default to this process's arguments; return the exit code."""
    options = Options()
    if isinstance(sys.stdout, TextIOWrapper):
        # If the terminal's encoding lacks a character, an escape is printed, as on Python's stderr.
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
