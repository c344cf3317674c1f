"""The API's field types, which validate clients' values and convert them to stored values."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field, StringConstraints, WithJsonSchema

from followups.checks import FIRST_YEAR, LAST_YEAR
from followups.models import MAX_MESSAGE_LENGTH
from followups.states import MAX_REASON_LENGTH, storable
from followups.store.console_sessions import LONGEST_LINK, SHORTEST_LINK

MAX_EXTERNAL_ID_LENGTH = 1_000
"""Maximum length of a chat's external id, in characters."""

MAX_PAGE_SIZE = 100
"""Maximum number of follow-ups on one page."""

MAX_IDEMPOTENCY_KEY_LENGTH = 255
"""Maximum length of an Idempotency-Key, in characters."""

NO_NUL = {"pattern": r"^[^\u0000]*$"}

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d)(:\d\d(?:\.\d+)?)?([Zz]|[+-]\d\d:?\d\d)?", re.ASCII)


def _canonical(value: object) -> object:
    # Python's `UUID` would accept further spellings of an id: with braces, as a URN, or without hyphens.
    if isinstance(value, str) and not _UUID.fullmatch(value):
        message = "should be a UUID, as in 123e4567-e89b-42d3-a456-426614174000"
        raise ValueError(message)
    return value


def _rfc3339(value: object) -> object:
    found = _TIME.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        message = "should be a time by RFC 3339, as in 2030-01-31T09:00:00Z"
        raise ValueError(message)
    date, minutes, seconds, offset = found.groups()
    if offset is None:
        message = "should carry an offset, as in 2030-01-31T09:00:00Z"
        raise ValueError(message)
    # RFC 3339 allows leap seconds but Python does not. A leap second is replaced by the last microsecond before it.
    if seconds and seconds.startswith(":60"):
        seconds = ":59.999999"
    return f"{date}T{minutes}{seconds or ':00'}{offset.upper()}"


def _in_utc(value: datetime) -> datetime:
    year = value.year
    try:
        value = value.astimezone(UTC)
    except OverflowError:
        pass  # times at the edge of the calendar are rejected by another check
    else:
        if min(year, value.year) >= FIRST_YEAR and max(year, value.year) <= LAST_YEAR:
            return value
    message = f"should lie in the years {FIRST_YEAR} to {LAST_YEAR}"
    raise ValueError(message)


def _storable(value: str) -> str:
    if value != storable(value):
        message = "should contain no NUL characters and no lone surrogates"
        raise ValueError(message)
    return value


def _digits(value: object) -> object:
    # Pydantic would also accept "1_0" and "1.0" as integers.
    if isinstance(value, str) and not (value.isascii() and value.isdecimal()):
        message = "should be a whole number, in digits"
        raise ValueError(message)
    return value


Id = Annotated[UUID, BeforeValidator(_canonical)]
Time = Annotated[AwareDatetime, BeforeValidator(_rfc3339), AfterValidator(_in_utc)]
Text = Annotated[str, AfterValidator(_storable), Field(json_schema_extra=NO_NUL)]


def _seconds_or_iso(value: object) -> object:
    """Convert a string of digits to an integer; pydantic parses all other values."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        return int(value)
    return value


LINK_LIFE = {
    "anyOf": [
        {"type": "integer", "minimum": 10, "maximum": 604_800},
        {"type": "string", "pattern": "^(PT[1-9][0-9]{1,4}S|PT[1-9][0-9]{0,3}M|PT([1-9][0-9]?|1[0-5][0-9])H|P[1-7]D)$"},
    ]
}
"""The documented forms of a link's lifetime, each with a single unit.

The server also accepts any other ISO 8601 duration within the allowed range.
"""

LinkLife = Annotated[
    timedelta,
    BeforeValidator(_seconds_or_iso),
    Field(ge=SHORTEST_LINK, le=LONGEST_LINK),
    WithJsonSchema(LINK_LIFE),
]

Digits = Annotated[int, BeforeValidator(_digits)]

Message = Annotated[Text, StringConstraints(min_length=1, max_length=MAX_MESSAGE_LENGTH)]
Reason = Annotated[Text, StringConstraints(min_length=1, max_length=MAX_REASON_LENGTH)]
ExternalId = Annotated[Text, StringConstraints(min_length=1, max_length=MAX_EXTERNAL_ID_LENGTH)]
IdempotencyKey = Annotated[str, StringConstraints(min_length=1, max_length=MAX_IDEMPOTENCY_KEY_LENGTH)]
