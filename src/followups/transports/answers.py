"""Map HTTP answers to outcomes as documented in deploy/ENDPOINT.md; all functions are pure.

============================================ =========================================================
answer                                       outcome
============================================ =========================================================
2xx                                          `Sent`, with the endpoint's id of the message if it gave one
429; 503 with a valid Retry-After            `Snoozed`: uses up no attempt
408, 425, other 5xx                          `Retry`, not before Retry-After
anything else                                `Rejected`, with the first 200 characters of the body
============================================ =========================================================

While the transport fails as a whole, the breaker turns a 401 or 403 into `Snoozed` (`followups.flow_control.breaker`).
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from pydantic_core import from_json

from followups.retry_policy import MAX_RETRY_AFTER, clamp_retry_after
from followups.transports.port import Outcome, Rejected, Retry, Sent, Snoozed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from uuid import UUID

EXCERPT_LENGTH = 200
"""Maximum number of characters that a reason quotes from a rejection's body."""

_SECONDS = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])

_DECODER = json.JSONDecoder()

Document = dict[str, object]


class Answer(NamedTuple):
    """An HTTP answer whose final status has arrived; later headers may be missing or invalid.

    Header names are in lower case.
    """

    status: int
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b""
    flaw: str = ""
    """Why the body is incomplete, or an empty string if it is complete. The HTTP status is valid even if the body is
    incomplete.
    """


@dataclass(frozen=True, slots=True)
class Dialect:
    """The format of the JSON object in an endpoint's answers."""

    message_id: Callable[[Document], UUID | None]
    """Return the message's id from a 2xx answer.

    Raises `ValueError` for an invalid id, without quoting it.
    """
    requested_delay: Callable[[Document], timedelta | None]
    """Return the delay that is requested by the body of a 429 without Retry-After."""
    reported_error: Callable[[Document], str] = lambda _document: ""
    """Return what is unusual about a 2xx answer that reports an error, or an empty string if it reports none."""


def outcome_of(answer: Answer, dialect: Dialect, now: datetime | None = None) -> Outcome:
    """Return the outcome of ``answer``.

    If Retry-After is a date and the Date header is missing, the delay is counted from the timezone-aware ``now``.
    """
    status, detail = answer.status, f"HTTP {answer.status}"
    if status // 100 == 2:  # noqa: PLR2004 - 2xx
        return _sent(answer, dialect)
    after = retry_after(answer.headers, now or datetime.now(UTC))
    if status == 429:  # noqa: PLR2004 - Too Many Requests, RFC 6585
        return Snoozed(detail, after or _requested_delay(answer, dialect), status)
    if status == 503 and after:  # noqa: PLR2004 - Service Unavailable, RFC 9110
        return Snoozed(detail, after, status)
    if status in {408, 425} or status // 100 == 5:  # noqa: PLR2004 - 5xx
        return Retry(detail, after, status)
    said = excerpt(answer.body)
    return Rejected(f"{detail} {said}" if said else detail, status)


def retry_after(headers: Mapping[str, str], now: datetime) -> timedelta | None:
    """Return the delay of Retry-After, between 1 s and 24 h, or None if the header is missing or invalid.

    Retry-After is in seconds (a fraction is accepted) or an HTTP date (RFC 9110, 10.2.3). A Retry-After date is
    compared with the answer's Date header, if present, because the clocks of the two hosts may differ.

    >>> retry_after({"retry-after": "120"}, datetime.now(UTC))
    datetime.timedelta(seconds=120)
    """
    value = headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(value):
        return clamp_retry_after(timedelta(seconds=min(float(value), MAX_RETRY_AFTER.total_seconds())))
    until = _http_date(value)
    if until is None:
        return None
    return clamp_retry_after(until - (_http_date(headers.get("date", "")) or now))


def excerpt(body: bytes) -> str:
    r"""Return the first 200 characters of a body, without NUL and other control characters.

    >>> excerpt(b"not\x00 allowed")
    'not allowed'
    """
    return body.decode(errors="replace").translate(_CONTROLS)[:EXCERPT_LENGTH]


def _http_date(value: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _sent(answer: Answer, dialect: Dialect) -> Sent:
    # An accepted message counts as sent. If the body is invalid, only the message's id is unknown.
    if answer.flaw or not answer.body.strip():
        return Sent(None, answer.status, answer.flaw)
    odd = ""
    try:
        document = _document(answer.body)
        odd = dialect.reported_error(document)
        return Sent(dialect.message_id(document), answer.status, odd)
    except ValueError as error:
        return Sent(None, answer.status, odd or str(error))


def _requested_delay(answer: Answer, dialect: Dialect) -> timedelta | None:
    try:
        wished = dialect.requested_delay(_document(answer.body))
    except ValueError:
        return None
    return None if wished is None else clamp_retry_after(wished)


def _document(body: bytes) -> Document:
    try:
        document = from_json(body, cache_strings="keys")  # values such as ids do not repeat
    except ValueError:
        document = _decode(body)
    if document is ...:
        message = "the body of the answer is not JSON"
        raise ValueError(message)
    if not isinstance(document, dict):
        message = "the body of the answer is not a JSON object"
        raise ValueError(message)  # noqa: TRY004 - the value is wrong, not the caller's type
    return document


def _decode(body: bytes) -> object:
    """Decode JSON with the standard library, or return ``...`` if the body is not JSON.

    Only bodies that pydantic rejects are decoded here. Pydantic is five times as fast, but rejects a byte order mark,
    half a surrogate pair, and more than about 200 levels of nesting.
    """
    try:
        # `json.loads` would guess the encoding of the bytes
        return _DECODER.decode(body.removeprefix(BOM_UTF8).decode())
    except (ValueError, RecursionError):  # a RecursionError means that the JSON is nested about a thousand levels deep
        return ...
