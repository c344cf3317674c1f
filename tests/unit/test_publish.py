"""Hints: what is published, and what is refused of what comes back."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups.dispatch.publish import batches, leases_of
from followups.store.leases import Lease

leases = st.builds(
    Lease,
    st.uuids(),
    st.integers(0, 2**63 - 1),
    st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)),  # noqa: DTZ001
    st.integers(0, 9),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.lists(leases, max_size=20), st.integers(1, 7))
def test_round_trip(given_leases: list[Lease], size: int) -> None:
    """What is published comes back whole and in order, in batches of the size asked for, as JSON."""
    hints = list(batches(given_leases, size))
    assert all(len(hint) <= size for hint in hints)
    assert [lease for hint in hints for lease in leases_of(json.loads(json.dumps(hint)))] == given_leases


@given(json_values)
def test_foreign(value: object) -> None:
    """Whatever JSON a stranger puts there is either a hint or a ValueError, never another exception."""
    try:
        leases_of(value)
    except ValueError as error:
        assert str(error)  # noqa: PT017 - either way is right


@pytest.mark.parametrize(
    "entry",
    [
        [str(uuid4()), 1, 0],
        [str(uuid4()), True, 0, 0],
        [str(uuid4()), -1, 0, 0],
        [str(uuid4()), 2**63, 0, 0],
        [str(uuid4()), 1, 10**30, 0],
        [str(uuid4()), 1, 0.5, 0],
        [str(uuid4()), 1, 0, None],
        [str(uuid4()), 1, 0, -1],
        ["x", 1, 0, 0],
        [None, 1, 0, 0],
        "abc",
    ],
)
def test_refused(entry: object) -> None:
    """An entry that could not have been published is refused, and with it its batch."""
    with pytest.raises(ValueError, match=r".+"):
        leases_of([entry])
