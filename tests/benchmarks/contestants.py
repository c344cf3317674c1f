"""The contestants: each fills its table, starts its processes, and counts its sent rows."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arena import PROCFILE

if TYPE_CHECKING:
    from collections.abc import Callable

    from arena import Arena

    from followups.embedded import Child

CORES = os.cpu_count() or 1
CHATS = """
    WITH chat AS (
        INSERT INTO chats (workspace_id, id, last_message_id, last_message_role, last_message_at)
        SELECT '{workspace}', gen_random_uuid(), gen_random_uuid(), 'agent', now() FROM generate_series(1, {chats})
        RETURNING workspace_id, id, last_message_id
    )
    INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id)
    SELECT workspace_id, id, 'Are you still there?', {due}, last_message_id
      FROM chat CROSS JOIN generate_series(1, {each})
"""


@dataclass
class Contestant:
    """A contestant that keeps its rows in the same table as its rivals."""

    arena: Arena
    name: str = ""
    table: str = "bench_rows"
    waits_in_broker: bool = False
    """Whether follow-ups wait in the broker until they are due."""

    def fill(self, count: int, due: str) -> None:
        """Insert rows whose due time is given by an SQL expression."""
        self.arena.sql(
            "INSERT INTO bench_rows (due_date, message)"  # noqa: S608 - ours
            f" SELECT {due}, 'Are you still there?' FROM generate_series(1, {count})"
        )

    def start(self) -> None:
        """Start the contestant's processes, and wait until they are ready."""
        raise NotImplementedError

    def release(self) -> None:
        """Make all inserted rows due now."""
        self.arena.sql(f"UPDATE {self.table} SET due_date = now() WHERE status = 'pending'")  # noqa: S608 - ours

    def sent(self) -> int:
        """Return the number of rows with status sent."""
        return int(self.arena.sql(f"SELECT count(*) FROM {self.table} WHERE status = 'sent'")[0][0])  # noqa: S608

    def due(self) -> dict[str, float]:
        """Return the due time of each row, in seconds since 1970."""
        rows = self.arena.sql(f"SELECT id::text, extract(epoch FROM due_date)::float8 FROM {self.table}")  # noqa: S608
        return dict(rows)  # type: ignore[arg-type]

    def helper(self, *arguments: str) -> None:
        """Run a module of the competing system until it exits."""
        subprocess.run([sys.executable, "-m", *arguments], env=self.arena.environment(), check=True)


