"""Sending hours limit the local times at which messages may be sent."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups.sending_hours import DAYS, SendingHours, opens_at, read_days, span_of, written_days, zone_of

BERLIN = "Europe/Berlin"
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
# Time zones whose clocks change by an hour or half an hour, at midnight, or never. Some zones once skipped a day;
# others have unusual offsets.
ZONES = (
    "UTC", BERLIN, "America/New_York", "Australia/Lord_Howe", "America/Havana", "Asia/Kathmandu", "Pacific/Apia",
    "Pacific/Kiritimati", "Africa/Casablanca",
)  # fmt: skip
CLOCKS = st.times().map(lambda each: each.replace(second=0, microsecond=0))
HOURS = st.builds(
    SendingHours,
    st.sampled_from(ZONES),
    CLOCKS,
    CLOCKS,
    st.frozensets(st.integers(0, 6), min_size=1),
)
MOMENTS = st.datetimes(datetime(2010, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - the strategy adds UTC
TRANSITIONS = (
    datetime(2030, 3, 31, 1, tzinfo=UTC),  # Berlin, forward
    datetime(2030, 10, 27, 1, tzinfo=UTC),  # Berlin, back
    datetime(2026, 4, 4, 15, tzinfo=UTC),  # on Lord Howe Island, clocks are set back by half an hour
    datetime(2026, 11, 1, 5, tzinfo=UTC),  # in Havana, clocks are set back to midnight
    datetime(2011, 12, 30, 10, tzinfo=UTC),  # Apia skipped 30 December 2011
)
NEAR_TRANSITIONS = st.builds(
    lambda moment, minutes: moment + minutes * MINUTE, st.sampled_from(TRANSITIONS), st.integers(-3000, 3000)
)


def allowed(hours: SendingHours, moment: datetime) -> bool:
    """Return whether a local time and its weekday are within the sending hours."""
    local = moment.astimezone(ZoneInfo(hours.time_zone))
    clock, today, yesterday = local.time(), local.weekday(), (local - DAY).weekday()
    if hours.opening < hours.closing:
        return today in hours.days and hours.opening <= clock < hours.closing
    # Sending hours that cross midnight belong to the day on which they begin.
    return (today in hours.days and clock >= hours.opening) or (yesterday in hours.days and clock < hours.closing)


def is_shown_twice(zone: str, moment: datetime) -> bool:
    """Return whether the zone's UTC offset changes within two days of the given time.

    When the clock goes back, the time at which sending hours begin may occur twice.
    """
    zone_info = ZoneInfo(zone)
    return len({(moment + n * 60 * MINUTE).astimezone(zone_info).utcoffset() for n in range(-48, 49)}) > 1


@given(HOURS, MOMENTS | NEAR_TRANSITIONS)
def test_open_times_are_within_the_hours(hours: SendingHours, moment: datetime) -> None:
    """Sending hours include their start but not their end."""
    opening, closing = span_of(hours, moment)
    assert opening < closing
    assert moment < closing
    inside = [opening, closing - timedelta(microseconds=1), opening + (closing - opening) / 2]
    inside += [opening + n * (closing - opening) / 13 for n in range(13)]
    for each in inside:
        local = each.astimezone(ZoneInfo(hours.time_zone)).time()
        assert hours.opening == hours.closing or allowed(hours, each), local


@given(HOURS, MOMENTS | NEAR_TRANSITIONS)
def test_times_before_the_next_opening_are_closed(hours: SendingHours, moment: datetime) -> None:
    """Until the next opening, local times are outside sending hours, except times that occur twice."""
    opening = opens_at(hours, moment)
    assert opening >= moment
    for n in range(40):
        each = moment + n * (opening - moment) / 40
        if each < opening and not is_shown_twice(hours.time_zone, each):
            assert not allowed(hours, each)


@given(HOURS, MOMENTS | NEAR_TRANSITIONS)
def test_the_first_moment_is_open(hours: SendingHours, moment: datetime) -> None:
    """Sending hours include their first moment, and a later time never has an earlier next opening."""
    opening = opens_at(hours, moment)
    assert opens_at(hours, opening) == opening
    assert opens_at(hours, moment + MINUTE) >= opening


@pytest.mark.parametrize(
    ("opening", "closing", "moment", "expected"),
    [
        # Berlin is one hour ahead of UTC in winter, and two hours in summer.
        ("08:00", "20:00", "2030-01-31T22:00Z", "2030-02-01T07:00Z"),
        ("08:00", "20:00", "2030-07-31T22:00Z", "2030-08-01T06:00Z"),
        ("08:00", "20:00", "2030-01-31T12:00Z", "2030-01-31T12:00Z"),
        ("08:00", "20:00", "2030-01-31T19:00Z", "2030-02-01T07:00Z"),  # 20:00 is already outside the sending hours
        ("08:00", "20:00", "2030-01-31T07:00Z", "2030-01-31T07:00Z"),  # at 08:00 the sending hours have begun
        ("22:00", "06:00", "2030-01-31T12:00Z", "2030-01-31T21:00Z"),
        ("22:00", "06:00", "2030-01-31T02:00Z", "2030-01-31T02:00Z"),  # the sending hours began the evening before
        ("00:00", "00:00", "2030-01-31T02:00Z", "2030-01-31T02:00Z"),
        # If the clock skips a time, sending hours begin or end at the moment of the skip.
        ("02:30", "20:00", "2030-03-31T00:00Z", "2030-03-31T01:00Z"),
        ("00:30", "02:30", "2030-03-31T01:00Z", "2030-03-31T22:30Z"),
        ("02:10", "02:40", "2030-03-31T00:00Z", "2030-04-01T00:10Z"),
        # When the clocks go back from 03:00 to 02:00, 02:30 occurs twice. If sending hours open at 02:30, the second
        # 02:30 counts. If they close at 02:30, the first one counts.
        ("02:30", "20:00", "2030-10-27T00:00Z", "2030-10-27T01:30Z"),
        ("01:00", "02:30", "2030-10-27T00:30Z", "2030-10-28T00:00Z"),
    ],
)
def test_times_in_berlin(opening: str, closing: str, moment: str, expected: str) -> None:
    """Sending hours follow the local clock, across midnight and daylight-saving changes."""
    hours = SendingHours(BERLIN, time.fromisoformat(opening), time.fromisoformat(closing))
    assert opens_at(hours, datetime.fromisoformat(moment)) == datetime.fromisoformat(expected)


def test_days() -> None:
    """Sending hours begin only on the chosen days, even if they end after midnight."""
    weekdays = SendingHours(BERLIN, time(8), time(20), read_days("mon-fri"))
    saturday = datetime(2030, 2, 2, 10, tzinfo=UTC)
    assert opens_at(weekdays, saturday) == datetime(2030, 2, 4, 7, tzinfo=UTC)
    fridays = SendingHours(BERLIN, time(22), time(6), read_days("fri"))
    assert opens_at(fridays, datetime(2030, 2, 2, 3, tzinfo=UTC)) == datetime(2030, 2, 2, 3, tzinfo=UTC)


@given(st.frozensets(st.integers(0, 6), min_size=1))
def test_days_round_trip(days: frozenset[int]) -> None:
    """If weekdays are written as text, the text is read back as the same weekdays."""
    assert read_days(written_days(days)) == days


@pytest.mark.parametrize("text", ["", "monday", "mon-", "-", "mon,,fri", "0-6"])
def test_invalid_days(text: str) -> None:
    """Invalid days of sending hours are rejected."""
    with pytest.raises(ValueError, match=r".*"):
        read_days(text)
    assert DAYS[0] == "mon"


@pytest.mark.parametrize(
    "name", ["", "Nowhere", "Europe", "../etc/passwd", "/etc/localtime", "a\x00", "\ud800", "x" * 300]
)
def test_invalid_time_zones(name: str) -> None:
    """A name missing from the time zone database is rejected."""
    assert zone_of(name) is None
    with pytest.raises(LookupError):
        opens_at(SendingHours(name, time(8), time(20)), datetime(2030, 1, 31, tzinfo=UTC))
