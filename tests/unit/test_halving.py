"""Tests for halving a batch when the database rejects some of its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import DataError, OperationalError, ProgrammingError

from followups.halving import halve

if TYPE_CHECKING:
    from collections.abc import Sequence

BAD = DataError("", None, psycopg.DataError("bad"))
AWAY = OperationalError("", None, psycopg.OperationalError("away"))


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_other_rows_are_processed(bad: list[bool]) -> None:
    """Good rows of a batch are processed once, in order, and bad rows are isolated.

    A batch is halved no more often than necessary.
    """
    steps = 0

    def work(part: Sequence[int]) -> list[int]:
        nonlocal steps
        steps += 1
        if any(bad[one] for one in part):
            raise BAD
        return list(part)

    halved = halve(range(len(bad)), work)
    assert [one for part in halved.done for one in part] == [one for one, is_bad in enumerate(bad) if not is_bad]
    assert [one for one, _ in halved.refused] == [one for one, is_bad in enumerate(bad) if is_bad]
    assert halved.left == []
    assert steps <= 1 + sum(bad) * 2 * len(bad).bit_length()


@pytest.mark.parametrize("error", [AWAY, ProgrammingError("", None, psycopg.ProgrammingError("no such column"))])
def test_errors_of_no_single_row(error: Exception) -> None:
    """If the database is unreachable or the statement is wrong, an error is raised without halving."""
    steps = 0

    def work(_: Sequence[int]) -> None:
        nonlocal steps
        steps += 1
        raise error

    with pytest.raises(type(error)):
        halve(range(9), work)
    assert steps == 1


def test_unreachable_within_a_batch() -> None:
    """If the database fails in the middle of a batch, the finished and the remaining items are returned."""

    def work(part: Sequence[int]) -> list[int]:
        if 3 in part:
            raise BAD if len(part) > 1 else AWAY
        return list(part)

    halved = halve(range(8), work)
    assert (halved.done, halved.left, halved.refused) == ([[0, 1], [2]], [3, 4, 5, 6, 7], [])


def test_errors_of_the_projects_code() -> None:
    """If the project's own code fails because of a row's content, that row is isolated."""

    def work(part: Sequence[int]) -> float:
        return sum(1 / one for one in part)

    halved = halve([1, 2, 0, 4], work)
    assert [one for one, _ in halved.refused] == [0]
    assert sum(halved.done) == 1 + 1 / 2 + 1 / 4
