"""Halving: a failing batch is split until every good row succeeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from followups.database_errors import concerns_a_row
from followups.statements import Statement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy import Connection

    from followups.statements import Query, Steps

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class Halved(Generic[T, R]):
    """The result of a halved batch: the results of its parts, the refused items, and the items not tried."""

    done: list[R] = field(default_factory=list)
    refused: list[tuple[T, Exception]] = field(default_factory=list)
    left: list[T] = field(default_factory=list)
    """Items left unprocessed because the database became unreachable."""


def halve(batch: Sequence[T], work: Callable[[Sequence[T]], R]) -> Halved[T, R]:
    """Do the work for a batch, and split the batch in half if a row fails.

    The halving ends when a part contains only the failing row. An error that concerns no row is raised, unless a part
    has already succeeded.
    """
    halved: Halved[T, R] = Halved()
    parts = [batch]
    while parts:
        part = parts.pop()
        try:
            halved.done.append(work(part))
        except Exception as error:
            if not concerns_a_row(error):
                if not halved.done:
                    raise
                halved.left = [one for rest in (part, *parts) for one in rest]
                break
            if len(part) == 1:
                halved.refused.append((part[0], error))
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
    return halved


def halve_within(
    connection: Connection,
    batch: Sequence[T],
    work: Callable[[Sequence[T]], R],
    refused: Callable[[T, Exception], None] | None = None,
) -> Halved[T, R]:
    """Do the work in the connection's transaction, with a savepoint for each part of the batch.

    ``refused`` is called for each refused item. If an item is refused, all other items still succeed.
    """

    def under_savepoint(part: Sequence[T]) -> R:
        with connection.begin_nested():
            return work(part)

    halved = halve(batch, under_savepoint) if batch else Halved[T, R]()
    if halved.left:  # the transaction is lost; this call raises the error that explains why
        halved.done.append(work(halved.left))
    if refused:
        for item, error in halved.refused:
            refused(item, error)
    return halved


_SAVEPOINT = Statement("SAVEPOINT part")
_UNDO = Statement("ROLLBACK TO SAVEPOINT part")


def halving_steps(
    batch: Sequence[T],
    query: Callable[[Sequence[T]], Query],
    refused: Callable[[T, Exception], None] | None = None,
) -> Steps[list[Any]]:
    """Run the query for a batch, halving it as `halve_within` does; return all rows."""
    rows: list[Any] = []
    parts = [batch] if batch else []
    while parts:
        part = parts.pop()
        yield _SAVEPOINT()
        try:
            rows += yield query(part)
        except Exception as error:
            if not concerns_a_row(error):
                raise
            yield _UNDO()
            if len(part) > 1:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
            elif refused:
                refused(part[0], error)
    return rows
