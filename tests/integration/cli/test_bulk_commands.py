"""Tests of the bulk forms of `cancel` and `retry`, and of the filters of `list`."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from followups import scheduling
from followups.cli import connection
from followups.errors import AlreadyRetriedError
from followups.operations import bulk
from followups.store import bulk_cancel, quotas
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from world import World

    RunCommand = Callable[..., Any]

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def _no_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevent the command from requesting a tick."""
    monkeypatch.setattr(connection, "ask_for_tick", lambda: None)


def failed(world: World, reason: str = "rejected: HTTP 403", ago: timedelta = HOUR, chat: UUID | None = None) -> UUID:
    """Insert a follow-up that failed ``ago`` before now."""
    ended = datetime.now(UTC) - ago
    return world.follow_up(chat, -DAY, status="failed", reason=reason, finished_at=ended, message="Hello")


def copies(world: World, original: UUID) -> list[Any]:
    """Return the retries of a follow-up."""
    with world.engine.connect() as connection:
        query = text("SELECT * FROM follow_ups WHERE retry_of = :id")
        return list(connection.execute(query, {"id": original}))


class TestCancel:
    """The commands `followups cancel --chat` and `--workspace`."""

    def test_a_dry_run_changes_nothing(self, run: RunCommand, world: World) -> None:
        """A dry run of a bulk cancel prints the count and a sample, and changes nothing."""
        chat = world.chat()
        ids = [world.follow_up(chat, HOUR * n) for n in range(1, 8)]
        world.follow_up(due=HOUR)
        ran = run("cancel", "--chat", chat, "--dry-run")
        assert ran.code == 0
        assert ran.stdout.splitlines()[0] == "7 follow-ups to cancel:"
        assert str(ids[0]) in ran.stdout
        assert "and 2 more" in ran.stdout
        document = run("cancel", "--chat", chat, "--dry-run", "--json").document
        assert (document["matched"], document["cancelled"], len(document["sample"])) == (7, 0, 5)
        assert {row.status for row in world.rows()} == {"pending"}

    def test_one_chat(self, run: RunCommand, world: World) -> None:
        """With --chat, a bulk cancel affects only that chat's pending follow-ups and stores the reason."""
        chat = world.chat()
        ids = [world.follow_up(chat, HOUR * n) for n in range(1, 4)]
        other, ended = world.follow_up(due=HOUR), failed(world, chat=chat)
        ran = run("cancel", "--chat", chat, "--reason", "wrong campaign", "--yes")
        assert (ran.code, ran.stdout) == (0, "3 of 3 follow-ups cancelled\n")
        assert [(world.row(one).status, world.row(one).reason) for one in ids] == [("cancelled", "wrong campaign")] * 3
        assert (world.row(other).status, world.row(ended).status) == ("pending", "failed")

    def test_a_workspace_in_batches(self, run: RunCommand, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bulk cancel of a workspace runs in batches and does not affect other workspaces.

        A second run of the bulk cancel finds no follow-up.
        """
        monkeypatch.setattr(bulk_cancel, "BATCH", 7)
        ids = world.burst([HOUR] * 40)
        others = type(world)(world.engine)
        kept = others.follow_up(due=HOUR)
        ran = run("cancel", "--workspace", world.workspace_id, "--yes", "--json")
        assert ran.document == {"dryRun": False, "matched": 40, "cancelled": 40, "inFlight": 0, "interrupted": False}
        assert {row.status for row in world.rows(*ids)} == {"cancelled"}
        assert world.row(ids[0]).reason == "cancelled_by_api"
        assert world.row(kept).status == "pending"
        assert run("cancel", "--workspace", world.workspace_id, "--yes", "--json").document["matched"] == 0

    def test_in_flight_follow_ups_are_only_not_retried(self, run: RunCommand, world: World) -> None:
        """A bulk cancel does not end a follow-up in flight, but prevents its retry."""
        later = datetime.now(UTC) + HOUR
        in_flight = world.follow_up(begun_at=later, lease_until=later)
        waiting = world.follow_up(world.row(in_flight).chat_id, HOUR, waits_for=in_flight)
        ran = run("cancel", "--workspace", world.workspace_id, "--reason", "stop", "--yes")
        assert ran.stdout == "1 of 2 follow-ups cancelled; 1 in flight\n"
        row = world.row(in_flight)
        assert (row.status, row.cancel_requested, row.begun_at) == ("pending", "stop", later)
        assert world.row(waiting).status == "cancelled"

    def test_locked_rows_are_skipped_and_counted(
        self, run: RunCommand, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A bulk cancel skips and counts a row that stays locked by another transaction.

        All follow-ups whose rows are not locked are cancelled.
        """
        monkeypatch.setattr(bulk, "PAUSE", 0.01)
        held, free = world.follow_up(due=HOUR), world.follow_up(due=HOUR)
        with world.engine.connect() as other:
            other.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": held})
            ran = run("cancel", "--workspace", world.workspace_id, "--yes")
        assert ran.stdout == "1 of 2 follow-ups cancelled; 1 held by others\n"
        assert (world.row(held).status, world.row(free).status) == ("pending", "cancelled")

    def test_without_a_terminal_yes_is_required(self, run: RunCommand, world: World) -> None:
        """Without a terminal, a bulk cancel without --yes is a usage error."""
        follow_up = world.follow_up(due=HOUR)
        ran = run("cancel", "--workspace", world.workspace_id)
        assert (ran.code, ran.stdout) == (2, "")
        assert "confirm with --yes" in ran.stderr
        assert world.row(follow_up).status == "pending"

    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            (uuid4(), "--chat", uuid4()),
            ("--chat", uuid4(), "--yes"),
            ("--chat", "no-uuid", "--yes"),
            ("--workspace", "nobody", "--yes"),
            ("--workspace", "nobody", "--reason", "", "--yes"),
            (uuid4(), "--dry-run"),
        ],
    )
    def test_wrong_choices(self, run: RunCommand, arguments: tuple[object, ...]) -> None:
        """If the selection for a bulk cancel is invalid or empty, the command prints a one-sentence error."""
        ran = run("cancel", *arguments)
        assert (ran.code, ran.stdout) == (2, "")
        assert ran.stderr.startswith("followups: ")
        assert ran.stderr.count("\n") == 1


