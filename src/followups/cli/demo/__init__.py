"""``followups demo``: a scripted scenario on the real system, shown live, line by line, or as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import typer
from rich.live import Live
from sqlalchemy.orm import Session

from followups.cli.demo.picture import Picture, state_of
from followups.cli.demo.scenario import DemoRun, script
from followups.cli.demo.score import FollowUpState, read_states, score, summary_lines, summary_panel
from followups.cli.entry import examples
from followups.cli.failures import FAILED
from followups.cli.output import Json, console, print_json, print_line, remark
from followups.database import make_engine
from followups.embedded import free_port
from followups.embedded.stop_signals import StopSignals
from followups.embedded.system import StartPlan, running
from followups.settings import Settings

if TYPE_CHECKING:
    from uuid import UUID

    from followups.cli.demo.score import Score
    from followups.embedded.system import Stack

Show = Callable[[Sequence[FollowUpState], datetime, Sequence[str]], None]
"""A callback that receives the follow-ups' states, the time, and the chats in which a user has just replied."""

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

WITHIN = timedelta(seconds=40)
"""Time limit of the demo, which normally takes a quarter of this time."""

LOOK = timedelta(milliseconds=120)
"""Time between two database queries for the state of the follow-ups.

Each query uses processor time that the worker needs to send on time.
"""

SHORT = {
    "retry_base": timedelta(seconds=0.8),
    "retry_cap": timedelta(seconds=2),
}
"""Settings with shorter times than the defaults, so that retries finish before the demo ends."""


@app.command(epilog=examples("followups demo", "followups demo --json"))
def demo(*, json: Json = False) -> None:
    """Run everything on this machine and play a scenario of 55 follow-ups in 13 chats in about 20 seconds.

    The follow-ups are sent on time, retried, rejected, or cancelled by a reply, all through the REST API. Nothing needs
    to be installed or configured, and nothing is left behind. The exit code is 0 only if every follow-up ended as
    scripted and none arrived twice. Lag is the time of acceptance minus the due date, by the database's clock. Lag is
    measured only for follow-ups that the first attempt delivered. A retried follow-up is late because of its backoff.
    """
    with StopSignals() as signals, running(plan_of(signals)) as stack:
        result = _present(stack, json=json)
    if not result.ok:
        raise typer.Exit(FAILED)


def plan_of(signals: StopSignals) -> StartPlan:
    """Return the demo's processes and settings, which do not depend on the environment.

    Fixed settings make the demo the same on every machine.
    """
    defaults = {name: each.default for name, each in Settings.model_fields.items() if not each.is_required()}
    return StartPlan(free_port(), remark, signals, overrides=defaults | SHORT | {"log_format": "console"})


def _present(stack: Stack, *, json: bool) -> Score:
    """Run the scenario and show it as JSON, a live display, or one line per event."""
    if json:
        result = perform(stack, lambda *_: None)
        print_json(result.document())
    elif console().is_terminal:
        result = _draw(stack)
    else:
        print_line(f"The sandbox page is at {stack.sandbox}/ while this runs. This link signs in to the console, once:")
        print_line(stack.create_console_link())
        result = perform(stack, EventLines())
        for line in summary_lines(result):
            print_line(line)
    return result


def _draw(stack: Stack) -> Score:
    target = console()
    target.print(f"Console (this link works once): {stack.create_console_link()}", soft_wrap=True, highlight=False)
    with Live(console=target, auto_refresh=False, vertical_overflow="crop") as live:

        def show(standings: Sequence[FollowUpState], now: datetime, _: Sequence[str]) -> None:
            live.update(Picture(standings, now, stack.sandbox, *target.size).render(), refresh=True)

        result = perform(stack, show)
    target.print(summary_panel(result))
    return result


class EventLines:
    """Prints a line for each change to a follow-up."""

    def __init__(self) -> None:
        """Create the demo's state, in which every follow-up is pending."""
        self._known: dict[UUID, tuple[str, int]] = {}

    def __call__(self, standings: Sequence[FollowUpState], now: datetime, replied: Sequence[str]) -> None:
        """Print the changes since the previous call."""
        for name in replied:
            print_line(f"{name:5} writes back")
        for each in standings:
            found = (each.status.value, each.attempts if each.trying_again else 0)
            if found != self._known.get(each.scheduled.id, ("pending", 0)):
                lag = "" if each.lag is None else f"  lag {each.lag:.1f} ms"
                due = f"due second {each.scheduled.part.due:5.2f}"
                print_line(f"{each.chat:5} {due}  {state_of(each, now)}{lag}")
            self._known[each.scheduled.id] = found


def perform(stack: Stack, show: Show) -> Score:
    """Play the scenario on a running system, and show the state of its follow-ups regularly."""
    workspace_id, key = stack.create_key("demo", "followups demo")
    engine = make_engine(stack.settings.database_url.get_secret_value(), pool_size=1)
    with ExitStack() as cleanup:
        cleanup.callback(engine.dispose)
        stage = cleanup.enter_context(closing(DemoRun(stack, key, script())))
        scheduled = stage.schedule(stage.open_chats())
        deadline = time.monotonic() + WITHIN.total_seconds()
        while True:
            replied = stage.play(datetime.now(UTC))
            with Session(engine) as session:
                standings = read_states(session, workspace_id, scheduled)
            show(standings, datetime.now(UTC), replied)
            if all(each.ended for each in standings) or time.monotonic() > deadline:
                return score(standings, stage.receipts())
            stack.check()
            time.sleep(LOOK.total_seconds())
