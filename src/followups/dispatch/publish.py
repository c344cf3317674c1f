"""Publish: the broker's hints, made after the claim's commit; and reading them back.

A hint names follow-ups and the tokens they were leased under, with the moment each is due, so that the
worker need not ask. It holds no text, proves nothing, and may be lost, doubled or late without harm:
begin looks at the row.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from followups.store.leases import Lease

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_BIGINT = 2**63

Hint = list[list[Any]]
"""``[[id, token, due in microseconds since 1970, workers lost with it], ...]``, JSON types only."""


def batches(leases: Sequence[Lease], size: int) -> Iterator[Hint]:
    """Yield hints of at most ``size`` leases each, in the order given."""
    for start in range(0, len(leases), size):
        batch = leases[start : start + size]
        yield [[str(one.id), one.token, (one.due - _EPOCH) // _MICROSECOND, one.losses] for one in batch]


def leases_of(hint: object) -> list[Lease]:
    """Return the leases that a hint names. Raises ValueError for what is none: anybody may write to a broker."""
    try:
        return [_lease(*entry) for entry in hint]  # type: ignore[attr-defined]
    except (TypeError, AttributeError, OverflowError) as error:
        message = f"not a hint: {type(error).__name__}"
        raise ValueError(message) from None


def _lease(follow_up_id: str, token: int, due: int, losses: int) -> Lease:
    if {type(token), type(due), type(losses)} != {int} or not (0 <= token < _BIGINT and losses >= 0):
        message = "not a hint: token, due and losses are whole numbers"
        raise ValueError(message)
    return Lease(UUID(follow_up_id), token, _EPOCH + due * _MICROSECOND, losses)
