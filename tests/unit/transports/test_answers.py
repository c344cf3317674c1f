"""Tests of HTTP responses: the outcome of each status, and the delay requested by Retry-After."""

from __future__ import annotations

import json
import string
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from uuid import UUID, uuid5

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from followups.transports.answers import Answer, Dialect, excerpt, outcome_of, retry_after
from followups.transports.http import DIALECT as HTTP
from followups.transports.matrix import DIALECT as MATRIX
from followups.transports.matrix import EVENT_NAMESPACE
from followups.transports.port import Rejected, Retry, Sent, Snoozed

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
QUICK = settings(max_examples=50)
SOME_ID = UUID("6f1b1f0e-3a53-4f6e-9a5f-1d2b3c4d5e6f")


def meaning(status: int) -> type:
    """Return the outcome that the documentation gives for an HTTP status."""
    if 200 <= status <= 299:
        return Sent
    if status == 429:
        return Snoozed
    if status in {408, 425} or 500 <= status <= 599:
        return Retry
    return Rejected


@pytest.mark.parametrize("status", range(100, 600))
def test_every_status_has_its_documented_outcome(status: int) -> None:
    """Each status code leads to its documented outcome, and the outcome contains the code."""
    outcome = outcome_of(Answer(status), HTTP)
    assert type(outcome) is meaning(status)
    assert outcome.status_code == status
    assert outcome.detail == ("" if isinstance(outcome, Sent) else f"HTTP {status}")


def test_503_is_a_rate_limit_only_with_a_retry_after_that_can_be_read() -> None:
    """A 503 is `Snoozed` if it has a valid Retry-After, and otherwise a plain `Retry`."""
    assert outcome_of(Answer(503, {"retry-after": "5"}), HTTP) == Snoozed("HTTP 503", timedelta(seconds=5), 503)
    assert outcome_of(Answer(503, {"retry-after": "soon"}), HTTP) == Retry("HTTP 503", None, 503)
    assert outcome_of(Answer(503), HTTP) == Retry("HTTP 503", None, 503)


def test_429_is_a_rate_limit_in_any_case() -> None:
    """A 429 is `Snoozed` even without a Retry-After."""
    assert outcome_of(Answer(429, {"retry-after": "soon"}), HTTP) == Snoozed("HTTP 429", None, 429)


@pytest.mark.parametrize("status", [401, 403, 404, 410, 301, 307, 308])
def test_final_statuses_are_rejections(status: int) -> None:
    """A 401, 403, 410 or any redirect is a rejection."""
    answer = Answer(status, {"location": "http://elsewhere/", "retry-after": "5"}, b"gone")
    assert outcome_of(answer, HTTP) == Rejected(f"HTTP {status} gone", status)


@pytest.mark.parametrize("status", [408, 425, 500, 502, 504])
def test_retry_after_is_honoured_for_every_retried_failure(status: int) -> None:
    """For every kind of failure that is retried, a Retry-After header delays the next attempt."""
    assert outcome_of(Answer(status, {"retry-after": "60"}), HTTP) == Retry(
        f"HTTP {status}", timedelta(seconds=60), status
    )


@pytest.mark.parametrize("status", [301, 400, 404])
def test_retry_after_does_not_change_a_rejection(status: int) -> None:
    """A rejection is final, whatever the response's headers."""
    assert isinstance(outcome_of(Answer(status, {"retry-after": "60"}), HTTP), Rejected)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120),
        (" 120 ", 120),
        ("0", 1),
        ("1", 1),
        ("0.25", 1),
        ("2.5", 2.5),
        ("86400", 86_400),
        ("86401", 86_400),
        ("9" * 500, 86_400),
        ("Sun, 01 Mar 2026 12:00:30 GMT", 30),
        ("Sunday, 01-Mar-26 12:00:30 GMT", 30),
        ("Sun Mar  1 12:00:30 2026", 30),
        ("Sun, 01 Mar 2026 14:00:30 +0200", 30),
        ("Sun, 01 Mar 2026 11:59:00 GMT", 1),
        ("Fri, 01 Mar 2126 12:00:00 GMT", 86_400),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float) -> None:
    """A Retry-After, in seconds or as a date, counts as at least 1 second and at most 24 hours."""
    assert retry_after({"retry-after": value}, NOW) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "value",
    ["", "soon", "-5", "+5", "1e3", "inf", "nan", "0x10", "5s", "\u0665", "32 Mar 2026", "Sun, 99 Foo 2026 1:2:3"],
)
def test_a_retry_after_that_cannot_be_read_is_ignored(value: str) -> None:
    """An invalid Retry-After is ignored."""
    assert retry_after({"retry-after": value}, NOW) is None


