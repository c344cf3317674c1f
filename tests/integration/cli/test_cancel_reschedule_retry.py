"""The commands `cancel`, `reschedule` and `retry`."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
import redis

from followups.cli import connection
from followups.cli.connection import nudge_if_soon
from world import FAILED, FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import World

    RunCommand = Callable[..., Any]

HOUR = timedelta(hours=1)


@pytest.fixture(autouse=True)
def nudges(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    """Replace the function that requests ticks; return the list of due dates passed to it."""
    told: list[datetime] = []
    monkeypatch.setattr(connection, "nudge_if_soon", lambda due, _now: told.append(due))
    return told


class TestCancel:
    """The command `followups cancel`."""

    def test_the_reason_is_stored_as_given(self, run: RunCommand, world: World) -> None:
        """A pending follow-up is cancelled with the given reason; repeating the command changes nothing."""
        follow_up = world.follow_up(due=HOUR)
        ran = run("cancel", follow_up, "--reason", "the customer called")
        assert (ran.code, ran.stdout) == (0, f"{follow_up} is cancelled: the customer called\n")
        row = world.row(follow_up)
        assert (row.status, row.reason) == ("cancelled", "the customer called")
        assert run("cancel", follow_up, "--reason", "the customer called").code == 0
        assert world.row(follow_up) == row

    def test_without_a_reason_the_default_code_is_stored(self, run: RunCommand, world: World) -> None:
        """A follow-up cancelled without a reason gets the reason cancelled_by_api."""
        cancelled = run("cancel", world.follow_up(due=HOUR), "--json").document
        assert list(cancelled) == FIELDS
        assert (cancelled["status"], cancelled["reason"]) == ("cancelled", "cancelled_by_api")

    def test_finished_and_in_flight_follow_ups_stay_unchanged(self, run: RunCommand, world: World) -> None:
        """`cancel` refuses a finished or in-flight follow-up with an error that explains why."""
        failed = world.follow_up(**FAILED)
        later = datetime.now(UTC) + HOUR
        in_flight = world.follow_up(begun_at=later, lease_until=later)
        for follow_up, said in ((failed, "has already finished"), (in_flight, "is being delivered at this moment")):
            before = world.row(follow_up)
            ran = run("cancel", follow_up)
            assert (ran.code, ran.stdout) == (1, "")
            assert said in ran.stderr
            assert world.row(follow_up) == before

    def test_an_empty_reason_is_wrong_usage(self, run: RunCommand, world: World) -> None:
        """`cancel` with an empty reason is a usage error and changes nothing."""
        follow_up = world.follow_up(due=HOUR)
        assert run("cancel", follow_up, "--reason", "").code == 2
        assert world.row(follow_up).status == "pending"


class TestReschedule:
    """The command `followups reschedule`."""

    def test_due_date_with_an_offset(self, run: RunCommand, world: World, nudges: list[datetime]) -> None:
        """A due date with a UTC offset is stored as the same point in time."""
        follow_up = world.follow_up(due=HOUR)
        due = datetime(2031, 1, 31, 9, tzinfo=UTC)
        ran = run("reschedule", follow_up, "--due", "2031-01-31T10:00:00+01:00")
        assert (ran.code, ran.stdout) == (0, f"{follow_up} is due 2031-01-31 09:00:00Z\n")
        assert world.row(follow_up).due_date == due
        assert nudges == [due]

    @pytest.mark.parametrize(("text", "seconds"), [("now", 0), ("+10m", 600)])
    def test_relative_due_date(self, run: RunCommand, world: World, text: str, seconds: int) -> None:
        """The due dates `now` and `+10m` are computed from the database's clock."""
        follow_up = world.follow_up(due=HOUR)
        before = world.scalar("SELECT now()")
        assert list(run("reschedule", follow_up, "--due", text, "--json").document) == FIELDS
        after = world.scalar("SELECT now()")
        assert before <= world.row(follow_up).due_date - timedelta(seconds=seconds) <= after

    def test_outside_the_window_is_refused(self, run: RunCommand, world: World) -> None:
        """A due date outside the channel's messaging window is rejected with advice."""
        chat = world.chat(channel="whatsapp", last_user_message_at=datetime.now(UTC))
        ran = run("reschedule", world.follow_up(chat, HOUR), "--due", "+25h")
        assert ran.code == 1
        assert "the user must write in the chat first, or the due date must be earlier" in ran.stderr


class TestRetry:
    """The command `followups retry`."""

    def test_a_retry_creates_a_new_follow_up(self, run: RunCommand, world: World, nudges: list[datetime]) -> None:
        """`retry` creates a new follow-up, due now, with the failed one's message and chat.

        The failed follow-up is unchanged, and the id of the new one is printed.
        """
        failed = world.follow_up(**FAILED, message="Hello")
        before = world.row(failed)
        ran = run("retry", failed)
        new = world.row(UUID(ran.stdout.strip()))
        assert (new.status, new.message, new.chat_id) == ("pending", "Hello", before.chat_id)
        assert f"{failed} stays failed" in ran.stderr
        assert world.row(failed) == before
        assert nudges == [new.due_date]

    def test_retry_at_a_later_time(self, run: RunCommand, world: World) -> None:
        """If `retry` is given a due date, the new follow-up is due at that time."""
        new = run("retry", world.follow_up(**FAILED), "--due", "+1h", "--json").document
        assert list(new) == FIELDS
        assert new["createdAt"] < new["dueDate"]

    def test_only_a_failed_follow_up(self, run: RunCommand, world: World) -> None:
        """`retry` rejects a follow-up that has not failed, and one whose user has replied since it failed."""
        assert "this one is pending" in run("retry", world.follow_up(due=HOUR)).stderr
        answered = world.follow_up(world.chat(last_message_role="user"), **FAILED)
        ran = run("retry", answered)
        assert (ran.code, ran.stdout) == (1, "")
        assert "an agent or operator must write in the chat first" in ran.stderr


def _reschedule_in_a_process(follow_up: UUID) -> None:
    # The worker's module reads its settings only on import, so the command runs in a separate process.
    command = [sys.executable, "-m", "followups.cli", "reschedule", str(follow_up), "--due", "now"]
    subprocess.run(command, check=True, capture_output=True, env=dict(os.environ), timeout=120)


def test_a_change_due_soon_requests_a_tick(environment: pytest.MonkeyPatch, world: World, broker_url: str) -> None:
    """If a change makes a follow-up due before the next tick, a tick is requested.

    The command succeeds even if the broker is unreachable.
    """
    follow_up = world.follow_up(due=HOUR)
    _reschedule_in_a_process(follow_up)
    with redis.Redis.from_url(broker_url) as broker:
        assert broker.llen("followups:dispatch") == 1
    environment.setenv("FOLLOWUPS_BROKER_URL", "redis://127.0.0.1:9/0")
    _reschedule_in_a_process(follow_up)


@pytest.mark.usefixtures("environment")
def test_a_change_due_later_requests_no_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a follow-up's new due date is after the next regular tick, no extra tick is requested."""
    asked: list[str] = []
    monkeypatch.setattr(connection, "ask_for_tick", lambda: asked.append("tick"))
    now = datetime.now(UTC)
    nudge_if_soon(now + HOUR, now)
    assert asked == []
    nudge_if_soon(now - HOUR, now)
    assert asked == ["tick"]
