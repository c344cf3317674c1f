"""Publish: the broker's hints, made after the claim's commit; and reading them back.

A hint names follow-ups and the tokens they were leased under, with the moment each is due, so that the
worker need not ask. It holds no text, proves nothing, and may be lost, doubled or late without harm:
begin looks at the row. Beside it stand the numbers of their workspaces, by which a worker gives each its turn:
whoever reads no more than the hint, or is told no numbers, as in the middle of an upgrade, sends the same.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from followups.store.leases import Lease

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_BIGINT = 2**63


class Hint(NamedTuple):
    """What one message says, JSON types only."""

    entries: list[list[Any]]
    """``[[id, token, due in microseconds since 1970, workers lost with it], ...]``"""
    lanes: list[int]
    """The number of each one's workspace."""


def batches(leases: Sequence[Lease], size: int) -> Iterator[Hint]:
    """Yield hints of at most ``size`` leases each, in the order given."""
    for start in range(0, len(leases), size):
        batch = leases[start : start + size]
        entries = [[str(one.id), one.token, (one.due - _EPOCH) // _MICROSECOND, one.losses] for one in batch]
        yield Hint(entries, [one.lane for one in batch])


def leases_of(entries: object, lanes: object = None) -> list[Lease]:
    """Return the leases that a hint names; with lanes that are none, all in one and the same.

    Raises ValueError for what is no hint: anybody may write to a broker.
    """
    try:
        count = len(entries)  # type: ignore[arg-type]
        numbers = lanes if _are_lanes(lanes, count) else [0] * count
        return [_lease(number, *entry) for entry, number in zip(entries, numbers, strict=True)]  # type: ignore[call-overload]
    except (TypeError, AttributeError, OverflowError) as error:
        message = f"not a hint: {type(error).__name__}"
        raise ValueError(message) from None


def _are_lanes(lanes: object, count: int) -> bool:
    return isinstance(lanes, list) and len(lanes) == count and {type(lane) for lane in lanes} <= {int}


def _lease(lane: int, follow_up_id: str, token: int, due: int, losses: int) -> Lease:
    if not type(token) is type(due) is type(losses) is int or not (0 <= token < _BIGINT and losses >= 0):
        message = "not a hint: token, due and losses are whole numbers"
        raise ValueError(message)
    return Lease(UUID(follow_up_id), token, _EPOCH + due * _MICROSECOND, losses, lane)
