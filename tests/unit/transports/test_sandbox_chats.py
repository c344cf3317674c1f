"""The core of the sandbox: behaviours, deduplication, counts and limits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from followups.transports.sandbox import ledger
from followups.transports.sandbox.behaviour import Behaviour, Incoming
from followups.transports.sandbox.chats import KEEP_ATTEMPTS, KEEP_CHATS, KEEP_MESSAGES, KEEP_TEXT, SandboxChats
from followups.transports.sandbox.ledger import Arrival

DUE = datetime(2026, 3, 1, 12, tzinfo=UTC)


def incoming(follow_up_id: str = "f1", chat_id: str = "c1", **changes: Any) -> Incoming:
    """Return a delivery that was due at noon on 1 March 2026."""
    return Incoming(
        follow_up_id=follow_up_id, chat_id=chat_id, **({"message": "hello", "due_date": DUE, "attempt": 1} | changes)
    )


def late(milliseconds: float) -> Arrival:
    """Return the time that is this many milliseconds after the due date."""
    return Arrival((DUE + timedelta(milliseconds=milliseconds)).timestamp(), 0.0)


def messages(chats: SandboxChats, chat_id: str = "c1") -> list[dict[str, Any]]:
    """Return the messages of a chat."""
    return next(chat["messages"] for chat in chats.conversations() if chat["chatId"] == chat_id)


def test_a_repeated_key_is_answered_as_before_and_counted() -> None:
    """A request with a repeated key adds no message, returns the first id, and counts as one repeat."""
    chats = SandboxChats()
    first, second = (chats.receive(incoming(), "key") for _ in range(2))
    assert first == second
    summary = chats.ledger.summary()
    assert (summary["requests"], summary["accepted"], summary["repeats"], summary["duplicates"]) == (2, 1, 1, 0)
    assert [(record.accepted, record.duplicate) for record in chats.ledger.records()] == [(True, False), (False, True)]


def test_without_deduplication_a_repeated_key_is_a_second_message() -> None:
    """Without deduplication, a request with a repeated key sends a second message.

    If a key is accepted more than once, exactly one duplicate is counted.
    """
    chats = SandboxChats(deduplicates=False)
    replies = {chats.receive(incoming(), "key").body for _ in range(3)}
    summary = chats.ledger.summary()
    assert len(replies) == 3
    assert (summary["accepted"], summary["repeats"], summary["duplicates"]) == (3, 2, 1)


def test_a_rejected_key_is_not_a_repeat() -> None:
    """If a request was rejected, a later request with its key is not counted as a repeat."""
    chats = SandboxChats()
    chats.behave("c1", Behaviour(kind="fail", times=1))
    for _ in range(2):
        chats.receive(incoming(), "key")
    summary = chats.ledger.summary()
    assert (summary["accepted"], summary["repeats"]) == (1, 0)
    assert summary["outcomes"] == {"failed": 1, "accepted": 1}


def test_a_behaviour_for_n_requests_ends_after_them() -> None:
    """A behaviour with ``times`` ends after that many requests, and shows how many remain."""
    chats = SandboxChats()
    chats.behave("c1", Behaviour(kind="reject", times=2))
    assert [chats.receive(incoming(f"f{n}"), f"f{n}").status for n in range(4)] == [403, 403, 200, 200]
    chats.behave("c1", Behaviour(kind="fail", times=3))
    chats.receive(incoming("f9"), "f9")
    assert chats.behaviour("c1") == Behaviour(kind="fail", times=2)


def test_a_chats_behaviour_precedes_the_default() -> None:
    """A chat's own behaviour takes precedence over the default."""
    chats = SandboxChats()
    chats.default = Behaviour(kind="fail", status=502)
    chats.behave("c1", Behaviour(kind="accept"))
    assert chats.receive(incoming(), "k1").status == 200
    assert chats.receive(incoming(chat_id="c2"), "k2").status == 502
    chats.reset("c1")
    assert chats.receive(incoming(), "k3").status == 502


@pytest.mark.parametrize(
    ("behaviour", "status", "delay", "headers", "dropped"),
    [
        (Behaviour(), 200, 0, {}, False),
        (Behaviour(kind="slow"), 200, 5, {}, False),
        (Behaviour(kind="slow", delay=0.5, status=202), 202, 0.5, {}, False),
        (Behaviour(kind="fail"), 500, 0, {}, False),
        (Behaviour(kind="fail", status=503, retry_after=2, delay=1), 503, 1, {"retry-after": "2"}, False),
        (Behaviour(kind="reject"), 403, 0, {}, False),
        (Behaviour(kind="rate_limit"), 429, 0, {"retry-after": "1"}, False),
        (Behaviour(kind="rate_limit", retry_after=0.5), 429, 0, {"retry-after": "0.5"}, False),
        (Behaviour(kind="drop"), 200, 0, {}, True),
    ],
)
def test_each_behaviour_has_its_reply(
    behaviour: Behaviour, status: int, delay: float, headers: dict[str, str], *, dropped: bool
) -> None:
    """Each sandbox behaviour has a default status, delay and headers, which can be overridden."""
    reply = behaviour.reply({})
    assert (reply.status, reply.delay, reply.headers, reply.dropped) == (status, delay, headers, dropped)


@pytest.mark.parametrize(
    "wrong", [{"kind": "explode"}, {"status": 99}, {"status": 600}, {"times": 0}, {"delay": -1}, {"delai": 1}]
)
def test_an_invalid_behaviour_is_refused(wrong: dict[str, object]) -> None:
    """A behaviour with an invalid type, limit or name is rejected."""
    with pytest.raises(ValidationError):
        Behaviour(**wrong)


