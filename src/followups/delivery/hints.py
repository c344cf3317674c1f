"""Hints: the broker messages sent after a claim's commit, written and parsed here.

A hint lists follow-ups with lease tokens and due times, so workers need no query. A hint contains no message text and
is not trusted. A repeated or late hint does no harm, because begin reads the follow-up's row. If a hint is lost, its
leases expire, and the follow-ups are claimed again. Each hint contains the keys of the workspace queues. If a hint
lacks these keys, as may happen during an upgrade, workers can still send its follow-ups.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from uuid import UUID

from pydantic import Field, TypeAdapter, ValidationError

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

MOST = 10_000
"""The maximum number of follow-ups in a hint, and the largest value allowed for `BATCH_SIZE`."""

# pydantic reads an entry in 0.3 us and writes an id in 0.2 us. With Python's UUID class, this took 1.3 and 0.6 us.
_Number = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
# id, token, due in microseconds since 1970, lost leases
_Entry = tuple[UUID, _Number, Annotated[int, Field(strict=True)], _Number]
_ENTRIES = TypeAdapter(Annotated[list[_Entry], Field(max_length=MOST, fail_fast=True)])
_IDS = TypeAdapter(list[UUID])


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
        ids = _IDS.dump_python([one.id for one in batch], mode="json")
        entries = [
            [id_, one.token, (one.due - _EPOCH) // _MICROSECOND, one.losses]
            for id_, one in zip(ids, batch, strict=True)
        ]
        yield Hint(entries, [one.key for one in batch])


def leases_of(entries: object, keys: object = None) -> list[Lease]:
    """Return the leases that a hint lists.

    If the hint's keys are invalid, all leases are put into one workspace queue. Raises ValueError if the hint is
    invalid. Anyone with access to the broker can write hints.
    """
    try:
        valid = _ENTRIES.validate_python(entries)
        return [
            Lease(id_, token, _EPOCH + due * _MICROSECOND, losses, key)
            for (id_, token, due, losses), key in zip(valid, _keys_of(keys, len(valid)), strict=True)
        ]
    except ValidationError as error:
        # pydantic's own text may quote the content
        message = f"not a hint: {error.errors(include_input=False, include_url=False)[0]['type']}"
    except OverflowError:
        message = "not a hint: a due time is out of range"
    raise ValueError(message)


def _keys_of(keys: object, count: int) -> list[int]:
    if isinstance(keys, list) and len(keys) == count and {type(key) for key in keys} <= {int}:
        return keys
    return [0] * count
