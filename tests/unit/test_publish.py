"""Tests of hints: their content, and the messages that are rejected."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups.delivery.hints import batches, leases_of
from followups.store.leases import KEYS, Lease, key_of

leases = st.builds(
    Lease,
    st.uuids(),
    st.integers(0, 2**63 - 1),
    st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)),  # noqa: DTZ001
    st.integers(0, 9),
    st.integers(0, KEYS - 1),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.lists(leases, max_size=20), st.integers(1, 7))
def test_round_trip(given_leases: list[Lease], size: int) -> None:
    """Published hints are read back complete and in order, in batches of the requested size."""
    hints = list(batches(given_leases, size))
    assert all(len(hint.entries) <= size for hint in hints)
    assert [lease for hint in hints for lease in leases_of(*json.loads(json.dumps(hint)))] == given_leases


@pytest.mark.parametrize("keys", [None, [], [1], [1, 2, 3], [1, "2"], [1, True], [1, 2.5], {"0": 1, "1": 2}, "12"])
def test_invalid_workspace_keys(keys: object) -> None:
    """If a hint has no valid workspace keys, its leases share one queue."""
    given_leases = [Lease(uuid4(), 1, datetime.now(UTC), 0, key) for key in (1, 2)]
    (hint,) = batches(given_leases, 2)
    assert leases_of(hint.entries, keys) == [lease._replace(key=0) for lease in given_leases]


@given(st.uuids(version=4))
def test_the_number_of_a_workspace_is_small(workspace_id: UUID) -> None:
    """A workspace's key has at most seven digits and is the same in every process."""
    assert 0 <= key_of(workspace_id) == key_of(UUID(str(workspace_id))) < 10**7


@given(json_values, json_values)
def test_any_json(value: object, keys: object) -> None:
    """Whatever JSON the broker sends, decoding it returns a valid hint or raises ValueError."""
    try:
        leases_of(value, keys)
    except ValueError as error:
        assert str(error)  # noqa: PT017 - both results are valid


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
        ["00000000\n0000-0000-0000-000000000000", 1, 0, 0],
        [None, 1, 0, 0],
        "abc",
    ],
)
def test_refused(entry: object) -> None:
    """If one entry of a hint is invalid, the whole hint is rejected."""
    with pytest.raises(ValueError, match=r"^not a hint: [a-z_ ]+$"):
        leases_of([entry])
