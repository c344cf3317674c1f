"""Tests of the text that explains a follow-up to operators."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from typing import Any
from uuid import UUID

import pytest

from followups.flow_control.breaker import BreakerStatus
from followups.models import FollowUp
from followups.operations.explain import ENDINGS, Circumstances, explain
from followups.sending_hours import SendingHours
from followups.settings import load_settings
from followups.states import ReasonCode, Status
from followups.store.pauses import ActivePause
from followups.store.rate_limits import Limit
from followups.wording import Sentence

NOW = datetime(2030, 1, 31, 9, tzinfo=UTC)
EARLIER = UUID("0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51")
SETTINGS = load_settings(database_url="postgresql://h/d", broker_url="redis://h", max_attempts=3)


SECOND, MINUTE, HOUR, DAY = (timedelta(**{unit: 1}) for unit in ("seconds", "minutes", "hours", "days"))
TICKING = Circumstances(tick_age=timedelta(seconds=1))
BERLIN = SendingHours("Europe/Berlin", time(12), time(20))
"""Sending hours in Berlin, where the local time at ``NOW`` is 10:00."""


def explained(
    status: Status = Status.PENDING, due: timedelta = timedelta(0), around: Circumstances = TICKING, **columns: Any
) -> str:
    """Explain a follow-up that is due after the duration ``due`` from now."""
    values = {
        "workspace_id": WORKSPACE,
        "status": status,
        "due_date": NOW + due,
        "scheduled_at": NOW - timedelta(days=1),
        "attempts": 0,
    } | columns
    return str(explain(FollowUp(**values), SETTINGS, NOW, around))


def test_every_code_is_explained() -> None:
    """Every documented reason code has its own explanation."""
    assert set(ENDINGS) == set(ReasonCode)
    assert len(set(ENDINGS.values())) == len(ENDINGS)


@pytest.mark.parametrize("code", ReasonCode)
def test_an_explanation_is_complete_sentences(code: ReasonCode) -> None:
    """A reason's explanation consists of complete sentences and includes the configured limits."""
    said = explained(Status.FAILED, reason=f"{code.value}: detail")
    assert said.endswith(".")
    assert "{" not in said


def test_limits_are_named() -> None:
    """If a limit has ended a follow-up, the explanation names the limit's setting and value."""
    assert "FOLLOWUPS_MAX_ATTEMPTS (3)" in explained(Status.FAILED, reason="retries_exhausted: HTTP 500")
    assert "FOLLOWUPS_MAX_LATENESS (1 d)" in explained(Status.FAILED, reason="too_late")


def test_a_due_date_in_the_last_year() -> None:
    """The lateness limit may be beyond the last date that Python can represent."""
    due = datetime(9998, 12, 31, tzinfo=UTC)
    follow_up = FollowUp(workspace_id=WORKSPACE, status=Status.PENDING, due_date=due, scheduled_at=NOW, attempts=0)
    patient = SETTINGS.model_copy(update={"max_lateness": 36_500 * DAY})
    assert str(explain(follow_up, patient, NOW, TICKING)).startswith("The follow-up will be sent in")