def test_a_date_is_measured_by_the_receivers_own_clock() -> None:
    """If a response has a Date header, a wrong local clock does not change the retry delay."""
    headers = {"retry-after": "Sun, 01 Mar 2026 12:00:30 GMT", "date": "Sun, 01 Mar 2026 12:00:20 GMT"}
    assert retry_after(headers, datetime(2020, 1, 1, tzinfo=UTC)) == timedelta(seconds=10)
    assert retry_after(headers | {"date": "yesterday"}, NOW) == timedelta(seconds=30)


@QUICK
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_retry_after_is_within_the_limits(value: str, date: str) -> None:
    """Every Retry-After header results in a delay within the limits, or in no delay."""
    wished = retry_after({"retry-after": value, "date": date}, NOW)
    assert wished is None or timedelta(seconds=1) <= wished <= timedelta(hours=24)


@QUICK
@given(st.text(alphabet=string.digits + string.ascii_letters + " ,:+-.", max_size=40))
def test_almost_valid_dates_are_within_the_limits(value: str) -> None:
    """If a Retry-After date is almost valid, the transport ignores it or keeps the delay within limits."""
    wished = retry_after({"retry-after": value}, NOW)
    assert wished is None or timedelta(seconds=1) <= wished <= timedelta(hours=24)


@QUICK
@given(st.datetimes(min_value=NOW.replace(tzinfo=None), max_value=datetime(2026, 3, 2)))  # noqa: DTZ001 - the test adds UTC
def test_any_date_within_a_day_is_kept_to_the_second(moment: datetime) -> None:
    """A Retry-After date within a day is honoured to the second."""
    moment = moment.replace(tzinfo=UTC, microsecond=0)
    wished = retry_after({"retry-after": format_datetime(moment, usegmt=True)}, NOW)
    assert wished == max(moment - NOW, timedelta(seconds=1))


@QUICK
@given(st.integers(min_value=1, max_value=86_400))
def test_any_number_of_seconds_is_kept(seconds: int) -> None:
    """A Retry-After within the limits, given in seconds, is used unchanged."""
    assert retry_after({"retry-after": str(seconds)}, NOW) == timedelta(seconds=seconds)


@QUICK
@given(st.binary(max_size=2_000))
def test_an_excerpt_of_any_body_can_be_stored(body: bytes) -> None:
    """An excerpt is valid UTF-8 without NUL, and has at most 200 characters."""
    text = excerpt(body)
    assert len(text) <= 200
    assert "\x00" not in text
    text.encode()


def test_an_excerpt_keeps_lines() -> None:
    """An excerpt of a response body keeps line breaks and tabs."""
    assert excerpt(b"one\n\ttwo\r\n") == "one\n\ttwo\r\n"


FIELDS = st.sampled_from(["chatMessageId", "event_id", "retry_after_ms"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner),
)


