"""Sending hours: the local hours in which a workspace's messages may be sent.

Messages are sent from the opening time until just before the closing time. If the clock skips the opening time, sending
starts at once. If the clock skips the closing time, sending stops at once. If the clocks go back and the opening time
occurs twice, the second occurrence counts. If the closing time occurs twice, its first occurrence counts. When the
local time is outside the sending hours, no message is sent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from followups.wording import Sentence

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import date

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
EVERY_DAY = frozenset(range(7))

DAY = timedelta(days=1)
LOOK_AHEAD = 40
"""Number of days to search for the next opening.

The search covers more than a week, because a time zone may skip days or hours.
"""


@dataclass(frozen=True, slots=True)
class SendingHours:
    """Sending hours on the chosen days; ``opening`` is included, and ``closing`` is not.

    Monday is day 0. If closing is not later than opening, closing is on the next day. 22:00 to 06:00 is a night, and
    00:00 to 00:00 is a whole day.
    """

    time_zone: str
    opening: time
    closing: time
    days: frozenset[int] = EVERY_DAY

    def __str__(self) -> str:
        """Return the sending hours in English.

        >>> str(SendingHours("Europe/Berlin", time(8), time(20), frozenset({0, 1, 2, 3, 4})))
        '08:00 to 20:00, mon-fri, Europe/Berlin'
        """
        return str(self.in_words)

    @property
    def in_words(self) -> Sentence:
        """The sending hours as a phrase."""
        values = {"opening": f"{self.opening:%H:%M}", "closing": f"{self.closing:%H:%M}", "zone": self.time_zone}
        if self.days == EVERY_DAY:
            return Sentence("{opening} to {closing}, {zone}", **values)
        names = re.sub(r"\w+", r"{\g<0>}", written_days(self.days))
        days = Sentence(names, **{day: Sentence(day) for day in DAYS})
        return Sentence("{opening} to {closing}, {days}, {zone}", days=days, **values)


@lru_cache(maxsize=1024)
def zone_of(name: str) -> ZoneInfo | None:
    """Return the IANA time zone with this name, or None if it is unknown."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # the name is unknown or invalid, or it names a directory
        return None


def opens_at(hours: SendingHours, moment: datetime) -> datetime:
    """Return the first time at or after ``moment`` at which sending is allowed.

    Raises `LookupError` if this machine does not know the time zone.

    >>> berlin = SendingHours("Europe/Berlin", time(8), time(20))
    >>> opens_at(berlin, datetime(2030, 1, 31, 22, tzinfo=UTC)).isoformat()
    '2030-02-01T07:00:00+00:00'
    """
    opening, _ = span_of(hours, moment)
    return max(opening, moment)


def span_of(hours: SendingHours, moment: datetime) -> tuple[datetime, datetime]:
    """Return the start and end of the sending period that contains ``moment``, or else of the next one.

    Raises `LookupError` if this machine does not know the time zone.
    """
    zone = zone_of(hours.time_zone)
    if zone is None:
        message = f"no time zone {hours.time_zone!r} on this machine"
        raise LookupError(message)
    # A sending period that began the day before may still be open. The search starts two days back, because the local
    # date may differ from the date in UTC.
    first = moment.astimezone(zone).date() - 2 * DAY
    for opening, closing in _spans(hours, zone, first):
        if moment < closing:
            return opening, closing
    message = f"the clocks of {hours.time_zone!r} never show {hours}"
    raise LookupError(message)


def _spans(hours: SendingHours, zone: ZoneInfo, first: date) -> Iterator[tuple[datetime, datetime]]:
    for day in (first + n * DAY for n in range(LOOK_AHEAD)):
        if day.weekday() not in hours.days:
            continue
        last = day if hours.closing > hours.opening else day + DAY
        # If the opening time of a whole-day sending period occurs twice, the period opens at the first occurrence.
        whole = hours.opening == hours.closing
        opening = _moment(datetime.combine(day, hours.opening, zone), fold=0 if whole else 1)
        closing = _moment(datetime.combine(last, hours.closing, zone), fold=0)
        if closing <= opening:  # both times are in the repeated hour, so close at the second occurrence
            closing = _moment(datetime.combine(last, hours.closing, zone), fold=1)
        if opening < closing:  # after a clock change, the period may be empty
            yield opening, closing


def _moment(local: datetime, *, fold: int) -> datetime:
    """Return the instant at which the local clock shows or skips the given time."""
    earlier, later = sorted(local.replace(fold=each).astimezone(UTC) for each in (0, 1))
    shown = earlier.astimezone(local.tzinfo).replace(tzinfo=None)
    if earlier == later or shown == local.replace(tzinfo=None):
        return later if fold else earlier
    return _jump(local, earlier, later)


def _jump(local: datetime, before: datetime, after: datetime) -> datetime:
    """Return the moment between ``before`` and ``after`` at which the local clock is set forward."""
    offset = before.astimezone(local.tzinfo).utcoffset()
    second = timedelta(seconds=1)
    while after - before > second:
        middle = before + (after - before) // second // 2 * second
        if middle.astimezone(local.tzinfo).utcoffset() == offset:
            before = middle
        else:
            after = middle
    return after


def written_days(days: frozenset[int]) -> str:
    """Return days in words, with consecutive days as a range.

    >>> written_days(frozenset({0, 1, 2, 4, 6}))
    'mon-wed,fri,sun'
    """
    runs: list[list[int]] = []
    for day in sorted(days):
        if runs and day == runs[-1][-1] + 1:
            runs[-1].append(day)
        else:
            runs.append([day])
    return ",".join(DAYS[run[0]] if len(run) == 1 else f"{DAYS[run[0]]}-{DAYS[run[-1]]}" for run in runs)


def read_days(text: str) -> frozenset[int]:
    """Parse days: ``mon-fri``, ``sat,sun``, ``fri-mon``. Raises `ValueError` for text in any other form.

    >>> sorted(read_days("fri-mon,wed"))
    [0, 2, 4, 5, 6]
    """
    days: set[int] = set()
    for part in text.lower().replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        start, end = DAYS.index(first), DAYS.index(last if dash else first)
        days.update((start + n) % 7 for n in range((end - start) % 7 + 1))
    return frozenset(days)
