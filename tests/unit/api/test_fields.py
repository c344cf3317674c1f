"""The API's field types for times and ids."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from followups.api.fields import Id, Time

if TYPE_CHECKING:
    from uuid import UUID

TIMES, IDS = TypeAdapter(Time), TypeAdapter(Id)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2030-01-31T09:00:00Z", datetime(2030, 1, 31, 9, tzinfo=UTC)),
        ("2030-01-31t09:00:00z", datetime(2030, 1, 31, 9, tzinfo=UTC)),
        ("2030-01-31 09:00:00+00:00", datetime(2030, 1, 31, 9, tzinfo=UTC)),
        ("2030-01-31T09:00+0130", datetime(2030, 1, 31, 7, 30, tzinfo=UTC)),
        ("2030-01-31T23:30:00.123456789-01:00", datetime(2030, 2, 1, 0, 30, 0, 123456, tzinfo=UTC)),
        ("2016-12-31T23:59:60Z", datetime(2016, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
        ("9998-12-31T23:59:59Z", datetime(9998, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_times(written: str, meant: datetime) -> None:
    """An RFC 3339 time is parsed and converted to UTC."""
    assert TIMES.validate_python(written) == meant
    assert TIMES.validate_python(written).tzinfo is UTC


@pytest.mark.parametrize(
    "written",
    [
        "", "now", "2030-01-31", "2030-01-31T09:00:00", "2030-02-30T09:00:00Z", "2030-01-31T25:00:00Z", "1893456000",
        1893456000, 1.5, None, True, "0000-01-01T00:00:00Z", "9999-01-01T00:00:00+23:59",
        "0002-01-01T00:00:00+14:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00",
        "2030-01-31T09:00:00+99:00", "\N{FULLWIDTH DIGIT TWO}030-01-31T09:00:00Z", "2030-01-31T09:00:00Z\n",
    ],
)  # fmt: skip
def test_invalid_times(written: object) -> None:
    """An invalid or unstorable time is rejected with a validation error."""
    with pytest.raises(ValidationError):
        TIMES.validate_python(written)


@given(st.datetimes(timezones=st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))))
def test_any_time(time: datetime) -> None:
    """Every time in the years 2 to 9998 is parsed unchanged."""
    try:
        assert TIMES.validate_python(time.isoformat()) == time
    except ValidationError:
        assert time.year in {1, 9999}


@given(st.uuids())
def test_any_id(value: UUID) -> None:
    """Every UUID is accepted as an id, in upper or lower case."""
    assert IDS.validate_python(str(value)) == IDS.validate_python(str(value).upper()) == value


@given(st.text())
def test_invalid_ids(written: str) -> None:
    """Text that is not a UUID is rejected as an id."""
    with pytest.raises(ValidationError):
        IDS.validate_python(written)
