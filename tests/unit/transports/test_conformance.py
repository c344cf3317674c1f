"""The conformance suite: every transport must pass tests of the five outcomes.

To run the suite for a plug-in, add a `TransportRig` with the plug-in's transport and chats.
"""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from followups.transports.port import Rejected, Retry, Sent, Snoozed, Transport, Unknown
from unit.transports.doubles import MESSAGE, a_delivery
from unit.transports.rigs import RIGS, TransportRig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TIMEOUT = 0.25


@pytest.fixture(params=RIGS)
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[TransportRig]:
    """Return an open transport of the kind under test, with a timeout long enough for slow machines."""
    async with RIGS[request.param](10.0) as made:
        yield made


@pytest.fixture(params=RIGS)
async def hasty_rig(request: pytest.FixtureRequest) -> AsyncIterator[TransportRig]:
    """Return an opened transport of each kind, with a short timeout."""
    async with RIGS[request.param](TIMEOUT) as made:
        yield made


async def test_the_transport_has_its_entry_points_name(rig: TransportRig) -> None:
    """A transport implements the `Transport` protocol and has the name of its entry point."""
    assert isinstance(rig.transport, Transport)
    assert rig.transport.name in {"http", "matrix", "sandbox"}


async def test_accepted_messages_have_the_receivers_id(rig: TransportRig) -> None:
    """An accepted message is `Sent` with a UUID."""
    outcome = await rig.transport.send(a_delivery())
    assert isinstance(outcome, Sent)
    assert isinstance(outcome.chat_message_id, UUID)
    assert (outcome.status_code, outcome.detail) == (200, "")


async def test_the_same_follow_up_twice_is_one_message(rig: TransportRig) -> None:
    """A second attempt with the same idempotency key returns the first message."""
    delivery = a_delivery()
    assert await rig.transport.send(delivery) == await rig.transport.send(delivery)
    assert rig.accepted == 1


async def test_two_follow_ups_of_a_chat_are_two_messages(rig: TransportRig) -> None:
    """Two follow-ups result in two messages, even if both have the same text and chat."""
    first = a_delivery()
    outcomes = [await rig.transport.send(each) for each in (first, a_delivery(chat_id=first.chat_id))]
    assert outcomes[0] != outcomes[1]
    assert rig.accepted == 2


@pytest.mark.parametrize("status", [408, 425, 500, 502, 503, 504, 599])
async def test_a_temporary_failure_is_retried(rig: TransportRig, status: int) -> None:
    """408, 425 and 5xx lead to a `Retry` that names the status."""
    delivery = a_delivery()
    outcome = await rig.send(delivery, kind="fail", status=status, times=1)
    assert outcome == Retry(f"HTTP {status}", None, status)
    assert isinstance(await rig.transport.send(delivery), Sent)


async def test_a_failure_may_request_a_delay(rig: TransportRig) -> None:
    """If a call fails with a Retry-After, the `Retry` outcome requests that delay."""
    outcome = await rig.send(a_delivery(), kind="fail", status=500, retry_after=7)
    assert outcome == Retry("HTTP 500", timedelta(seconds=7), 500)


@pytest.mark.parametrize("status", [429, 503])
async def test_a_rate_limit_uses_up_no_attempt(rig: TransportRig, status: int) -> None:
    """A 429, or a 503 with a Retry-After, is `Snoozed` for the time that the receiver requests."""
    outcome = await rig.send(a_delivery(), kind="rate_limit", status=status, retry_after=30)
    assert outcome == Snoozed(f"HTTP {status}", timedelta(seconds=30), status)
    assert rig.accepted == 0


async def test_a_rejection_keeps_the_first_200_characters_of_its_reason(rig: TransportRig) -> None:
    """A rejection is `Rejected`, with the status and the beginning of the receiver's response."""
    reason = "blocked \u00e9 " * 100
    outcome = await rig.send(a_delivery(), kind="reject", body=reason)
    assert outcome == Rejected(f"HTTP 403 {reason[:200]}", 403)


async def test_a_rejection_contains_no_nul(rig: TransportRig) -> None:
    """Characters that PostgreSQL cannot store are removed from a rejection's reason."""
    outcome = await rig.send(a_delivery(), kind="reject", status=404, body="no\x00 such\x1b[31m chat\x7f")
    assert outcome == Rejected("HTTP 404 no such[31m chat", 404)


@pytest.mark.parametrize("status", [301, 302, 304, 307, 400, 401, 403, 404, 409, 410, 413, 422, 451, 499])
async def test_other_failures_are_final(rig: TransportRig, status: int) -> None:
    """3xx and all other 4xx statuses are `Rejected`."""
    outcome = await rig.send(a_delivery(), kind="reject", status=status, body="")
    assert outcome == Rejected(f"HTTP {status}", status)


async def test_a_lost_answer_is_unknown_until_the_next_attempt(rig: TransportRig) -> None:
    """If a connection breaks before the response, the outcome is `Unknown`; sending again succeeds."""
    delivery = a_delivery()
    outcome = await rig.send(delivery, kind="drop", times=1)
    assert isinstance(outcome, Unknown)
    assert outcome.detail
    assert isinstance(await rig.transport.send(delivery), Sent)
    assert rig.accepted == 1