def test_a_dropped_request_is_accepted_and_has_no_status() -> None:
    """A request dropped by the sandbox is recorded as accepted, without a response status."""
    chats = SandboxChats()
    chats.behave("c1", Behaviour(kind="drop"))
    assert chats.receive(incoming(), "key").dropped
    record = chats.ledger.records()[0]
    assert (record.outcome, record.accepted, record.status) == ("dropped", True, None)


def test_lag_is_received_minus_due() -> None:
    """Lag is in milliseconds, with nearest-rank quantiles; an early message has a negative lag."""
    chats = SandboxChats()
    for n in range(100):
        chats.receive(incoming(f"f{n}"), f"f{n}", late(n - 1))
    chats.behave("c1", Behaviour(kind="reject"))
    chats.receive(incoming("refused"), "refused", late(60_000))
    assert chats.ledger.summary()["lagMs"] == {"min": -1, "p50": 48, "p95": 93, "p99": 97, "max": 98}
    assert chats.ledger.summary(latest=1)["lagMs"] == dict.fromkeys(("min", "p50", "p95", "p99", "max"), 98)


def test_nothing_accepted_has_no_lag() -> None:
    """Without accepted messages, the lag quantiles are None."""
    assert set(SandboxChats().ledger.summary()["lagMs"].values()) == {None}


def test_a_request_is_listed_with_all_fields() -> None:
    """The sandbox lists requests as JSON, with all fields and with RFC 3339 times."""
    chats = SandboxChats()
    chats.receive(incoming(attempt=2), "key", late(1.5))
    assert chats.ledger.records()[0].document() == {
        "followUpId": "f1",
        "chatId": "c1",
        "idempotencyKey": "key",
        "attempt": 2,
        "dueDate": "2026-03-01T12:00:00.000000Z",
        "receivedAt": "2026-03-01T12:00:00.001500Z",
        "receivedMonotonic": 0.0,
        "lagMs": 1.5,
        "messageLength": 5,
        "outcome": "accepted",
        "status": 200,
        "accepted": True,
        "duplicate": False,
    }


def test_a_conversation_shows_a_follow_up_once_with_its_attempts() -> None:
    """A conversation shows each follow-up once, with all its attempts, among the other messages."""
    chats = SandboxChats()
    chats.add_message("c1", "user", "hi")
    chats.behave("c1", Behaviour(kind="fail", times=1))
    for attempt in (1, 2):
        chats.receive(incoming(attempt=attempt), "f1", late(attempt))
    user, follow_up = messages(chats)
    assert (user["role"], user["text"], user["attempts"], user["dueDate"]) == ("user", "hi", [], None)
    assert (follow_up["role"], follow_up["accepted"], follow_up["lagMs"]) == ("follow_up", True, 2.0)
    assert [(each["attempt"], each["outcome"], each["status"]) for each in follow_up["attempts"]] == [
        (1, "failed", 500),
        (2, "accepted", 200),
    ]


def test_the_newest_activity_comes_first() -> None:
    """Chats are listed by their last change, newest first; ``since`` leaves out those changed earlier."""
    chats = SandboxChats()
    for chat_id in ("c1", "c2", "c3", "c1"):
        chats.add_message(chat_id, "user", "hi")
    assert [chat["chatId"] for chat in chats.conversations()] == ["c1", "c3", "c2"]
    assert [chat["chatId"] for chat in chats.conversations(since=3)] == ["c1"]


def test_stored_data_is_bounded_and_counts_are_exact() -> None:
    """The sandbox limits how much it stores, but its counts are exact."""
    chats = SandboxChats(keep=10)
    for n in range(KEEP_CHATS + 5):
        chats.receive(incoming(f"f{n}", f"c{n}", message="x" * 5_000), f"f{n}")
    for n in range(KEEP_MESSAGES + 5):
        chats.add_message("c1", "user", str(n))
    for _ in range(KEEP_ATTEMPTS + 5):
        chats.receive(incoming("again", "c2"), "again")
    assert len(chats.ledger.records()) == 10
    last = KEEP_CHATS + 5 + KEEP_ATTEMPTS + 5
    assert [number for number, _ in chats.ledger.page(after=0, limit=3)] == [last - 9, last - 8, last - 7]
    assert chats.ledger.summary()["requests"] == KEEP_CHATS + 5 + KEEP_ATTEMPTS + 5
    shown = list(chats.conversations())
    assert len(shown) == KEEP_CHATS
    assert [message["text"] for message in messages(chats)][-1] == str(KEEP_MESSAGES + 4)
    assert len(messages(chats)) == KEEP_MESSAGES
    assert len(messages(chats, "c2")[-1]["attempts"]) == KEEP_ATTEMPTS
    assert len(messages(chats, f"c{KEEP_CHATS + 4}")[0]["text"]) == KEEP_TEXT


def test_the_oldest_key_is_discarded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deduplication stores a limited number of keys and discards the oldest first."""
    monkeypatch.setattr(ledger, "KEEP_KEYS", 2)
    chats = SandboxChats()
    for key in ("a", "b", "c", "c", "a"):
        chats.receive(incoming(key), key)
    assert [record.accepted for record in chats.ledger.records()] == [True, True, True, False, True]


def test_clearing_keeps_the_behaviours() -> None:
    """After `clear`, known idempotency keys count as new, but chats keep their behaviour."""
    chats = SandboxChats()
    chats.behave("c2", Behaviour(kind="fail"))
    chats.receive(incoming(), "key")
    before = chats.cleared
    chats.clear()
    assert (chats.ledger.records(), list(chats.conversations())) == ([], [])
    assert chats.cleared != before
    chats.receive(incoming(), "key")
    assert chats.ledger.records()[0].accepted
    assert chats.receive(incoming(chat_id="c2"), "key 2").status == 500
