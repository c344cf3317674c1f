"""The commands `stats` and `doctor`."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from rich.console import Console

from followups.cli import stats
from followups.operations.doctor import broker_checks, database_checks
from followups.store import counts as store

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from followups.settings import Settings
    from stack import Stack
    from world import World

    RunCommand = Callable[..., Any]

MINUTE = timedelta(minutes=1)
WINDOW = 100
SENT = """
    INSERT INTO follow_ups
           (workspace_id, chat_id, message, due_date, trigger_chat_message_id, status, finished_at, accepted_at)
    SELECT :workspace, :chat, 'x', now() - n * interval '1 ms', gen_random_uuid(), 'sent', now(), now()
      FROM generate_series(1, :number) AS n
"""
SIGNED = {"FOLLOWUPS_TRANSPORT_SECRET": "whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0"}


def fill(world: World) -> None:
    """Insert two overdue follow-ups (one in flight), one waiting, one due later, one failed and 100 sent.

    The 100 sent follow-ups were 1 to 100 ms late.
    """
    overdue = world.follow_up(due=-MINUTE)
    world.follow_up(due=-MINUTE, waits_for=overdue)
    later = datetime.now(UTC) + MINUTE
    world.follow_up(begun_at=later, lease_until=later)
    world.follow_up(due=MINUTE)
    world.follow_up(status="failed", reason="too_late", finished_at=later)
    chat = world.chat()
    world.sql(SENT, workspace=world.workspace_id, chat=chat, number=100)


class TestStats:
    """The command `followups stats`."""

    def test_counts_are_exact(self, run: RunCommand, world: World) -> None:
        """`stats` counts pending, waiting, overdue, in-flight and final follow-ups exactly.

        `stats` also shows the age of the oldest overdue follow-up.
        """
        fill(world)
        found = run("stats", "--json").document
        counts = {name: found[name] for name in ("pending", "waiting", "overdue", "inFlight", "sent", "failed")}
        assert counts == {"pending": 4, "waiting": 1, "overdue": 2, "inFlight": 1, "sent": 100, "failed": 1}
        assert found["cancelled"] == 0
        assert found["estimated"] == []
        assert 60 <= found["oldestOverdueSeconds"] < 120

    def test_lag_and_throughput(self, run: RunCommand, world: World) -> None:
        """`stats` shows lag percentiles by nearest rank, and throughput per minute, for the chosen period."""
        fill(world)
        found = run("stats", "--minutes", 10, "--json").document
        assert found["lagMs"] == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
        assert (found["windowMinutes"], found["sentInWindow"], found["sentPerMinute"]) == (10, 100, 10)
        world.sql("UPDATE follow_ups SET accepted_at = now() - interval '11 min' WHERE status = 'sent'")
        nothing = run("stats", "--minutes", 10, "--json").document
        assert (nothing["sentInWindow"], nothing["lagMs"]["p99"]) == (0, None)

    def test_text_output(self, run: RunCommand, world: World) -> None:
        """Without --json, `stats` prints one line per number, without colour in a pipe."""
        assert "pending         0" in run("stats").stdout
        fill(world)
        shown = run("stats").stdout
        assert "the oldest for 1 min" in shown
        assert "1 behind an earlier one of their chat" in shown
        assert "100 sent in the last 5 min" in shown
        assert "\x1b" not in shown

    def test_a_state_with_many_rows_is_estimated(self, run: RunCommand, world: World, engine: Engine) -> None:
        """If a final state has many rows, `stats` estimates their number; other counts are exact."""
        fill(world)
        with engine.begin() as connection:
            unknown = store.count(connection, window=WINDOW, exact_up_to=10)
        # the counts are lower bounds, because the table was never analysed
        assert unknown.final == {"sent": 11, "failed": 1, "cancelled": 0}
        world.sql("ANALYZE follow_ups")
        with engine.begin() as connection:
            counts = store.count(connection, window=WINDOW, exact_up_to=10)
        assert counts.estimated == {"sent"}
        assert (counts.pending, counts.final["failed"]) == (4, 1)
        assert abs(counts.final["sent"] - 100) <= 1
        assert run("stats", "--json").document["estimated"] == []

    def test_lag_is_omitted_when_it_takes_too_long(self, world: World, engine: Engine) -> None:
        """If reading the sent rows takes too long, `stats` shows everything except the lag."""
        fill(world)
        world.sql(SENT, workspace=world.workspace_id, chat=world.chat(), number=20_000)
        with engine.begin() as connection:
            assert store.pace(connection, MINUTE, timedelta(milliseconds=1)) is None
            assert store.pace(connection, MINUTE) is not None

    def test_held_follow_ups_are_counted_separately(self, run: RunCommand, world: World) -> None:
        """`stats` counts follow-ups that are paused or outside sending hours separately, not as overdue."""
        later = datetime.now(UTC) + 60 * MINUTE
        world.follow_up(due=-MINUTE, pause_id=uuid4(), next_attempt_at=datetime(9998, 12, 31, tzinfo=UTC))
        world.follow_up(due=-MINUTE, held_until=later, next_attempt_at=later)
        found = run("stats", "--json").document
        counts = {name: found[name] for name in ("pending", "paused", "heldForHours", "overdue")}
        assert counts == {"pending": 2, "paused": 1, "heldForHours": 1, "overdue": 0}
        shown = run("stats").stdout
        assert "due, and held: followups pause --list" in shown
        assert "due, and held until the sending hours" in shown

    def test_watching_in_a_pipe_prints_one_line_per_sample(self, environment: pytest.MonkeyPatch, world: World) -> None:
        """In a pipe, `stats --watch` prints a line or JSON object per sample until Ctrl-C."""
        del environment
        fill(world)
        command = [sys.executable, "-m", "followups.cli", "stats", "--watch", "--interval", "0.2", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ), text=True) as watching:
            assert watching.stdout
            looks = [json.loads(watching.stdout.readline()) for _ in range(2)]
            watching.send_signal(signal.SIGINT)
        assert watching.returncode == 0
        assert [look["pending"] for look in looks] == [4, 4]
        assert looks[0]["at"] < looks[1]["at"]


def test_the_dashboard(running: Stack) -> None:
    """On a terminal, `stats --watch` keeps showing counts, sends, attempts, workers and ticks until Ctrl-C."""
    world = type(running.world)(running.world.engine)
    limited = world.chat()
    running.behave(limited, kind="reject", status=403, times=1)
    ids = [*world.burst([timedelta(0)] * 30), world.follow_up(limited)]
    running.wait_until_done(*ids)
    pause = uuid4()
    world.sql("INSERT INTO pauses (id, workspace_id) VALUES (:id, :w)", id=pause, w=world.workspace_id)
    world.follow_up(pause_id=pause, next_attempt_at=datetime(9998, 12, 31, tzinfo=UTC))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 130, 0, 0))
    command = [sys.executable, "-m", "followups.cli", "stats", "--watch", "--interval", "0.3"]
    environment = os.environ | running.environment() | {"TERM": "xterm"}
    shown, told = "", False
    with subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as watching:
        os.close(theirs)
        with suppress(OSError):  # the command has already closed its end of the terminal
            while True:
                shown += os.read(ours, 65536).decode(errors="replace")
                if "1 answered" in shown and not told:
                    watching.send_signal(signal.SIGINT)
                    told = True
        os.close(ours)
    assert watching.returncode == 0
    world.sql("DELETE FROM pauses WHERE id = :id", id=pause)
    for said in ("pending", "paused", "followups pause --list", "last tick", "ms ago", "rejected", "sent a second"):
        assert said in shown
    assert "█" in shown
    assert "Still there?" not in shown


def test_attempts_since_the_first_sample() -> None:
    """The attempt count starts at the first sample; the rate is computed from the last two samples."""
    attempts = stats.Attempts()
    attempts.see({"sent": 100, "retry": 3}, 10.0)
    attempts.see({"sent": 110, "retry": 3, "rejected": 1}, 12.0)
    attempts.see({"sent": 130, "retry": 3, "rejected": 1}, 16.0)
    assert attempts.rates == {"sent": 5.0, "retry": 0.0, "rejected": 0.0}
    rendered = Console(width=80, file=io.StringIO(), record=True)
    rendered.print(attempts.table())
    lines = [line.split() for line in rendered.export_text().splitlines()]
    assert lines[1:] == [["rejected", "1", "0.0"], ["retry", "0", "0.0"], ["sent", "30", "5.0"]]


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run doctor in a new process, because settings are read only once, at import."""
    command = [sys.executable, "-m", "followups.cli", "doctor", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment, timeout=120
    )


