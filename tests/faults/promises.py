"""Checks the guarantees against the chat's record of requests and the database's history."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from faults import history
from followups.models import FollowUp

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from uuid import UUID

    from sqlalchemy import Engine

UNKNOWN = "unknown"
"""Text in a follow-up's reason if the message may have been accepted. If the reason lacks this text and the message was
accepted, the follow-up must end as sent.
"""


@dataclass(frozen=True, slots=True)
class Record:
    """The creations and cancels that the system confirmed, and the follow-ups sent by another system."""

    created: frozenset[UUID] = frozenset()
    """The follow-ups whose creation the system has confirmed."""
    cancelled: Mapping[UUID, float] = field(default_factory=dict)
    """The acknowledged cancels, each with the monotonic time of its acknowledgement in seconds."""
    sent_by_others: frozenset[UUID] = frozenset()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the follow-ups ended, with a count of the violations of each promise."""

    lost: int
    doubled: int
    after_cancel: int
    silently_late: int
    contradictions: int
    rewritten: int
    disordered: int
    misdirected: int
    ended: Counter[str]
    unknown: int
    """The follow-ups that ended with an unknown outcome."""
    repeated: int
    """The requests whose idempotency key the chat had already accepted."""

    def broken(self) -> dict[str, int]:
        """Return the promises that were broken, each with a count."""
        counts = asdict(self)
        for name in ("ended", "unknown", "repeated"):
            del counts[name]
        return {name: count for name, count in counts.items() if count}


def check(
    engine: Engine, requests: Collection[Mapping[str, Any]], known: Record, *, max_lateness: float = 86_400
) -> Verdict:
    """Compare the database's follow-ups with the chat's received requests, which are given oldest first."""
    with engine.connect() as connection:
        rows = {row.id: row for row in connection.execute(select(FollowUp.__table__))}
    by_id: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for request in requests:
        by_id[request["followUpId"]].append(request)
    taken = {id_: [one for one in each if one["accepted"]] for id_, each in by_id.items()}
    return Verdict(
        lost=sum(row.status == "pending" for row in rows.values()) + len(known.created - rows.keys()),
        doubled=sum(len(each) > 1 for each in taken.values())
        + sum(len({one["idempotencyKey"] for one in each}) > 1 for each in by_id.values()),
        after_cancel=_after_cancel(history.begun_after_cancel(engine), by_id, known),
        silently_late=sum(one["lagMs"] > max_lateness * 1000 for one in requests if one["accepted"]),
        contradictions=sum(_contradicts(row, taken.get(str(id_), []), known) for id_, row in rows.items()),
        rewritten=history.rewritten(engine),
        disordered=_disordered(rows, requests),
        misdirected=sum(one["chatId"] != str(rows[_id(rows, one)].chat_id) for one in requests),
        ended=Counter(row.status for row in rows.values()),
        unknown=sum(UNKNOWN in (row.reason or "") for row in rows.values()),
        repeated=sum(one["duplicate"] for one in requests),
    )


def _id(rows: Mapping[UUID, Any], request: Mapping[str, Any]) -> UUID:
    return next(iter(rows)).__class__(request["followUpId"])


def _contradicts(row: Any, taken: Collection[Any], known: Record) -> bool:
    if row.status == "sent":
        return not taken and row.id not in known.sent_by_others
    return bool(taken) and UNKNOWN not in (row.reason or "") and row.status != "pending"


def _after_cancel(begun_after: set[UUID], by_id: Mapping[str, Collection[Mapping[str, Any]]], known: Record) -> int:
    received_after = {
        id_
        for id_, acknowledged in known.cancelled.items()
        if any(one["receivedMonotonic"] > acknowledged for one in by_id.get(str(id_), ()))
    }
    return len(begun_after | received_after)


def _disordered(rows: Mapping[UUID, Any], requests: Collection[Mapping[str, Any]]) -> int:
    """Count follow-ups that a chat accepted after another follow-up with a later due date."""
    latest: dict[str, tuple[Any, UUID]] = {}
    count = 0
    for request in requests:
        if request["accepted"] and not request["duplicate"]:
            row = rows[_id(rows, request)]
            place = (row.due_date, row.id)
            if request["chatId"] in latest and place < latest[request["chatId"]]:
                count += 1
            latest[request["chatId"]] = max(place, latest.get(request["chatId"], place))
    return count
