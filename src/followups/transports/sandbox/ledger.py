"""The sandbox's record of received requests, with exact counts and the lag of accepted messages."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import NamedTuple
from uuid import uuid4

KEEP_RECORDS = 200_000
"""Number of requests kept by default. The counts include requests that are no longer kept."""
KEEP_KEYS = 1_000_000
"""Number of idempotency keys that are kept. When the limit is reached, the oldest key is removed, as in a real
chat server.
"""

QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99, "max": 1.0}


class Arrival(NamedTuple):
    """A request's arrival in seconds, by the wall clock (Unix time) and the monotonic clock."""

    wall: float
    monotonic: float

    @classmethod
    def now(cls) -> Arrival:
        """Return the current time of the wall clock and of the monotonic clock."""
        return cls(time.time(), time.monotonic())


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One request. ``due`` is Unix time; ``status`` is None if the request got no answer."""

    follow_up_id: str
    chat_id: str
    idempotency_key: str
    attempt: int
    due: float
    received: Arrival
    message_length: int
    outcome: str
    status: int | None
    accepted: bool
    """Whether this request itself added a message to the chat."""
    duplicate: bool
    """Whether the sandbox had already accepted an earlier request with the same key."""

    @property
    def lag(self) -> float:
        """Time from the due date to the arrival of the request, in milliseconds."""
        return (self.received.wall - self.due) * 1000

    def document(self) -> dict[str, object]:
        """Return the JSON form of the request."""
        return {
            "followUpId": self.follow_up_id,
            "chatId": self.chat_id,
            "idempotencyKey": self.idempotency_key,
            "attempt": self.attempt,
            "dueDate": timestamp(self.due),
            "receivedAt": timestamp(self.received.wall),
            "receivedMonotonic": self.received.monotonic,
            "lagMs": round(self.lag, 3),
            "messageLength": self.message_length,
            "outcome": self.outcome,
            "status": self.status,
            "accepted": self.accepted,
            "duplicate": self.duplicate,
        }


class Ledger:
    """The latest requests, and exact counts of all requests."""

    def __init__(self, keep: int = KEEP_RECORDS) -> None:
        """Keep the last ``keep`` requests, and the lags of the last ``keep`` accepted requests."""
        self._records: deque[LedgerEntry] = deque(maxlen=keep)
        self._lags: deque[float] = deque(maxlen=keep)
        self._message_ids: dict[str, str] = {}
        self._doubled: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()

    def message_id(self, key: str) -> str | None:
        """Return the message id under which ``key`` was accepted, or None."""
        return self._message_ids.get(key)

    def new_message_id(self, key: str) -> str:
        """Accept a request with ``key`` and return a new message id, even if ``key`` is known."""
        if key in self._message_ids and key not in self._doubled:
            self._doubled.add(key)
            self._counts["duplicates"] += 1
        elif len(self._message_ids) >= KEEP_KEYS:
            oldest = next(iter(self._message_ids))
            del self._message_ids[oldest]
            self._doubled.discard(oldest)
        message_id = self._message_ids[key] = str(uuid4())
        return message_id

    def add(self, record: LedgerEntry) -> None:
        """Count one request and add it to the list."""
        self._records.append(record)
        self._counts["requests"] += 1
        self._counts["repeats"] += record.duplicate
        self._outcomes[record.outcome] += 1
        if record.accepted:
            self._counts["accepted"] += 1
            self._lags.append(record.lag)

    def count_invalid(self) -> None:
        """Count a request whose signature is wrong or whose body is not a delivery."""
        self._counts["invalid"] += 1

    def records(self) -> list[LedgerEntry]:
        """Return the kept requests, oldest first."""
        return list(self._records)

    def page(self, after: int, limit: int) -> list[tuple[int, LedgerEntry]]:
        """Return up to ``limit`` requests after number ``after``, oldest first; numbers begin at 1."""
        forgotten = self._counts["requests"] - len(self._records)
        start = max(after - forgotten, 0)
        return list(enumerate(islice(self._records, start, start + limit), forgotten + start + 1))

    def summary(self, latest: int | None = None) -> dict[str, object]:
        """Return the counts, and the lag of the ``latest`` accepted messages; by default, of all messages.

        ``duplicates`` are keys that were accepted more than once. ``repeats`` counts all requests whose key had been
        accepted before. Lags are in milliseconds, or None if nothing was accepted.
        """
        counts = {name: self._counts[name] for name in ("requests", "accepted", "duplicates", "repeats", "invalid")}
        lags = sorted(self._lags if latest is None else islice(reversed(self._lags), latest))
        return {**counts, "outcomes": dict(self._outcomes), "lagMs": _quantiles(lags)}


def timestamp(seconds: float) -> str:
    """Return a Unix time in the format of RFC 3339, in UTC.

    >>> timestamp(0.5)
    '1970-01-01T00:00:00.500000Z'
    """
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def _quantiles(ordered: list[float]) -> dict[str, float | None]:
    """Return the minimum and the quantiles (by nearest rank) of sorted values.

    If a message arrived early, the minimum is negative.
    """
    if not ordered:
        return dict.fromkeys(["min", *QUANTILES])
    ranked = {name: ordered[math.ceil(q * len(ordered)) - 1] for name, q in QUANTILES.items()}
    return {name: round(value, 3) for name, value in {"min": ordered[0], **ranked}.items()}
