"""Hints: the broker messages sent after a claim's commit, written and parsed here.

A hint lists follow-ups with lease tokens and due times, so workers need no query. A hint contains no message text and
is not trusted. A repeated or late hint does no harm, because begin reads the follow-up's row. If a hint is lost, its
leases expire, and the follow-ups are claimed again. Each hint contains the keys of the workspace queues. If a hint
lacks these keys, as may happen during an upgrade, workers can still send its follow-ups.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from followups.store.leases import Lease

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DISPATCH = "dispatch"
"""Name of the queue whose tasks request a dispatcher tick."""
DELIVER = "deliver"
"""Name of the queue for hints; each hint is a batch of leases."""

CLUSTER = (
    "The broker runs in cluster mode, in which a worker cannot read its two queues at once: "
    "point FOLLOWUPS_BROKER_URL at a Redis or Valkey without cluster mode (cluster-enabled no)."
)
"""The error message for a broker in cluster mode, which is not supported."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_BIGINT = 2**63

MOST = 10_000
"""The maximum number of follow-ups in a hint, and the largest value allowed for `BATCH_SIZE`."""


class Hint(NamedTuple):
    """The content of one hint, in JSON types only."""

    entries: list[list[Any]]
    """``[[id, token, due in microseconds since 1970, lost leases], ...]``"""
    keys: list[int]
    """The keys of the workspace queues, one for each entry of the hint."""


def batches(leases: Sequence[Lease], size: int) -> Iterator[Hint]:
    """Divide the leases into hints of at most ``size``, in the given order."""
    for start in range(0, len(leases), size):
        batch = leases[start : start + size]
        entries = [[str(one.id), one.token, (one.due - _EPOCH) // _MICROSECOND, one.losses] for one in batch]
        yield Hint(entries, [one.key for one in batch])


def leases_of(entries: object, keys: object = None) -> list[Lease]:
    """Return the leases that a hint lists.

    If the hint's keys are invalid, all leases are put into one workspace queue. Raises ValueError if the hint is
    invalid. Anyone with access to the broker can write hints.
    """
    try:
        count = len(entries)  # type: ignore[arg-type]
        if count > MOST:
            message = f"not a hint: {count} entries"
            raise ValueError(message)
        valid = keys if _are_keys(keys, count) else [0] * count
        return [_lease(key, *entry) for entry, key in zip(entries, valid, strict=True)]  # type: ignore[call-overload]
    except (TypeError, AttributeError, OverflowError) as error:
        message = f"not a hint: {type(error).__name__}"
        raise ValueError(message) from None


def _are_keys(keys: object, count: int) -> bool:
    return isinstance(keys, list) and len(keys) == count and {type(key) for key in keys} <= {int}


def _lease(key: int, follow_up_id: str, token: int, due: int, losses: int) -> Lease:
    if not type(token) is type(due) is type(losses) is int or not (0 <= token < _BIGINT and losses >= 0):
        message = "not a hint: token, due and losses must be whole numbers"
        raise ValueError(message)
    return Lease(UUID(follow_up_id), token, _EPOCH + due * _MICROSECOND, losses, key)
