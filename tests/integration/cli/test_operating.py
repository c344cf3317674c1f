"""`list`, `show`, `cancel`, `reschedule` and `retry`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
import redis

from followups.cli import changes, nudging

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import World

    Run = Callable[..., Any]

FIELDS = [
    "id", "createdAt", "updatedAt", "chatId", "chatMessageId", "dueDate", "finishedAt", "message", "reason", "status",
    "triggerChatMessageId",
]  # fmt: skip
"""The contract's, in its order."""

HOUR = timedelta(hours=1)
FAILED = {"status": "failed", "reason": "rejected: HTTP 403 no", "finished_at": datetime(2030, 1, 31, tzinfo=UTC)}


@pytest.fixture(autouse=True)
def nudges(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    """Return the due dates that the commands gave to the nudge, which is not sent."""
    told: list[datetime] = []
    monkeypatch.setattr(changes, "nudge_if_soon", lambda due, _now: told.append(due))
    return told


class TestList:
    """`followups list`."""

    def test_the_json_form_is_the_api_s_without_the_text(self, run: Run, world: World) -> None:
        """Each entry has exactly the API's fields; the message is null unless --message asks for it."""
        follow_up = world.follow_up(due=HOUR)
        [entry] = run("list", "--json").document
        assert list(entry) == FIELDS
        assert (entry["id"], entry["status"], entry["message"]) == (str(follow_up), "pending", None)
        assert run("list", "--json", "--message").document[0]["message"] == "Still there?"

    def test_filters_and_pages(self, run: Run, world: World) -> None:
        """The list can be cut down by workspace, chat, state and number, newest first."""
        chat = world.chat()
        first, second = world.follow_up(chat, HOUR), world.follow_up(chat, HOUR)
        failed = world.follow_up(**FAILED)

        def listed(*arguments: object) -> list[UUID]:
            return [UUID(entry["id"]) for entry in run("list", "--json", *arguments).document]

        assert listed() == [failed, second, first]
        assert listed("--chat", chat) == [second, first]
        assert listed("--status", "failed", "--status", "sent") == [failed]
        assert listed("--workspace", world.workspace_id) == [failed, second, first]
        assert listed("--trigger", uuid4()) == []
        assert listed("--limit", 1, "--page", 2) == [second]

    def test_a_pipe_gets_whole_rows_and_no_colour(self, run: Run, world: World) -> None:
        """In a pipe each follow-up is one plain line with everything on it, and hints go to stderr."""
        chat = world.chat()
        follow_up = world.follow_up(chat, **FAILED)
        world.follow_up()
        ran = run("list", "--status", "failed")
        heading, row = ran.stdout.splitlines()
        assert heading.split() == ["ID", "STATUS", "DUE", "CHAT", "REASON"]
        assert [str(follow_up), "failed", str(chat)] == [row.split()[index] for index in (0, 1, 4)]
        assert "rejected: HTTP 403 no" in row
        assert "\x1b" not in ran.stdout
        assert "--page 2" in run("list", "--limit", 1).stderr

    def test_nothing_found_is_no_failure(self, run: Run) -> None:
        """An empty list is said on stderr, and is [] in JSON."""
        assert (run("list").code, run("list").stdout) == (0, "")
        assert run("list").stderr == "There is no such follow-up.\n"
        assert run("list", "--json").document == []
        assert run("list", "--workspace", "nobody").code == 1


class TestShow:
    """`followups show`."""

    def test_it_tells_everything_but_the_text(self, run: Run, world: World) -> None:
        """The JSON form adds to the API's fields why it stands where it stands, and each failed attempt."""
        follow_up = world.follow_up(world.chat(channel="whatsapp", external_id="4917"), **FAILED, attempts=2)
        world.sql(
            "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail, status_code, duration)"
            " VALUES (:id, 1, 'retry', 'HTTP 500 down', 500, '20 ms'), (:id, 2, 'lost', 'lost', NULL, NULL)",
            id=follow_up,
        )
        shown = run("show", follow_up, "--json").document
        assert list(shown)[: len(FIELDS)] == FIELDS
        assert (shown["message"], shown["channel"], shown["externalChatId"]) == (None, "whatsapp", "4917")
        assert shown["explanation"].startswith("The transport refused it for good")
        first, second = shown["failedAttempts"]
        assert first.pop("at") <= second.pop("at")
        assert first == {
            "attempt": 1,
            "outcome": "retry",
            "detail": "HTTP 500 down",
            "statusCode": 500,
            "durationMs": 20.0,
        }
        assert (second["statusCode"], second["durationMs"]) == (None, None)
        assert run("show", follow_up, "--json", "--message").document["message"] == "Still there?"

    def test_it_is_readable(self, run: Run, world: World) -> None:
        """For people: facts, the explanation, and a table of failed attempts; the text only with --message."""
        follow_up = world.follow_up(
            status="sent",
            finished_at=datetime(2030, 1, 31, tzinfo=UTC),
            accepted_at=datetime(2030, 1, 31, tzinfo=UTC),
            due_date=datetime(2030, 1, 30, 23, 59, 59, 998_000, UTC),
            attempts=2,
        )
        world.sql(
            "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail, status_code, duration)"
            " VALUES (:id, 1, 'retry', 'HTTP 500 [down]', 500, '20 ms')",
            id=follow_up,
        )
        shown = run("show", follow_up).stdout
        assert re.search(r"^lag +2 ms *$", shown, re.MULTILINE)
        assert re.search(r"^attempts +2 of 8 *$", shown, re.MULTILINE)
        assert "The transport accepted it 2 ms after its due date, with attempt 2" in shown
        assert "HTTP 500 [down]" in shown
        assert "Still there?" not in shown
        assert "Still there?" in run("show", follow_up, "--message").stdout

    def test_one_that_is_not_there_is_an_error(self, run: Run) -> None:
        """An unknown id fails with a sentence."""
        ran = run("show", uuid4())
        assert (ran.code, ran.stdout) == (1, "")
        assert ran.stderr == "followups: The follow-up was not found; followups list shows which there are.\n"


class TestCancel:
    """`followups cancel`."""

    def test_the_reason_is_stored_as_given(self, run: Run, world: World) -> None:
        """A pending follow-up is cancelled for the reason given; repeating it changes nothing."""
        follow_up = world.follow_up(due=HOUR)
        ran = run("cancel", follow_up, "--reason", "the customer called")
        assert (ran.code, ran.stdout) == (0, f"{follow_up} is cancelled: the customer called\n")
        row = world.row(follow_up)
        assert (row.status, row.reason) == ("cancelled", "the customer called")
        assert run("cancel", follow_up, "--reason", "the customer called").code == 0
        assert world.row(follow_up) == row

    def test_without_a_reason_the_code_stands_for_it(self, run: Run, world: World) -> None:
        """Without a reason it is cancelled_by_api, as in the API."""
        cancelled = run("cancel", world.follow_up(due=HOUR), "--json").document
        assert list(cancelled) == FIELDS
        assert (cancelled["status"], cancelled["reason"]) == ("cancelled", "cancelled_by_api")

    def test_what_cannot_be_cancelled_stays_as_it_is(self, run: Run, world: World) -> None:
        """A finished one, and one that is being delivered, stay as they are; the error says why."""
        failed = world.follow_up(**FAILED)
        later = datetime.now(UTC) + HOUR
        in_flight = world.follow_up(begun_at=later, lease_until=later)
        for follow_up, said in ((failed, "has already finished"), (in_flight, "is being delivered at this moment")):
            before = world.row(follow_up)
            ran = run("cancel", follow_up)
            assert (ran.code, ran.stdout) == (1, "")
            assert said in ran.stderr
            assert world.row(follow_up) == before

    def test_an_unfit_reason_is_wrong_usage(self, run: Run, world: World) -> None:
        """An empty reason is wrong usage, and nothing changes."""
        follow_up = world.follow_up(due=HOUR)
        assert run("cancel", follow_up, "--reason", "").code == 2
        assert world.row(follow_up).status == "pending"


class TestReschedule:
    """`followups reschedule`."""

    def test_a_moment(self, run: Run, world: World, nudges: list[datetime]) -> None:
        """A due date with an offset is taken as it is."""
        follow_up = world.follow_up(due=HOUR)
        due = datetime(2031, 1, 31, 9, tzinfo=UTC)
        ran = run("reschedule", follow_up, "--due", "2031-01-31T10:00:00+01:00")
        assert (ran.code, ran.stdout) == (0, f"{follow_up} is due 2031-01-31 09:00:00Z\n")
        assert world.row(follow_up).due_date == due
        assert nudges == [due]

    @pytest.mark.parametrize(("text", "seconds"), [("now", 0), ("+10m", 600)])
    def test_so_long_after_now(self, run: Run, world: World, text: str, seconds: int) -> None:
        """Now, and a time after now, count from the database's clock."""
        follow_up = world.follow_up(due=HOUR)
        before = world.scalar("SELECT now()")
        assert list(run("reschedule", follow_up, "--due", text, "--json").document) == FIELDS
        after = world.scalar("SELECT now()")
        assert before <= world.row(follow_up).due_date - timedelta(seconds=seconds) <= after

    def test_outside_the_window_is_refused(self, run: Run, world: World) -> None:
        """A due date outside the channel's messaging window is refused, with what to do."""
        chat = world.chat(channel="whatsapp", last_user_message_at=datetime.now(UTC))
        ran = run("reschedule", world.follow_up(chat, HOUR), "--due", "+25h")
        assert ran.code == 1
        assert "the user has to write in the chat first, or the due date has to be earlier" in ran.stderr


class TestRetry:
    """`followups retry`."""

    def test_a_new_one_is_made(self, run: Run, world: World, nudges: list[datetime]) -> None:
        """A failed follow-up stays as it is; a new one of the same message and chat is due now, and its id printed."""
        failed = world.follow_up(**FAILED, message="Hello")
        before = world.row(failed)
        ran = run("retry", failed)
        new = world.row(UUID(ran.stdout.strip()))
        assert (new.status, new.message, new.chat_id) == ("pending", "Hello", before.chat_id)
        assert f"{failed} stays failed" in ran.stderr
        assert world.row(failed) == before
        assert nudges == [new.due_date]

    def test_later(self, run: Run, world: World) -> None:
        """The new one can be due later."""
        new = run("retry", world.follow_up(**FAILED), "--due", "+1h", "--json").document
        assert list(new) == FIELDS
        assert new["createdAt"] < new["dueDate"]

    def test_only_a_failed_one(self, run: Run, world: World) -> None:
        """What has not failed is not retried, nor what the user has answered meanwhile."""
        assert "this one is pending" in run("retry", world.follow_up(due=HOUR)).stderr
        answered = world.follow_up(world.chat(last_message_role="user"), **FAILED)
        ran = run("retry", answered)
        assert (ran.code, ran.stdout) == (1, "")
        assert "an agent or operator has to write in it first" in ran.stderr


def _reschedule_in_a_process(follow_up: UUID) -> None:
    # The worker's module reads its settings once in a process, and this process has many.
    command = [sys.executable, "-m", "followups.cli", "reschedule", str(follow_up), "--due", "now"]
    subprocess.run(command, check=True, capture_output=True, env=dict(os.environ), timeout=30)


def test_what_is_due_soon_asks_for_a_tick(environment: pytest.MonkeyPatch, world: World, broker_url: str) -> None:
    """After a change that is due before the next tick one is asked for; a broker that is away is no failure."""
    follow_up = world.follow_up(due=HOUR)
    _reschedule_in_a_process(follow_up)
    with redis.Redis.from_url(broker_url) as broker:
        assert broker.llen("followups:dispatch") == 1
    environment.setenv("FOLLOWUPS_BROKER_URL", "redis://127.0.0.1:9/0")
    _reschedule_in_a_process(follow_up)


@pytest.mark.usefixtures("environment")
def test_what_is_due_later_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is due after the next tick is left to it."""
    asked: list[str] = []
    monkeypatch.setattr(nudging, "_send", lambda: asked.append("tick"))
    now = datetime.now(UTC)
    nudging.nudge_if_soon(now + HOUR, now)
    assert asked == []
    nudging.nudge_if_soon(now - HOUR, now)
    assert asked == ["tick"]