def test_a_callers_reason_is_shown_unchanged() -> None:
    """A caller's own reason is displayed unchanged."""
    assert explained(Status.CANCELLED, reason="the customer called") == (
        "The follow-up was cancelled, with a reason in the caller's own words."
    )


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"due": timedelta(minutes=3)}, "The follow-up will be sent in 3 min, unless something cancels it first."),
        (
            {"due": timedelta(0), "attempts": 1, "next_attempt_at": NOW + timedelta(seconds=4)},
            "The follow-up is tried again in 4 s; the failed attempts are below.",
        ),
        (
            {"due": 4 * SECOND - DAY, "attempts": 1, "next_attempt_at": NOW + 4 * SECOND},
            "will fail in 4 s: by then, it will be too late to send it (FOLLOWUPS_MAX_LATENESS, 1 d).",
        ),
        (
            {"due": -DAY, "sendable_from": NOW - HOUR, "attempts": 1, "next_attempt_at": NOW + 4 * SECOND},
            "The follow-up is tried again in 4 s",
        ),
        ({"waits_for": EARLIER}, f"The follow-up waits for the earlier follow-up of its chat, {EARLIER}, to end"),
        ({"lease_until": NOW + timedelta(seconds=9)}, "The follow-up is due, and a tick has claimed it"),
        (
            {"due": timedelta(minutes=-5)},
            "The follow-up has been due for 5 min, and no worker has claimed it: earlier follow-ups may be",
        ),
        (
            {"lease_until": NOW - timedelta(seconds=9)},
            "The follow-up has been due for 0 ms, and no worker has claimed it",
        ),
        (
            {"begun_at": NOW, "lease_until": NOW + timedelta(seconds=9)},
            "An attempt is in flight, and its outcome is not recorded yet.",
        ),
        (
            {"begun_at": NOW, "lease_until": NOW + timedelta(seconds=9), "cancel_requested": "user_replied"},
            "its outcome is not recorded yet. A cancel (user_replied) has arrived since, so the",
        ),
        (
            {"begun_at": NOW, "lease_until": NOW},
            "The follow-up's lease has expired: a tick will claim it again, unless its worker records",
        ),
    ],
)
def test_a_pending_follow_up_is_explained(columns: dict[str, Any], said: str) -> None:
    """A pending follow-up's explanation says why it waits and what will happen next."""
    assert said in explained(**columns)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"attempts": 1}, "The transport accepted the follow-up 2 ms after its due date, at the first attempt."),
        (
            {"attempts": 3},
            "accepted the follow-up 2 ms after its due date, at attempt 3; the failed attempts are below.",
        ),
        (
            {"attempts": 1, "scheduled_at": NOW + timedelta(milliseconds=1)},
            "2 ms after its due date, which had passed when it was scheduled, on 2030-01-31 09:00:00Z.",
        ),
        (
            {"attempts": 0, "accepted_at": None},
            "The follow-up was marked as sent through the API; this service did not send it.",
        ),
    ],
)
def test_a_sent_follow_up_is_explained(columns: dict[str, Any], said: str) -> None:
    """The explanation of a sent follow-up includes the time of acceptance and the attempt."""
    accepted = {"accepted_at": NOW + timedelta(milliseconds=2)}
    assert said in explained(Status.SENT, **accepted | columns)


ACME = ActivePause(EARLIER, "acme", None, NOW, 3)
WORKSPACE = UUID(int=7)
HELD = frozenset({7})
LIMITS = (
    Limit(EARLIER, EARLIER, None, "all", 20.0, 20, "acme", NOW),
    Limit(EARLIER, None, "waha", "chat", 1 / 60, 1, None, NOW),
)
LIMITED = {"due": -HOUR, "next_attempt_at": NOW + HOUR, "limited_until": NOW + HOUR}


