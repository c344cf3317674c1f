"""Output of the commands: results are printed on stdout, everything else on stderr.

On a terminal, tables fit the terminal's width. In a pipe, tables are plain and complete. Printed texts may come from
untrusted sources. Each value is printed as plain text, with control characters escaped.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from followups.telemetry.escaping import escape, escape_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PIPE_WIDTH = 1000
"""Table width if stdout is not a terminal. No row of a table exceeds this width."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def console() -> Console:
    """Return a console for stdout that respects NO_COLOR."""
    return _on(sys.stdout)


def remarks() -> Console:
    """Return a console for stderr."""
    return _on(sys.stderr)


def _on(stream: Any) -> Console:  # noqa: ANN401 - a text stream; which class depends on who replaced it
    return Console(file=stream, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


def print_json(document: object) -> None:
    """Print one JSON document on stdout."""
    in_utf_8 = (sys.stdout.encoding or "").lower().startswith("utf")
    said = json.dumps(document, indent=2, ensure_ascii=not in_utf_8)
    sys.stdout.write(f"{escape_json(said)}\n")


def print_line(sentence: str, *, lines: bool = False) -> None:
    """Print a sentence on stdout and flush it, because a process that reads a pipe may be waiting."""
    sys.stdout.write(f"{escape(sentence, lines=lines)}\n")
    sys.stdout.flush()


def remark(sentence: str) -> None:
    """Print a remark on stderr."""
    sys.stderr.write(f"{escape(sentence)}\n")


def cell(text: str, style: str = "", *, lines: bool = False) -> Text:
    """Return a string as a table cell without any markup. If ``lines`` is set, line feeds are kept."""
    return Text(escape(text, lines=lines), style=style)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """Print a table on stdout, or ``empty`` on stderr if the table has no rows."""
    target = console()
    table = Table(*headings, box=SIMPLE_HEAD if target.is_terminal else None, pad_edge=target.is_terminal)
    for row in rows:
        table.add_row(*map(cell, row))
    if table.row_count:
        target.print(table)
    else:
        remark(empty)