class TestRetry:
    """Tests for the command `followups retry --failed --since`."""

    def test_all_that_failed_since(self, run: RunCommand, world: World) -> None:
        """Each follow-up that has failed since the given time is retried now.

        Follow-ups that failed earlier are not retried.
        """
        ids = [failed(world) for _ in range(3)]
        early = failed(world, ago=3 * HOUR)
        ran = run("retry", "--failed", "--since", "2h", "--yes")
        assert (ran.code, ran.stdout) == (0, "3 of 3 follow-ups retried\n")
        for one in ids:
            [new] = copies(world, one)
            assert (new.status, new.message, new.chat_id) == ("pending", "Hello", world.row(one).chat_id)
            assert world.row(one).status == "failed"
        assert copies(world, early) == []

    def test_none_is_retried_twice(self, run: RunCommand, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """Running a bulk retry again completes an interrupted run and retries no follow-up twice."""
        monkeypatch.setattr(bulk, "RETRIES", 2)
        ids = [failed(world) for _ in range(5)]
        real, calls = scheduling.retry_once, iter(range(100))

        def interrupted(session: Session, one: UUID) -> Any:
            if next(calls) == 3:
                raise KeyboardInterrupt
            return real(session, one)

        monkeypatch.setattr(bulk.scheduling, "retry_once", interrupted)
        broken_off = run("retry", "--failed", "--since", "2h", "--yes")
        assert (broken_off.code, broken_off.stdout) == (1, "3 of 5 follow-ups retried\n")
        assert "run the command again to continue" in broken_off.stderr
        assert sum(len(copies(world, one)) for one in ids) == 3
        monkeypatch.setattr(bulk.scheduling, "retry_once", real)
        assert run("retry", "--failed", "--since", "2h", "--yes").stdout == "2 of 2 follow-ups retried\n"
        assert run("retry", "--failed", "--since", "2h", "--yes").stdout == "0 of 0 follow-ups retried\n"
        assert [len(copies(world, one)) for one in ids] == [1] * 5

    def test_filters(self, run: RunCommand, world: World) -> None:
        """A bulk retry with filters retries only failures in the given workspace with the given reason codes."""
        wanted, other = failed(world, "retries_exhausted: HTTP 500"), failed(world, "too_late")
        others = type(world)(world.engine)
        theirs = failed(others, "retries_exhausted")
        arguments = ["--since", "2h", "--workspace", world.workspace_id, "--reason", "retries_exhausted", "--yes"]
        assert run("retry", "--failed", *arguments).stdout == "1 of 1 follow-up retried\n"
        assert [len(copies(world, one)) for one in (wanted, other, theirs)] == [1, 0, 0]

    def test_rejected_retries_are_counted(self, run: RunCommand, world: World) -> None:
        """A bulk retry skips follow-ups that the rules reject, and counts them by reason."""
        failed(world)
        failed(world, chat=world.chat(last_message_role="user"))
        failed(world, chat=world.chat(channel="whatsapp", last_user_message_at=datetime.now(UTC) - 2 * DAY))
        failed(world, chat=world.chat(removed_at=datetime.now(UTC)))
        failed(world, chat=world.full_chat())
        found = run("retry", "--failed", "--since", "2h", "--yes", "--json").document
        counts = {"retried": 1, "answeredMeanwhile": 1, "outsideMessagingWindow": 1, "chatRemoved": 1}
        counts |= {"tooManyPending": 1}
        assert found == {"dryRun": False, "matched": 5, "interrupted": False} | counts

    def test_retries_over_the_quota_are_counted(self, run: RunCommand, world: World) -> None:
        """If the quota rejects some retries, a bulk retry counts the rejected ones and continues."""
        with world.engine.begin() as opened:
            quotas.put(opened, world.workspace_id, quotas.Kind.PENDING, 2)
        for _ in range(5):
            failed(world)
        found = run("retry", "--failed", "--since", "2h", "--yes", "--json").document
        assert (found["retried"], found["quotaExceeded"]) == (2, 3)

    def test_a_pruned_follow_up_is_counted(
        self, run: RunCommand, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A bulk retry skips and counts a follow-up that was pruned after it was found."""
        gone = failed(world)
        failed(world)
        real = scheduling.retry_once

        def retry_once(session: Session, one: UUID) -> Any:
            return real(session, uuid4() if one == gone else one)

        monkeypatch.setattr(bulk.scheduling, "retry_once", retry_once)
        found = run("retry", "--failed", "--since", "2h", "--yes", "--json").document
        assert (found["retried"], found["notFound"]) == (1, 1)

    def test_a_follow_up_retried_by_id_is_skipped(self, run: RunCommand, world: World) -> None:
        """A bulk retry skips a follow-up that an operator has already retried by its id.

        If a bulk retry has skipped a follow-up, an operator can still retry it by its id.
        """
        original = failed(world)
        assert run("retry", original).code == 0
        assert run("retry", "--failed", "--since", "2h", "--yes", "--json").document["matched"] == 0
        with Session(world.engine) as session, pytest.raises(AlreadyRetriedError):
            scheduling.retry_once(session, original)
        assert run("retry", original).code == 0
        assert world.scalar("SELECT count(*) FROM follow_ups WHERE status = 'pending'") == 2

    def test_a_dry_run_changes_nothing(self, run: RunCommand, world: World) -> None:
        """A dry run of a bulk retry prints the count and a sample."""
        original = failed(world)
        ran = run("retry", "--failed", "--since", "2h", "--dry-run")
        assert ran.stdout.splitlines() == ["1 follow-up to retry:", f"  {original}"]
        assert copies(world, original) == []

    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            ("--failed",),
            ("--failed", "--since", "yesterday"),
            ("--failed", "--since", "2030-01-31T09:00:00"),
            ("--failed", "--since", "2h", "--due", "now"),
            ("--failed", "--since", "2h", "--reason", "nonsense"),
            ("--failed", "--since", "2h", "--workspace", "nobody"),
            (uuid4(), "--since", "2h"),
        ],
    )
    def test_wrong_choices(self, run: RunCommand, arguments: tuple[object, ...]) -> None:
        """An invalid or empty selection for a bulk retry is a usage error."""
        ran = run("retry", *arguments)
        assert (ran.code, ran.stdout) == (2, "")
        assert ran.stderr.startswith("followups: ")
        assert ran.stderr.count("\n") == 1


def test_list_by_reason_and_due_date(run: RunCommand, world: World) -> None:
    """`list` filters by reason code and due date, in combination with the other filters."""
    exhausted, rejected = failed(world, "retries_exhausted: HTTP 500"), failed(world)
    soon, later = world.follow_up(due=HOUR), world.follow_up(due=2 * DAY)

    def listed(*arguments: object) -> set[UUID]:
        return {UUID(entry["id"]) for entry in run("list", "--json", *arguments).document}

    tomorrow = (datetime.now(UTC) + DAY).isoformat()
    now = datetime.now(UTC).isoformat()
    assert listed("--reason", "retries_exhausted") == {exhausted}
    assert listed("--reason", "retries_exhausted", "--reason", "rejected") == {exhausted, rejected}
    assert listed("--due-after", tomorrow) == {later}
    assert listed("--due-after", now, "--due-before", tomorrow) == {soon}
    assert listed("--status", "pending", "--workspace", world.workspace_id, "--due-before", tomorrow) == {soon}
    for wrong in (("--reason", "nonsense"), ("--due-after", "soon"), ("--status", "lost"), ("--limit", "0")):
        assert run("list", *wrong).code == 2


def test_killed_during_a_bulk_cancel(environment: pytest.MonkeyPatch, world: World) -> None:
    """If a bulk cancel is killed, a second run completes it, and no follow-up is half cancelled."""
    del environment
    with world.engine.begin() as connection:
        connection.execute(
            text("""
                WITH c AS (
                    INSERT INTO chats (workspace_id, id) SELECT :w, gen_random_uuid() FROM generate_series(1, 30000)
                    RETURNING id)
                INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id)
                SELECT :w, id, 'x', now() + interval '1 day', gen_random_uuid() FROM c
            """),
            {"w": world.workspace_id},
        )
    command = [sys.executable, "-m", "followups.cli", "cancel", "--workspace", str(world.workspace_id), "--yes"]
    with subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.PIPE) as running:
        cancelled = "SELECT count(*) FROM follow_ups WHERE status = 'cancelled'"
        wait_until(lambda: world.scalar(cancelled) > 0)
        running.send_signal(signal.SIGKILL)
    assert 0 < world.scalar(cancelled) <= 30_000
    again = subprocess.run([*command, "--json"], env=dict(os.environ), capture_output=True, check=True, timeout=120)
    document = json.loads(again.stdout)
    assert document["cancelled"] == document["matched"]
    assert world.scalar(cancelled) == 30_000


def typed(command: list[str], answer: bytes) -> tuple[int, str]:
    """Run a command on a terminal and answer its prompt; return exit code and output."""
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "followups.cli", *command]
    with subprocess.Popen(argv, env=dict(os.environ), stdin=theirs, stdout=theirs, stderr=theirs) as running:
        os.close(theirs)
        shown, answered = b"", False
        with suppress(OSError):  # the command has already closed its end of the terminal
            while True:
                shown += os.read(ours, 4096)
                if b"[y/N]" in shown and not answered:
                    os.write(ours, answer)
                    answered = True
        os.close(ours)
    return running.returncode, shown.decode()


def test_confirmation_on_a_terminal(environment: pytest.MonkeyPatch, world: World) -> None:
    """On a terminal, a bulk command shows the number of follow-ups and asks for confirmation.

    If the operator answers "no", nothing changes. If the operator answers "yes", the command runs.
    """
    del environment
    follow_up = world.follow_up(due=HOUR)
    command = ["cancel", "--workspace", str(world.workspace_id)]
    code, shown = typed(command, b"n\n")
    assert code == 1
    for said in ("1 follow-up to cancel:", str(follow_up), "Cancel 1 follow-up? [y/N]", "Nothing has changed."):
        assert said in shown
    assert world.row(follow_up).status == "pending"
    code, shown = typed(command, b"y\n")
    assert code == 0
    assert "1 of 1 follow-up cancelled" in shown
    assert world.row(follow_up).status == "cancelled"
