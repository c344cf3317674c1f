"""The bulk forms of ``cancel`` and ``retry``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer
from sqlalchemy.orm import Session

from followups import scheduling
from followups.cli import bulk, connection
from followups.cli.filters import workspace_id_of
from followups.errors import ChatNotFoundError, ConflictError, OutsideMessagingWindowError
from followups.states import Status
from followups.store import bulk_cancel, retries
from followups.store.bulk_cancel import Pending, Place
from followups.store.retries import Failures, Moment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.cli.times import Since
    from followups.states import Final, ReasonCode

PASSES = 5
PAUSE = 0.2
"""Seconds between two tries at a row that another transaction has locked, and the number of tries."""

RETRIES = 500
"""Follow-ups fetched at once. Each is retried in a transaction of its own: it locks its chat, and a transaction that
locked several chats would wait for others that do the same.
"""


@dataclass(frozen=True, slots=True)
class Manner:
    """The options that all bulk commands share."""

    dry_run: bool
    yes: bool
    json: bool


def cancel_many(*, workspace: str | None, chat: UUID | None, reason: str | None, manner: Manner) -> None:
    """Cancel everything pending in a workspace or a chat."""
    if reason is not None:
        scheduling.check_reason(reason, Status.CANCELLED)
    final = scheduling.final_of(Status.CANCELLED, reason)
    with connection.engine() as engine:
        with Session(engine) as session:
            chosen = _chosen(session, workspace, chat)
            opened = session.connection()
            counts = [bulk_cancel.count_pending(opened, each) for each in chosen]
            sample = [str(one) for each in chosen for one in bulk_cancel.some_pending(opened, each, bulk.SAMPLE)]
        in_flight = sum(count.in_flight for count in counts)
        plan = bulk.Plan(
            verb="cancel",
            done="cancelled",
            number=sum(count.number for count in counts),
            sample=sample[: bulk.SAMPLE],
            remark=f"{in_flight:,} of them are in flight: these can only be kept from another try." * bool(in_flight),
        )
        _carry_out(plan, lambda: _cancel(engine, chosen, final), manner)


def _carry_out(plan: bulk.Plan, batches: bulk.Batches, manner: Manner) -> None:
    bulk.carry_out(plan, batches, dry_run=manner.dry_run, yes=manner.yes, json=manner.json)


def _chosen(session: Session, workspace: str | None, chat: UUID | None) -> list[Pending]:
    owner = workspace_id_of(session, workspace)
    now = bulk_cancel.now(session.connection())
    if chat is None and owner is not None:
        return [Pending(owner, None, now)]
    found = bulk_cancel.workspaces_of_chat(session.connection(), chat) if chat else []
    mine = [each for each in found if owner in {None, each}]
    if not mine:
        message = f"there is no chat {chat}{f' in {workspace!r}' if workspace else ''}"
        raise typer.BadParameter(message, param_hint="--chat")
    return [Pending(each, chat, now) for each in mine]


def _cancel(engine: Engine, chosen: Sequence[Pending], final: Final) -> Iterator[dict[str, int]]:
    for pending in chosen:
        for _ in range(PASSES):
            yield from _cancel_pass(engine, pending, final)
            with engine.connect() as opened:
                left = bulk_cancel.count_pending(opened, pending).number
            if not left:
                break
            time.sleep(PAUSE)
        else:
            yield {"heldByOthers": left}


def _cancel_pass(engine: Engine, pending: Pending, final: Final) -> Iterator[dict[str, int]]:
    place: Place | None = Place()
    while place is not None:
        with engine.begin() as opened:
            batch = bulk_cancel.cancel_if_not_begun(opened, pending, final, place)
        place = batch.ended
        yield {"cancelled": len(batch.cancelled), "inFlight": batch.in_flight}


def retry_many(*, since: Since, workspace: str | None, codes: Sequence[ReasonCode], manner: Manner) -> None:
    """Create new follow-ups, due now, from those that failed since then and have not been retried."""
    with connection.engine() as engine:
        with Session(engine) as session:
            owner = workspace_id_of(session, workspace)
            opened = session.connection()
            now = bulk_cancel.now(opened)
            failures = Failures(since.resolve(now), now, owner, tuple(codes))
            number = retries.count_failed(opened, failures)
            sample = [str(one.id) for one in retries.some_failed(opened, failures, bulk.SAMPLE)]
        plan = bulk.Plan(verb="retry", done="retried", number=number, sample=sample)
        _carry_out(plan, lambda: _retry(engine, failures), manner)


def _retry(engine: Engine, failures: Failures) -> Iterator[dict[str, int]]:
    after = Moment()
    while True:
        with engine.connect() as opened:
            batch = retries.some_failed(opened, failures, RETRIES, after)
        if not batch:
            return
        for one in batch:
            yield {_retry_one(engine, one.id): 1}
        after = Moment(batch[-1].finished_at, batch[-1].id)


def _retry_one(engine: Engine, follow_up_id: UUID) -> str:
    """Retry one follow-up and return the result."""
    try:
        with Session(engine) as session, session.begin():
            scheduling.retry_once(session, follow_up_id)
    except OutsideMessagingWindowError:
        return "outsideMessagingWindow"
    except ChatNotFoundError:
        return "chatRemoved"
    except ConflictError as error:
        return {"already-retried": "alreadyRetried", "too-many-pending": "tooManyPending"}.get(
            error.slug, "answeredMeanwhile"
        )
    return "retried"
