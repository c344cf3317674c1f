"""The ``followups demo`` command."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import typer
from sqlalchemy.orm import Session

from followups.cli.demo.play import Stage
from followups.cli.demo.presentation import Pipe, Program, Terminal
from followups.cli.demo.scenario import script
from followups.cli.demo.score import look, score
from followups.cli.examples import examples
from followups.cli.failures import FAILED
from followups.cli.output import Json, console, remark
from followups.cli.signals import StopSignals
from followups.cli.system import Plan, running
from followups.database import make_engine
from followups.embedded import free_port
from followups.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.cli.demo.play import Scheduled
    from followups.cli.demo.presentation import Audience
    from followups.cli.demo.score import Score, Standing
    from followups.cli.system import Stack

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

WITHIN = timedelta(seconds=40)
"""How long the demo may take; the script needs a quarter of it."""

LOOK = timedelta(milliseconds=120)
"""Interval between two looks. Each look costs processor time that punctual sending needs."""

SHORT = {
    "retry_base": timedelta(seconds=0.8),
    "retry_cap": timedelta(seconds=2),
}
"""Settings that differ from the defaults, so that retries finish within the demo."""


@app.command(epilog=examples("followups demo", "followups demo --json"))
def demo(*, json: Json = False) -> None:
    """Run everything on this machine and play a scenario of 55 follow-ups in 13 chats, in about twenty seconds.

    They are sent on time, retried, rejected, and cancelled by a reply, all through the REST API. Nothing needs to be
    installed or configured, and nothing is left behind. Exit code 0 only when every follow-up ended as scripted and
    none arrived twice. Lag is the acceptance minus the due date, by the database's clock, of those that the first
    attempt delivered (the lag of a retried one is its backoff).
    """
    with StopSignals() as signals, running(plan_of(signals)) as stack:
        result = perform(stack, _audience(stack, json=json))
    if not result.ok:
        raise typer.Exit(FAILED)


def plan_of(signals: StopSignals) -> Plan:
    """Return what to start for the demo: the default settings, whatever the environment says.

    So everyone sees the same demo.
    """
    defaults = {name: each.default for name, each in Settings.model_fields.items() if not each.is_required()}
    return Plan(free_port(), remark, signals, overrides=defaults | SHORT | {"log_format": "console"})


def _audience(stack: Stack, *, json: bool) -> Audience:
    if json:
        return Program()
    return Terminal(stack.sandbox) if console().is_terminal else Pipe(stack.sandbox)


def perform(stack: Stack, audience: Audience) -> Score:
    """Play the scenario on a running system and present it."""
    workspace_id, key = stack.create_key("demo", "followups demo")
    engine = make_engine(stack.settings.database_url.get_secret_value(), pool_size=1)
    with ExitStack() as cleanup:
        cleanup.callback(engine.dispose)
        cleanup.callback(audience.leave)
        stage = cleanup.enter_context(closing(Stage(stack, key, script())))
        scheduled = stage.schedule(stage.open_chats())
        standings = _play(stack, engine, workspace_id, stage, scheduled, audience)
        result = score(standings, stage.receipts())
        audience.close(result)
    return result


def _play(
    stack: Stack,
    engine: Engine,
    workspace_id: UUID,
    stage: Stage,
    scheduled: Sequence[Scheduled],
    audience: Audience,
) -> list[Standing]:
    deadline = time.monotonic() + WITHIN.total_seconds()
    while True:
        for name in stage.play(datetime.now(UTC)):
            audience.hear(name)
        with Session(engine) as session:
            standings = look(session, workspace_id, scheduled)
        audience.watch(standings, datetime.now(UTC))
        if all(each.ended for each in standings) or time.monotonic() > deadline:
            return standings
        stack.check()
        time.sleep(LOOK.total_seconds())