async def test_a_lost_answer_is_not_retried_by_the_transport(rig: TransportRig) -> None:
    """A transport never repeats a request; the worker decides on retries when it settles the attempt."""
    await rig.send(a_delivery(), kind="drop")
    assert rig.chats.ledger.summary()["requests"] == 1


async def test_no_answer_in_time_is_unknown(hasty_rig: TransportRig) -> None:
    """If no response arrives by the transport timeout, the outcome is `Unknown`."""
    began = time.monotonic()
    outcome = await hasty_rig.send(a_delivery(), kind="slow", delay=30)
    assert outcome == Unknown(f"no answer within {TIMEOUT} s")
    assert TIMEOUT * 0.9 < time.monotonic() - began < TIMEOUT + 2


@pytest.mark.parametrize(
    "body",
    [
        "\x00\x00",
        "not JSON " + MESSAGE,
        "[1, 2]",
        '"a string"',
        "12345678901234567890",
        "null",
        '{"chatMessageId": 5, "event_id": 5}',
        '{"chatMessageId": "no uuid", "event_id": ""}',
        '{"chatMessageId": {}, "event_id": []}',
        "[" * 30_000,
        "9" * 10_000,
        '{"broken": ',
        "x" * 200_000,
        "<!doctype html><title>Maintenance</title>",
        '{"ok": false, "errcode": "M_UNKNOWN"}',
    ],
    ids=lambda body: body[:12].replace("\x00", "NUL"),
)
async def test_an_invalid_body_is_sent_without_an_id(rig: TransportRig, body: str) -> None:
    """A 2xx with an invalid body is `Sent`, with a detail that does not quote the body."""
    outcome = await rig.send(a_delivery(), kind="accept", body=body)
    assert isinstance(outcome, Sent)
    assert outcome.chat_message_id is None
    assert outcome.detail
    assert len(outcome.detail) < 100
    assert body not in outcome.detail


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_every_2xx_is_sent(rig: TransportRig, status: int) -> None:
    """Any 2xx without a body is `Sent` without an id and without a detail."""
    assert await rig.send(a_delivery(), kind="accept", status=status, body="") == Sent(None, status, "")


async def test_every_status_is_an_outcome(rig: TransportRig) -> None:
    """For every HTTP status, `send` returns an outcome that names the status."""
    for status in range(200, 600):
        outcome = await rig.send(a_delivery(), kind="fail", status=status, body="")
        assert isinstance(outcome, Sent | Retry | Snoozed | Rejected)
        assert outcome.status_code == status


@pytest.mark.parametrize("kind", ["accept", "fail", "reject", "rate_limit", "drop", "slow"])
async def test_no_outcome_shows_the_message(rig: TransportRig, kind: str) -> None:
    """No outcome contains the text of the message."""
    assert MESSAGE not in repr(await rig.send(a_delivery(), kind=kind, delay=0))


@pytest.mark.parametrize(
    "text",
    ["x", "\u00e9 \U0001f44d \u0645\u0631\u062d\u0628\u0627", "\u00e9" * 65_536, "\x00\x1f\"\\'\u2028\n", "\ud800"],
    ids=["one", "unicode", "longest", "controls", "surrogate"],
)
async def test_any_text_arrives(rig: TransportRig, text: str) -> None:
    """Any text arrives unchanged and complete; a lone surrogate causes no error."""
    assert isinstance(await rig.transport.send(a_delivery(message=text)), Sent)
    assert rig.chats.ledger.records()[0].message_length == len(text)


async def test_concurrent_calls(rig: TransportRig) -> None:
    """Each of 150 concurrent calls receives its own response, even if the settings allow fewer at once."""
    outcomes = await asyncio.gather(*(rig.transport.send(a_delivery()) for _ in range(150)))
    assert len({outcome.chat_message_id for outcome in outcomes if isinstance(outcome, Sent)}) == 150


async def test_one_slow_chat_delays_no_other(rig: TransportRig) -> None:
    """While one call waits for its response, other calls are made and answered."""
    slow = asyncio.create_task(rig.send(a_delivery(), kind="slow", delay=30))
    await asyncio.sleep(0.02)
    assert isinstance(await rig.transport.send(a_delivery()), Sent)
    assert not slow.done()
    slow.cancel()
    await asyncio.wait([slow])


async def test_a_cancelled_call_is_cancelled(rig: TransportRig) -> None:
    """If the caller's task is cancelled, the call is cancelled too and has no outcome."""
    task = asyncio.create_task(rig.send(a_delivery(), kind="slow", delay=30))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_check_returns_one_sentence_and_sends_nothing(rig: TransportRig) -> None:
    """`check` connects to the receiver without delivering a message and returns a one-sentence result."""
    assert (await rig.transport.check()).endswith(".")
    assert rig.chats.ledger.summary()["requests"] == 0


async def test_opening_and_closing_twice_does_no_harm(rig: TransportRig) -> None:
    """`open` and `close` are idempotent, and a closed transport can be opened again."""
    await rig.transport.open()
    await rig.transport.close()
    await rig.transport.close()
    await rig.transport.open()
    assert isinstance(await rig.transport.send(a_delivery()), Sent)
