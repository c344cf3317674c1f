"""Tests of how operators enter times, and of how times are shown."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from followups.cli.options import Due, parse_due
from followups.wording import readable, rfc3339, span

NOW = datetime(2030, 1, 31, 9, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("now", NOW),
        ("+90s", NOW + timedelta(seconds=90)),
        ("+10m", NOW + timedelta(minutes=10)),
        ("+1h30m", NOW + timedelta(hours=1, minutes=30)),
        ("+1.5d", NOW + timedelta(hours=36)),
        ("2030-02-01T09:00:00Z", NOW + timedelta(days=1)),
        ("2030-01-31T10:00:00+01:00", NOW),
        ("2020-01-31T10:00:00.5Z", datetime(2020, 1, 31, 10, 0, 0, 500_000, UTC)),
    ],
)
def test_due_dates(text: str, moment: datetime) -> None:
    """A due date is `now`, a duration (s, m, h, d), or ISO 8601 with an offset.

    A due date may be in the past.
    """
    assert parse_due(text).resolve(NOW) == moment


@pytest.mark.parametrize(
    "text",
    ["", "soon", "+", "+10", "10m", "-10m", "+10x", "+10m ", "+१m", "2030-01-31", "2030-01-31T09:00", "+99999999999d"],
)
def test_invalid_due_dates_are_wrong_usage(text: str) -> None:
    """Text that is not a due date, or a time without an offset, is rejected."""
    with pytest.raises(typer.BadParameter):
        parse_due(text)


def test_a_due_date_beyond_the_calendar_is_wrong_usage() -> None:
    """If a duration leads to a due date beyond the last possible date, it is rejected."""
    with pytest.raises(typer.BadParameter, match="too far"):
        Due(timedelta(days=9_999_999)).resolve(NOW)


@given(st.datetimes(timezones=st.just(UTC)))
def test_a_time_is_written_as_the_api_writes_it(moment: datetime) -> None:
    """A time is written in UTC with a final Z (RFC 3339), and is read back unchanged."""
    written = rfc3339(moment)
    assert written is not None
    assert written.endswith("Z")
    assert datetime.fromisoformat(written) == moment


def test_other_offsets_and_missing_times() -> None:
    """A time with any offset is shown in UTC; a missing time is null in JSON and a dash in a table."""
    berlin = datetime(2030, 1, 31, 10, tzinfo=timezone(timedelta(hours=1)))
    assert rfc3339(berlin) == "2030-01-31T09:00:00Z"
    assert readable(berlin) == "2030-01-31 09:00:00Z"
    assert rfc3339(None) is None
    assert readable(None) == "-"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 ms"),
        (0.0024, "2.4 ms"),
        (1, "1 s"),
        (59.6, "1 min"),
        (90, "1 min 30 s"),
        (3600, "1 h"),
        (3601, "1 h"),
        (93_780, "1 d 2 h"),
        (-90, "1 min 30 s"),
    ],
)
def test_a_duration_is_shown_in_its_two_largest_units(seconds: float, words: str) -> None:
    """A duration is shown without a sign, in its two largest units or in milliseconds."""
    assert span(timedelta(seconds=seconds)) == words
