"""Times as people write them and as the API shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import ClassVar

import typer

from followups.sending_hours import read_days

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
RELATIVE = re.compile(r"\+(?:\d+(?:\.\d+)?[smhd])+", re.ASCII)
PART = re.compile(r"(\d+(?:\.\d+)?)([smhd])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Due:
    """A due date as given: a moment, or a duration from the database's now (no host's clock is used)."""

    given: datetime | timedelta
    NOW: ClassVar[Due]

    def resolve(self, now: datetime) -> datetime:
        """Return the moment. Raises `typer.BadParameter` if it is outside the calendar."""
        try:
            return self.given if isinstance(self.given, datetime) else now + self.given
        except OverflowError:
            message = "that is too far in the future."
            raise typer.BadParameter(message) from None


Due.NOW = Due(timedelta(0))


def parse_due(text: str) -> Due:
    """Parse ``now``, ``+10m``, ``+1h30m`` or ISO 8601 with an offset. Raises `typer.BadParameter`.

    >>> parse_due("+1h30m").given
    datetime.timedelta(seconds=5400)
    """
    if text == "now":
        return Due.NOW
    if RELATIVE.fullmatch(text):
        return Due(_duration(text))
    return Due(_moment(text, "2030-01-31T09:00:00Z, +10m or now"))


AGE = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+", re.ASCII)


def parse_age(text: str) -> timedelta:
    """Parse a duration as people write it: ``90d``, ``1h30m``. Raises `typer.BadParameter`.

    >>> parse_age("1d12h")
    datetime.timedelta(days=1, seconds=43200)
    """
    if not AGE.fullmatch(text):
        message = f"{text!r} is no duration; write it as 90d, 12h or 1h30m."
        raise typer.BadParameter(message)
    return _duration(text)


@dataclass(frozen=True, slots=True)
class Since:
    """A moment as given: absolute, or a duration before the database's now."""

    given: datetime | timedelta

    def resolve(self, now: datetime) -> datetime:
        """Return the moment, or the start of the calendar if it would lie before that."""
        if isinstance(self.given, datetime):
            return self.given
        return now - self.given if self.given < now - EARLIEST else EARLIEST


EARLIEST = datetime(2, 1, 1, tzinfo=UTC)


def parse_since(text: str) -> Since:
    """Parse ``2h`` (two hours ago) or ISO 8601 with an offset. Raises `typer.BadParameter`.

    >>> parse_since("2h").given
    datetime.timedelta(seconds=7200)
    """
    if AGE.fullmatch(text):
        return Since(_duration(text))
    return Since(_moment(text, "2h (ago) or 2030-01-31T09:00:00Z"))


def parse_moment(text: str) -> datetime:
    """Parse ISO 8601 with an offset. Raises `typer.BadParameter`."""
    return _moment(text, "2030-01-31T09:00:00Z")


def _moment(text: str, forms: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        message = f"{text!r} is no time; write it as {forms}."
        raise typer.BadParameter(message) from None
    if moment.utcoffset() is None:
        message = f"{text!r} must carry an offset, as in 2030-01-31T09:00:00Z."
        raise typer.BadParameter(message)
    return moment


def _duration(text: str) -> timedelta:
    try:
        return sum((timedelta(**{UNITS[unit]: float(number)}) for number, unit in PART.findall(text)), timedelta(0))
    except OverflowError:
        message = f"{text!r} is too far in the future."
        raise typer.BadParameter(message) from None


CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)", re.ASCII)


def parse_clock(text: str) -> time:
    """Parse a time of day: ``08:00``. Raises `typer.BadParameter`.

    >>> parse_clock("8:30")
    datetime.time(8, 30)
    """
    if text == "24:00":
        return time(0)
    found = CLOCK.fullmatch(text)
    if not found:
        message = f"{text!r} is no time of the day; write it as 08:00."
        raise typer.BadParameter(message)
    return time(int(found[1]), int(found[2]))


def parse_days(text: str) -> frozenset[int]:
    """Parse days of the week: ``mon-fri``. Raises `typer.BadParameter`."""
    try:
        return read_days(text)
    except ValueError:
        message = f"{text!r} are no days; write them as mon-fri or sat,sun."
        raise typer.BadParameter(message) from None


def rfc3339(moment: datetime | None) -> str | None:
    """Return a time as the API writes it: UTC, RFC 3339, with ``Z``.

    >>> rfc3339(datetime(2030, 1, 31, 9, tzinfo=UTC))
    '2030-01-31T09:00:00Z'
    """
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z" if moment else None


def readable(moment: datetime | None) -> str:
    """Return a time for a table, in UTC to the second, or '-' if there is none."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ") if moment else "-"


def span(duration: timedelta) -> str:
    """Return a duration in words, in its two largest units and without its sign.

    >>> span(timedelta(hours=26, minutes=3)), span(timedelta(seconds=-90)), span(timedelta(milliseconds=2.4))
    ('1 d 2 h', '1 min 30 s', '2.4 ms')
    """
    duration = abs(duration)
    if duration < timedelta(seconds=1):
        return f"{duration / timedelta(milliseconds=1):.3g} ms"
    seconds = round(duration.total_seconds())
    parts = [(seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")]
    while not parts[0][0]:
        parts = parts[1:]
    return " ".join(f"{number} {unit}" for number, unit in parts[:2] if number)
