"""Tests of array parameters in PostgreSQL's binary format, against a real server."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from followups import binary_arrays
from followups.event_loop import driver_rows
from followups.statements import Statement

if TYPE_CHECKING:
    from world import World

ECHO = Statement("""
    SELECT CAST(:ids AS uuid[]), CAST(:tokens AS bigint[]), CAST(:seconds AS double precision[]),
           cardinality(CAST(:ids AS uuid[]))
""")

uses_one_world = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(
    st.lists(st.none() | st.uuids()),
    st.lists(st.integers(-(2**63), 2**63 - 1)),
    st.lists(st.floats(allow_nan=False)),
)
@uses_one_world
def test_the_server_reads_the_same_values(
    world: World, ids: list[UUID | None], tokens: list[int], seconds: list[float]
) -> None:
    """The server returns each array unchanged, including NULLs and the order; also an empty array."""
    parameters = {
        "ids": binary_arrays.uuids(ids),
        "tokens": binary_arrays.bigints(tokens),
        "seconds": binary_arrays.doubles(seconds),
    }
    with world.engine.connect() as connection:
        assert driver_rows(connection, ECHO, parameters) == [(ids, tokens, seconds, len(ids))]


def test_a_number_that_does_not_fit() -> None:
    """A number outside the range of bigint raises an error, and is not truncated."""
    with pytest.raises(struct.error):
        binary_arrays.bigints([2**63])


def test_a_sqlalchemy_statement_accepts_a_batch(world: World) -> None:
    """Statements that SQLAlchemy executes accept the arrays too."""
    ids = [uuid4(), uuid4()]
    with world.engine.connect() as connection:
        row = connection.execute(text("SELECT CAST(:ids AS uuid[])"), {"ids": binary_arrays.uuids(ids)}).one()
    assert row == (ids,)