@dataclass
class Ours(Contestant):
    """The service itself, started by the Procfile's commands with one worker process per core."""

    name: str = "followups"
    table: str = "follow_ups"
    workers: int = CORES
    concurrency: int = 100
    """Simultaneous calls of one worker process. The values of these three settings are their defaults."""
    batch_size: int = 100
    max_in_flight: int = 5000
    started: tuple[Child, ...] = ()
    nudge: Callable[[], None] = lambda: None
    """Request a tick, as `followups.schedule` does for follow-ups that are due now."""

    def fill(self, count: int, due: str, each: int = 1) -> None:
        """Insert ``count`` rows, distributed so that every chat has ``each`` rows."""
        self.arena.sql(CHATS.format(workspace=self.arena.workspace, chats=count // each, each=each, due=due))

    def release(self) -> None:
        self.make_due()
        self.nudge()

    def make_due(self) -> None:
        """Make the backlog due without requesting a tick."""
        self.arena.sql(
            "UPDATE follow_ups SET due_date = now(), scheduled_at = now() WHERE due_date < now() + interval '10 days'"
        )

    def start(self) -> None:
        os.environ |= self.arena.environment()  # the Celery application reads its settings when it is imported
        from followups.worker.celery_app import ask_for_tick  # noqa: PLC0415

        self.nudge = ask_for_tick
        self.nudge()  # opens the connection to the broker
        self.start_processes()

    def start_processes(self) -> None:
        """Start beat and the workers, without loading the Celery application in this process."""
        self.arena.spawn("beat", PROCFILE["beat"])
        settings = {
            "FOLLOWUPS_CONCURRENCY": str(self.concurrency),
            "FOLLOWUPS_BATCH_SIZE": str(self.batch_size),
            "FOLLOWUPS_MAX_IN_FLIGHT": str(self.max_in_flight),
        }
        names = [f"worker{number}" for number in range(self.workers)]
        self.started = tuple(
            self.arena.spawn(name, PROCFILE["worker"], "ready.", settings | {"HONCHO_PROCESS_NAME": name})
            for name in names
        )


@dataclass
class OneWorker(Ours):
    """The service with only one worker process."""

    name: str = "followups, one worker process"
    workers: int = 1


@dataclass
class Tuned(Ours):
    """The service with the settings for throughput (deploy/SCALING.md)."""

    name: str = "followups, settings for throughput"
    concurrency: int = 400
    batch_size: int = 1000
    max_in_flight: int = 10_000


@dataclass
class CeleryRows(Contestant):
    """A Celery application with a task for each row."""

    name: str = "celery, a task per row"

    def start(self) -> None:
        self.arena.spawn("beat", "celery -A rivals.celery_rows beat --loglevel=warning -s $(mktemp -u)")
        self.arena.spawn("worker", f"celery -A rivals.celery_rows worker --loglevel=info -c {CORES}", "ready.")


@dataclass
class CeleryEta(Contestant):
    """A Celery application that uses ETAs and keeps its durable state only in Redis."""

    name: str = "celery, eta"
    waits_in_broker: bool = True

    def fill(self, count: int, due: str) -> None:
        super().fill(count, due)
        self.helper("rivals.celery_eta")

    def start(self) -> None:
        self.arena.spawn("worker", f"celery -A rivals.celery_eta worker --loglevel=info -c {CORES}", "ready.")


@dataclass
class DramatiqRows(Contestant):
    """A Dramatiq application that sends one message for each row."""

    name: str = "dramatiq, a message per row"

    def start(self) -> None:
        self.arena.spawn("poll", "python -m rivals.dramatiq_rows")
        self.arena.spawn(
            "worker", f"dramatiq rivals.dramatiq_rows --processes {CORES} --threads 8 -v", "ready for action"
        )


@dataclass
class ProcrastinateRows(Contestant):
    """A Procrastinate application that enqueues one job for each row."""

    name: str = "procrastinate, a job per row"
    waits_in_broker: bool = True
    has_schema: bool = False

    def fill(self, count: int, due: str) -> None:
        super().fill(count, due)
        if not self.arena.sql("SELECT to_regclass('procrastinate_jobs')")[0][0]:
            self.helper("rivals.procrastinate_rows", "schema")
        self.arena.sql("TRUNCATE procrastinate_jobs CASCADE")
        self.helper("rivals.procrastinate_rows", "publish")

    def release(self) -> None:
        self.arena.sql("UPDATE bench_rows SET due_date = now()")
        self.arena.sql("UPDATE procrastinate_jobs SET scheduled_at = now()")

    def start(self) -> None:
        self.arena.spawn("worker", "python -m rivals.procrastinate_rows work")


@dataclass
class AsyncioLoop(Contestant):
    """A bare asyncio loop without a broker: an upper limit for the benchmarks."""

    name: str = "raw asyncio loop"

    def start(self) -> None:
        self.arena.spawn("loop", "python -m rivals.asyncio_loop")


@dataclass
class ClientLoop(Contestant):
    """A bare asyncio loop with the service's HTTP client: an upper limit for the throughput."""

    name: str = "raw loop on our HTTP client"

    def start(self) -> None:
        self.arena.spawn("loop", "python -m rivals.client_loop")


LIMIT = AsyncioLoop.name
EVERYBODY: dict[str, type[Contestant]] = {
    "ours": Ours,
    "tuned": Tuned,
    "one": OneWorker,
    "loop": AsyncioLoop,
    "client": ClientLoop,
    "celery": CeleryRows,
    "dramatiq": DramatiqRows,
    "procrastinate": ProcrastinateRows,
    "eta": CeleryEta,
}
