"""Wording for people: sentences, times, durations, rates and details. Pure functions."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
"""The units of a rate: follow-ups per second, minute, hour or day."""


def rfc3339(moment: datetime | None) -> str | None:
    """Return a time in the API's format: UTC, RFC 3339, with ``Z``.

    >>> rfc3339(datetime(2030, 1, 31, 9, tzinfo=UTC))
    '2030-01-31T09:00:00Z'
    """
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z" if moment else None


def readable(moment: datetime | None) -> str:
    """Return a time for a table, in UTC to the second; None becomes '-'."""
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


def rate_in_words(rate: float) -> str:
    """Format a rate in the shortest unit in which it is a whole number, or else per day.

    >>> rate_in_words(20 / 60), rate_in_words(1000 / 3600), rate_in_words(0.5), rate_in_words(1.25)
    ('20/min', '1000/h', '30/min', '75/min')
    """
    for unit, seconds in SECONDS.items():
        number = rate * seconds
        if number >= 1 and math.isclose(number, round(number), rel_tol=1e-9):
            return f"{round(number)}/{unit}"
    return f"{rate * SECONDS['d']:.6g}/d"


def details_of(details: Mapping[str, object]) -> str:
    """Return an audit event's details in one line.

    >>> details_of({"channel": None, "fields": ["dueDate", "message"], "rate": 5})
    'fields dueDate message, rate 5'
    """
    return ", ".join(f"{name} {_listed(value)}" for name, value in details.items() if value is not None)


def _listed(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class Sentence:
    """A sentence with placeholders and values, shown in the reader's language and time zone.

    A value is a string, a number, a time, a duration, or a nested sentence. `str()` returns the sentence in English,
    and times in UTC.

    >>> str(Sentence("It is sent in {wait}.", wait=timedelta(minutes=3)) + Sentence("See followups doctor."))
    'It is sent in 3 min. See followups doctor.'
    """

    __slots__ = ("text", "values")

    def __init__(self, text: str, **values: object) -> None:
        """Store the English text; ``{name}`` in it is replaced by the value with that name."""
        self.text = text
        self.values = values

    def said(self, translate: Callable[[str], str], when: Callable[[datetime], str]) -> str:
        """Return the sentence as translated by ``translate``, with its times formatted by ``when``."""

        def shown(value: object) -> object:
            match value:
                case Sentence():
                    return value.said(translate, when)
                case datetime():
                    return when(value)
                case timedelta():
                    return span(value)
                case _:
                    return value

        text = translate(self.text)
        return text.format(**{name: shown(value) for name, value in self.values.items()}) if self.values else text

    def __str__(self) -> str:
        """Return the sentence in English."""
        return self.said(str, readable)

    def __add__(self, other: Sentence) -> Sentence:
        """Return this sentence followed by another one."""
        return Sentence("{first} {second}", first=self, second=other)
