"""The ``followups doctor`` command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.table import Table

from followups.cli import connection
from followups.cli.entry import examples
from followups.cli.failures import FAILED
from followups.cli.output import Json, cell, console, print_json
from followups.operations.doctor import Finding, checks
from followups.settings import get_settings

if TYPE_CHECKING:
    from followups.settings import Settings

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(epilog=examples("followups doctor", "followups doctor --json"))
def doctor(*, json: Json = False) -> None:
    """Check everything that sending needs, and show how to fix each problem.

    The command checks the settings, database, migrations, ticks (beat and workers together), overdue follow-ups, recent
    failures, broker, transport, workers, and the processes on this machine. The exit code is 1 if a check failed.
    """
    settings = get_settings()
    with connection.engine() as engine:
        findings = list(checks.run(settings, engine, connection.ask_workers, connects=True))
    well = all(finding.ok for finding in findings)
    if json:
        print_json({"ok": well, "settings": settings.shown(), "checks": [each.document() for each in findings]})
    else:
        _print(settings, findings)
    if not well:
        raise typer.Exit(FAILED)


def _print(settings: Settings, findings: list[Finding]) -> None:
    target = console()
    shown = Table.grid(padding=(0, 2))
    for name, value in settings.shown().items():
        shown.add_row(cell(name, "dim"), cell(value))
    target.print(shown)
    target.print()
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        mark = cell("ok", "green") if finding.ok else cell("failed", "bold red")
        table.add_row(mark, cell(finding.name, "bold"), cell(finding.detail))
        if finding.advice:
            table.add_row("", "", cell(finding.advice, "yellow"))
    target.print(table)
    failed = sum(not finding.ok for finding in findings)
    target.print()
    target.print(f"{failed} of {len(findings)} checks failed." if failed else "All is well.")