@pytest.mark.parametrize("dialect", [HTTP, MATRIX], ids=["http", "matrix"])
@QUICK
@given(body=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_accepted(dialect: Dialect, body: bytes) -> None:
    """A 2xx is `Sent` and a 429 is `Snoozed`, whatever the body contains."""
    assert isinstance(outcome_of(Answer(200, body=body), dialect), Sent)
    outcome = outcome_of(Answer(429, body=body), dialect)
    assert isinstance(outcome, Snoozed)
    assert outcome.after is None or timedelta(seconds=1) <= outcome.after <= timedelta(hours=24)


@pytest.mark.parametrize(
    ("body", "message_id", "detail"),
    [
        (b"", None, ""),
        (b" \n", None, ""),
        (b"{}", None, ""),
        (b'{"chatMessageId": null}', None, ""),
        (b'{"chatMessageId": "6F1B1F0E-3A53-4F6E-9A5F-1D2B3C4D5E6F", "more": 1}', SOME_ID, ""),
        (b'\xef\xbb\xbf{"chatMessageId": "6f1b1f0e-3a53-4f6e-9a5f-1d2b3c4d5e6f"}', SOME_ID, ""),
        (b'{"chatMessageId": "6f1b1f0e-3a53-4f6e-9a5f-1d2b3c4d5e6f", "quote": "\\ud83d"}', SOME_ID, ""),
        (b'{"chatMessageId": "message-5"}', None, "chatMessageId in the answer is not a UUID"),
        (b'{"chatMessageId": 5}', None, "chatMessageId in the answer is not a UUID"),
        (b"OK", None, "the body of the answer is not JSON"),
        (b"<!doctype html><title>Sign in</title>", None, "the body of the answer is not JSON"),
        (b'{"ok": true}', None, ""),
        (b'{"ok": false}', None, "the body of the answer reports an error, but its status does not"),
        (
            b'{"ok": false, "chatMessageId": "6f1b1f0e-3a53-4f6e-9a5f-1d2b3c4d5e6f"}',
            SOME_ID,
            "the body of the answer reports an error, but its status does not",
        ),
        (b'{"success": false}', None, "the body of the answer reports an error, but its status does not"),
        (b'{"error": "no such chat"}', None, "the body of the answer reports an error, but its status does not"),
        (b'{"error": null}', None, ""),
        (b"\xff\xfe", None, "the body of the answer is not JSON"),
        (b"[]", None, "the body of the answer is not a JSON object"),
    ],
)
def test_the_id_of_the_message_is_taken_if_there_is_one(body: bytes, message_id: UUID | None, detail: str) -> None:
    """A 2xx response may contain the message's id; an invalid body is reported but does not change the outcome."""
    assert outcome_of(Answer(200, body=body), HTTP) == Sent(message_id, 200, detail)


def test_an_incomplete_body_gives_no_id() -> None:
    """An incomplete response body gives no message id."""
    answer = Answer(200, body=b'{"chatMessageId": "6f1b1f0e-3a53-4f6e-9a5f-1d2b3c4d5e6f"}', flaw="it broke off")
    assert outcome_of(answer, HTTP) == Sent(None, 200, "it broke off")


def test_a_matrix_message_id_is_derived_from_the_event_id() -> None:
    """The chat message id of a Matrix message is derived from the event id."""
    outcome = outcome_of(Answer(200, body=b'{"event_id": "$abc"}'), MATRIX)
    assert outcome == Sent(uuid5(EVENT_NAMESPACE, "$abc"), 200)
    assert outcome == Sent(UUID("37b34226-6556-52a4-80bc-84c22a7f6ff5"), 200)


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({}, b'{"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 2500}', 2.5),
        ({}, b'{"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 5}', 1),
        ({}, b'{"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 1e300}', 86_400),
        ({"retry-after": "7"}, b'{"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 2500}', 7),
        ({}, b'{"errcode": "M_LIMIT_EXCEEDED"}', None),
        ({}, b'{"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": -1}', None),
        ({}, b'{"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": "2500"}', None),
        ({}, b'{"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": true}', None),
        ({}, b'{"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": NaN}', None),
        ({}, b"slow down", None),
    ],
)
def test_a_homeservers_rate_limit_is_honoured(headers: dict[str, str], body: bytes, seconds: float | None) -> None:
    """With M_LIMIT_EXCEEDED, the delay is in a header; older homeservers put it into the body.

    In an M_LIMIT_EXCEEDED response, the header's delay takes precedence over the body's.
    """
    after = None if seconds is None else timedelta(seconds=seconds)
    assert outcome_of(Answer(429, headers, body), MATRIX) == Snoozed("HTTP 429", after, 429)