class TestDoctor:
    """The command `followups doctor`."""

    @pytest.mark.xdist_group("running")
    def test_a_running_system_passes(self, running: Stack) -> None:
        """On a running system, every check of doctor passes, and no secret is shown."""
        ran = doctor("--json", **running.environment(), **SIGNED)
        report = json.loads(ran.stdout)
        assert [check["name"] for check in report["checks"] if not check["ok"]] == []
        assert (ran.returncode, report["ok"]) == (0, True)
        names = ["timeouts", "database", "migrations", "ticks", "database connection", "backlog", "attempts", "pauses"]
        names += ["transactions", "clock", "broker", "broker memory", "broker permissions", "broker connection"]
        names += ["queues", "breaker", "transport", "workers", "processes"]
        assert [check["name"] for check in report["checks"]] == names
        assert [report["settings"][name] for name in SIGNED] == ["***"]
        assert "c2VjcmV0" not in ran.stdout

    @pytest.mark.usefixtures("environment")
    def test_missing_processes_are_named_with_advice(self, world: World) -> None:
        """If no worker, beat or receiver is running, `doctor` exits with 1 and gives advice."""
        world.sql("UPDATE dispatcher_state SET last_tick_at = now() - interval '1 hour'")
        ran = doctor()
        assert ran.returncode == 1
        assert [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("failed ")] == [
            "ticks",
            "transport",
            "workers",
        ]
        for said in ("the last tick ran 1 h ago", "honcho start beat worker", "3 of 19 checks failed."):
            assert said in ran.stdout

    def test_unreachable_servers(self, run: RunCommand, environment: pytest.MonkeyPatch) -> None:
        """If servers are unreachable, doctor names them without passwords and skips dependent checks."""
        environment.setenv("FOLLOWUPS_DATABASE_URL", "postgresql://me:hidden@127.0.0.1:9/chats")
        environment.setenv("FOLLOWUPS_BROKER_URL", "redis://:hidden@127.0.0.1:9/0")
        ran = run("doctor", "--json")
        assert ran.code == 1
        details = {check["name"]: check["detail"] for check in ran.document["checks"] if not check["ok"]}
        assert details["database"] == "'chats' at 127.0.0.1:9: connection refused"
        assert details["broker"].startswith("redis://:***@127.0.0.1:9/0: ConnectionError")
        assert details["workers"] == "not asked"
        assert "hidden" not in ran.stdout + ran.stderr

    def test_an_old_schema(self, settings: Settings, engine: Engine, world: World) -> None:
        """If the schema is old or missing, doctor's check fails and advises running `migrate`."""
        world.sql("UPDATE alembic_version SET version_num = '0001'")
        old = {finding.name: finding for finding in database_checks.databases(settings, engine)}["migrations"]
        assert old.detail.startswith("0001; the newest is ")
        world.sql("DELETE FROM alembic_version")
        database, none = database_checks.databases(settings, engine)
        assert database.ok
        assert (none.detail.partition(";")[0], none.advice) == ("none", "Run followups migrate.")

    @pytest.mark.parametrize(
        ("information", "advice"),
        [
            ({"redis_version": "6.0.16"}, "Use Redis 6.2 or newer, or Valkey."),
            ({"redis_version": "8.0", "maxmemory": 1, "maxmemory_policy": "allkeys-lru"}, "Set maxmemory-policy"),
            ({"redis_version": "8.0", "maxmemory": 0, "maxmemory_policy": "allkeys-lru"}, ""),
            ({"redis_version": "6.2.0", "maxmemory": 1, "maxmemory_policy": "noeviction"}, ""),
            ({"redis_version": "7.2.4", "valkey_version": "8.0"}, ""),
        ],
    )
    def test_brokers(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch, information: dict[str, Any], advice: str
    ) -> None:
        """A broker that is too old or may evict keys fails doctor's check."""
        monkeypatch.setattr(broker_checks.redis.Redis, "info", lambda _self: information)
        found = "".join(finding.advice for finding in broker_checks.broker(settings))
        assert found.startswith(advice)
        assert bool(found) == bool(advice)

    def test_wrong_settings_are_wrong_usage(self, run: RunCommand, environment: pytest.MonkeyPatch) -> None:
        """If settings are invalid, doctor names them, runs no check and exits with code 2."""
        environment.setenv("FOLLOWUPS_LEASE", "1")
        ran = run("doctor")
        assert (ran.code, ran.stdout) == (2, "")
        assert "FOLLOWUPS_LEASE should be at least" in ran.stderr