@pytest.mark.parametrize(
    ("around", "columns", "said"),
    [
        (
            Circumstances(pause=ACME),
            {"due": -HOUR, "pause_id": EARLIER},
            (
                "The follow-up fell due 1 h ago and is held: workspace acme has been paused since 2030-01-31 09:00:00Z;"
                " followups resume --workspace acme ends the pause."
            ),
        ),
        (
            Circumstances(pause=ActivePause(EARLIER, None, "waha", NOW, 0)),
            {"due": -HOUR, "pause_id": EARLIER},
            "all chats on channel waha have been paused since 2030-01-31 09:00:00Z; followups resume --channel waha",
        ),
        (TICKING, {"due": -HOUR, "pause_id": EARLIER}, "the pause has ended, and the follow-up will be sent in"),
        (
            Circumstances(pause=ACME),
            {"due": HOUR},
            "The follow-up will be sent in 1 h, unless something cancels it first. But workspace acme has been paused",
        ),
        (Circumstances(pause=ACME), {"due": -HOUR}, "The follow-up is due, and will be held when a worker begins it"),
        (
            Circumstances(hours=BERLIN),
            {"due": -HOUR, "held_until": NOW + 2 * HOUR, "next_attempt_at": NOW + 2 * HOUR},
            (
                "The follow-up fell due outside the workspace's sending hours (12:00 to 20:00, Europe/Berlin)"
                " and is held until they begin, in 2 h."
            ),
        ),
        (
            Circumstances(hours=BERLIN),
            {"due": HOUR},
            (
                "But that is outside the sending hours (12:00 to 20:00, Europe/Berlin),"
                " so the follow-up will be held until 2030-01-31 11:00:00Z."
            ),
        ),
        (
            Circumstances(first=Sentence("About that follow-up: it is stuck.")),
            {"waits_for": EARLIER},
            (
                f"The follow-up waits for the earlier follow-up of its chat, {EARLIER}, to end."
                " About that follow-up: it is stuck."
            ),
        ),
        (
            Circumstances(limits=LIMITS),
            LIMITED,
            (
                "The follow-up is due, and waits for the rate limits of 20/s for workspace acme"
                " and 1/min for each chat of channel waha; it is tried again in 1 h."
            ),
        ),
        (TICKING, LIMITED, "waits for a rate limit that has been removed since; it is tried again in 1 h."),
        (
            Circumstances(limits=LIMITS),
            LIMITED | {"limited_until": NOW - HOUR},
            "The follow-up is tried again in 1 h; the failed attempts are below.",
        ),
        (
            Circumstances(breaker=BreakerStatus("open", 180, 4, HELD), tick_age=timedelta(seconds=1)),
            {"due": -HOUR, "lease_until": NOW + HOUR},
            (
                "The follow-up is due, and waits without using up attempts: for 3 min the transport has failed for its"
                " workspace (the breaker is open)."
            ),
        ),
        (
            Circumstances(breaker=BreakerStatus("recovering", 180, 4, HELD)),
            {"due": -HOUR},
            "The follow-up is due, and will be sent within seconds",
        ),
        (
            Circumstances(breaker=BreakerStatus("open", 180, 4, HELD)),
            LIMITED,
            "The follow-up is due, and waits without using up attempts",
        ),
        (Circumstances(breaker=BreakerStatus("closed", 0, 0)), {"due": -HOUR}, "no tick has ever run"),
        (Circumstances(breaker=BreakerStatus("open", 180, 4)), {"due": -HOUR}, "no tick has ever run"),
        (
            Circumstances(breaker=BreakerStatus("open", 180, 4, HELD)),
            {"due": HOUR},
            "The follow-up will be sent in 1 h",
        ),
        (Circumstances(), {"due": -HOUR}, "no tick has ever run, so beat or the workers are not running"),
        (
            Circumstances(tick_age=HOUR),
            {"due": -HOUR},
            "the last tick ran 1 h ago, so beat or the workers are not running",
        ),
        (
            TICKING,
            {"due": -HOUR, "snoozes": 3},
            "It was snoozed 3 times, because the transport limits the rate or refuses access.",
        ),
        (
            Circumstances(place=3),
            {"due": HOUR},
            "unless something cancels it first. It is number 3 in its chat; the earlier ones are sent first.",
        ),
        (
            Circumstances(hours=BERLIN),
            {"due": -DAY, "sendable_from": NOW - DAY + 2 * HOUR, "next_attempt_at": NOW + HOUR},
            (
                "But that is outside the sending hours (12:00 to 20:00, Europe/Berlin), which begin too late for it, so"
                " the follow-up will fail at 2030-01-31 11:00:00Z."
            ),
        ),
        (
            Circumstances(hours=BERLIN),
            {"due": -DAY + HOUR, "next_attempt_at": NOW + MINUTE},
            "so the follow-up will be held until 2030-01-31 11:00:00Z.",
        ),
        (
            Circumstances(window_closes_at=NOW + 4 * HOUR, hours=BERLIN),
            {"due": HOUR - DAY, "sendable_from": HOUR - DAY + NOW, "next_attempt_at": NOW + HOUR},
            "it will be too late to send it (FOLLOWUPS_MAX_LATENESS, 1 d).",
        ),
        (Circumstances(place=100), {"waits_for": EARLIER}, "to end. It is number 100+ in its chat"),
        (
            Circumstances(window_closes_at=NOW + HOUR),
            {"due": HOUR},
            "The channel's messaging window closes before that, at 2030-01-31 10:00:00Z, so the follow-up will fail.",
        ),
        (
            Circumstances(window_closes_at=NOW + 2 * HOUR, hours=BERLIN),
            {"due": HOUR},
            "will be held until 2030-01-31 11:00:00Z. The channel's messaging window closes before that",
        ),
        (
            Circumstances(window_closes_at=NOW),
            {"due": -HOUR},
            "messaging window has closed, so the follow-up will fail.",
        ),
        (
            Circumstances(pause=ACME, window_closes_at=NOW + HOUR),
            {"due": -HOUR, "pause_id": EARLIER},
            "It will fail if it is still held when the messaging window closes, at 2030-01-31 10:00:00Z.",
        ),
        (
            Circumstances(retried_as=EARLIER),
            {"status": Status.FAILED, "reason": "too_late"},
            f"followups retry creates a new follow-up. It was retried as {EARLIER}.",
        ),
        (
            TICKING,
            {"status": Status.SENT, "due": -HOUR, "held_until": NOW, "accepted_at": NOW, "attempts": 1},
            "1 h after its due date (held until the sending hours opened, 2030-01-31 09:00:00Z), at the first attempt.",
        ),
    ],
)
def test_causes_of_delay_are_named(around: Circumstances, columns: dict[str, Any], said: str) -> None:
    """The explanation names the cause of a delay: a pause, sending hours, chat order or missing processes.

    The explanation also names the event that will end the wait.
    """
    assert said in explained(around=around, **columns)
