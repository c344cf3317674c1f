"""Each follow-up's result, compared with the demo's script, and a summary.

Lag is the time of acceptance minus the due date, both read from the database. The worker determines the time of
acceptance after it has received the response. The measured lag is never shorter than the lag that the receiver
observed. Only follow-ups delivered at the first attempt are counted, because waiting for a retry is not lag. Every
follow-up in the script was created before it was due.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from followups.cli.demo.scenario import REFUSED, REPLYING
from followups.states import FINAL, Status, code_of
from followups.store import listing
from followups.store.listing import ListFilter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from rich.console import RenderableType
    from sqlalchemy.orm import Session

    from followups.cli.demo.scenario import Scheduled
    from followups.models import FollowUp

MILLISECOND = timedelta(milliseconds=1)
QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class FollowUpState:
    """The current state of one follow-up."""

    scheduled: Scheduled
    status: Status
    attempts: int
    reason: str | None
    next_attempt_at: datetime | None
    lag: float | None
    """The follow-up's lag in milliseconds, or None until it is accepted."""

    @property
    def chat(self) -> str:
        """The name of the follow-up's chat."""
        return self.scheduled.part.chat

    @property
    def ended(self) -> bool:
        """Whether the follow-up is in a final state."""
        return self.status in FINAL

    @property
    def retried(self) -> bool:
        """Whether the follow-up took more than one attempt."""
        return self.attempts > 1

    @property
    def trying_again(self) -> bool:
        """Whether an attempt has failed and another one will follow."""
        return not self.ended and self.attempts > 0 and self.next_attempt_at is not None

    @property
    def as_scripted(self) -> bool:
        """Whether the follow-up ended as scripted."""
        ending = self.scheduled.part.ending
        ended = (self.status, self.attempts, code_of(self.reason))
        return ended == (ending.status, ending.attempts, ending.code.value if ending.code else "")


def read_states(session: Session, workspace_id: UUID, scheduled: Sequence[Scheduled]) -> list[FollowUpState]:
    """Return the current state of each follow-up, in the given order."""
    found, _ = listing.page(session, workspace_id, ListFilter(), page_number=1, page_size=len(scheduled))
    rows = {row.id: row for row in found}
    return [_standing(each, rows[each.id]) for each in scheduled]


def _standing(scheduled: Scheduled, row: FollowUp) -> FollowUpState:
    lag = (row.accepted_at - row.due_date) / MILLISECOND if row.accepted_at else None
    return FollowUpState(scheduled, Status(row.status), row.attempts, row.reason, row.next_attempt_at, lag)


@dataclass(frozen=True, slots=True)
class Score:
    """The figures of one run of the demo."""

    sent: int
    failed: int
    cancelled: int
    retried: int
    duplicates: int
    """Idempotency keys that the receiver accepted more than once."""
    lag: Mapping[str, float | None]
    """Quantiles of the lag in milliseconds (nearest rank)."""
    problems: tuple[str, ...]
    """The differences between the demo's script and what actually happened."""

    @property
    def ok(self) -> bool:
        """Whether every follow-up ended according to the script and none arrived twice."""
        return not self.problems

    def document(self) -> dict[str, object]:
        """Return the JSON form that ``followups demo --json`` prints."""
        counts = {name: getattr(self, name) for name in ("sent", "failed", "cancelled", "retried", "duplicates")}
        return {**counts, "lagMs": dict(self.lag), "ok": self.ok}


def score(standings: Sequence[FollowUpState], receipts: Mapping[str, object]) -> Score:
    """Count the outcomes, and compare them with the script and the receiver's counts."""
    by_status = {status: sum(each.status == status for each in standings) for status in Status}
    duplicates = int(str(receipts["duplicates"]))
    return Score(
        sent=by_status[Status.SENT],
        failed=by_status[Status.FAILED],
        cancelled=by_status[Status.CANCELLED],
        retried=sum(each.status == Status.SENT and each.retried for each in standings),
        duplicates=duplicates,
        lag=lags(standings),
        problems=tuple(_problems(standings, receipts, by_status[Status.SENT])),
    )


def _problems(standings: Sequence[FollowUpState], receipts: Mapping[str, object], sent: int) -> list[str]:
    problems = [_difference(each) for each in standings if not each.as_scripted]
    if receipts["duplicates"]:
        problems.append(f"the receiver got {receipts['duplicates']} messages more than once")
    if receipts["accepted"] != sent:
        problems.append(f"{sent} are recorded as sent, and the receiver took {receipts['accepted']}")
    return problems


def _difference(standing: FollowUpState) -> str:
    ending = standing.scheduled.part.ending
    wanted = f"{ending.status} after {ending.attempts} attempts"
    found = f"{standing.status} after {standing.attempts}" + (f" ({standing.reason})" if standing.reason else "")
    return f"{standing.chat}'s of second {standing.scheduled.part.due:g} should be {wanted}, and is {found}"


def lags(standings: Sequence[FollowUpState]) -> dict[str, float | None]:
    """Return quantiles of the lag in milliseconds, for messages accepted at the first attempt."""
    ordered = sorted(each.lag for each in standings if each.lag is not None and not each.retried)
    if not ordered:
        return dict.fromkeys(QUANTILES)
    return {name: round(ordered[math.ceil(q * len(ordered)) - 1], 3) for name, q in QUANTILES.items()}


NEXT = (
    ("followups up", "the same system, kept running, with an API to call"),
    ("", "and a chat page to watch, reply and inject faults"),
    ("followups stats --watch", "a live dashboard, in another terminal"),
)


def _facts(score: Score) -> list[tuple[str, str]]:
    """Return the figures of the run, each with an explanation."""
    lag = score.lag
    return [
        (f"{score.sent} sent", "each at its due date, through web, beat, broker and worker"),
        (f"{score.retried} retried", "the receiver answered 500; the retries' times were stored"),
        (f"{score.failed} failed", f"the receiver refused {REFUSED}'s with 403: not tried again"),
        (f"{score.cancelled} cancelled", f"{REPLYING} replied before they were due"),
        (f"{score.duplicates} duplicates", "counted by the receiver"),
        (
            "lag",
            f"p50 {_number(lag['p50'])}  p95 {_number(lag['p95'])}  p99 {_number(lag['p99'])} ms (first attempts)",
        ),
    ]


def summary_panel(score: Score) -> RenderableType:
    """Return the summary as a panel for a terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    for fact in _facts(score):
        table.add_row(*fact)
    onward = Table.grid(padding=(0, 2))
    onward.add_column(style="bold cyan", no_wrap=True)
    for line in NEXT:
        onward.add_row(*line)
    parts: list[RenderableType] = [table, "", onward]
    if score.problems:
        parts = [table, "", *(Text(f"Not as scripted: {problem}", style="red") for problem in score.problems)]
    title = "[bold green]All as scripted" if score.ok else "[bold red]Not as scripted"
    return Panel(Group(*parts), title=title, title_align="left", border_style="green" if score.ok else "red")


def summary_lines(score: Score) -> Sequence[str]:
    """Return the summary as plain lines, for output that is not a terminal."""
    said = [f"{name}: {meaning}" for name, meaning in _facts(score)]
    said += [f"Not as scripted: {problem}" for problem in score.problems]
    return [*said, "All as scripted. Next: followups up" if score.ok else "Not all as scripted."]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
