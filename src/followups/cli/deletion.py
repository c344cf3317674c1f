"""The steps shared by the deletion of workspaces and chats: count, confirm by name, delete in batches."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import typer

from followups.cli import batches, connection
from followups.cli.output import remark
from followups.operations import deletion
from followups.settings import get_settings
from followups.store import deletion as store
from followups.telemetry.escaping import escape

if TYPE_CHECKING:
    from followups.cli.batches import Manner
    from followups.store.deletion import Whole

PATIENCE = timedelta(seconds=15)
"""How long to wait for attempts in flight, in addition to the duration of a lease."""


def carry_out(whole: Whole, what: str, name: str, manner: Manner) -> None:
    """Delete a workspace or chat, unless this is a dry run or the operator does not confirm its ``name``."""
    with connection.engine() as engine:
        with engine.connect() as opened:
            counted = store.count(opened, whole)
        plan = batches.BulkPreview(verb="delete", done="deleted", number=counted, sample=())
        if not (manner.dry_run or manner.yes):
            _ask(what, name, plan.counted)
        patience = get_settings().lease + PATIENCE
        actor = connection.actor()
        batches.carry_out(plan, lambda: deletion.delete(engine, actor, whole, patience), replace(manner, yes=True))


def _ask(what: str, name: str, counted: str) -> None:
    """Ask the operator to type the name.

    Raises a usage error if stdin is not a terminal, and `typer.Exit` for any other answer.
    """
    if not sys.stdin.isatty():
        message = f"{what} with {counted}: where no name can be asked for, --yes says that the deletion is meant"
        raise typer.BadParameter(message, param_hint="--yes")
    remark(f"This deletes {what} with {counted}, for good.")
    if typer.prompt(escape(f"Type {name} to delete it"), err=True, default="", show_default=False) != name:
        remark("Nothing has changed.")
        raise typer.Exit(1)
