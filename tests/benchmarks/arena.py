"""The shared environment of all benchmarks: one PostgreSQL, one Valkey, one receiver and the same rows."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil
import psycopg
import redis

from followups.embedded import EmbeddedPostgres, EmbeddedValkey, Processes, answers, free_port
from followups.schema import migrate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from followups.embedded import Child

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
PROCFILE = dict(line.split(": ", 1) for line in (HERE.parents[1] / "Procfile").read_text().splitlines() if ": " in line)
TABLE = """
    CREATE TABLE bench_rows (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(), due_date timestamptz NOT NULL, message text NOT NULL,
        status text NOT NULL DEFAULT 'pending', message_id uuid
    ) WITH (fillfactor = 85);
    CREATE INDEX ON bench_rows (due_date) WHERE status = 'pending';
"""
FAR = "now() + interval '30 days'"


class Arena:
    """The servers and the receiver, and the processes of one contestant at a time."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start the servers and the receiver."""
        self.postgres = self._stack.enter_context(EmbeddedPostgres())
        self.valkey = self._stack.enter_context(EmbeddedValkey())
        self.database = self.postgres.url()
        self.broker = self.valkey.url()
        migrate(self.database)
        self.connection = self._stack.enter_context(psycopg.connect(self.database, autocommit=True))
        self.sql(TABLE)
        self.workspace = self.sql("INSERT INTO workspaces (name) VALUES ('bench') RETURNING id")[0][0]
        self.port = free_port()
        self._common = self._stack.enter_context(Processes())
        argv = [sys.executable, "-m", "followups.embedded.receiver", "--port", str(self.port)]
        self._common.spawn("receiver", argv, ready=answers(f"http://127.0.0.1:{self.port}/count"))
        self.processes = Processes()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all processes and servers."""
        self.processes.stop()
        self._stack.close()

    def sql(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Execute a statement; return its rows if there are any."""
        cursor = self.connection.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []

    def receiver(self, path: str) -> Any:
        """Send a request to the benchmark's receiver and return the JSON response."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.load(answer)

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which the service and its rivals find the servers."""
        url = f"http://127.0.0.1:{self.port}/messages"
        return {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(HERE),
            "PYTHONWARNINGS": "ignore",
            "BENCH_DATABASE": self.database,
            "BENCH_BROKER": self.broker,
            "BENCH_RECEIVER": url,
            "FOLLOWUPS_DATABASE_URL": self.database,
            "FOLLOWUPS_BROKER_URL": self.broker,
            "FOLLOWUPS_TRANSPORT_URL": url,
            "FOLLOWUPS_TRANSPORT": "http",
        }

    def spawn(self, name: str, command: str, ready: str = "", environment: Mapping[str, str] | None = None) -> Child:
        """Start a shell command; if ``ready`` is given, wait until the log contains this text."""
        log = self.processes.logs / f"{name}.log"
        check: Callable[[], bool] | None = (lambda: log.exists() and ready in log.read_text()) if ready else None
        argv: Sequence[str] = ["/bin/sh", "-c", f"exec {command}"]
        more = self.environment() | dict(environment or {})
        return self.processes.spawn(name, argv, environment=more, ready=check, within=timedelta(seconds=60))

    def clear(self) -> None:
        """Stop the contestant's processes and delete its data, except follow-ups due much later."""
        self.processes.stop()
        self.processes = Processes()  # a new set of processes, with separate logs
        self.sql("DELETE FROM failed_attempts")
        self.sql(f"DELETE FROM follow_ups WHERE due_date < {FAR} - interval '10 days'")  # noqa: S608 - no input
        self.sql("TRUNCATE bench_rows")
        self.sql("VACUUM (ANALYZE) follow_ups")
        with redis.Redis.from_url(self.broker) as broker:
            broker.flushall()
        self.receiver("/control")

    def memory_mb(self, child: Child) -> float:
        """Return the resident memory of a process and its children."""
        process = psutil.Process(child.pid)
        return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]) / 2**20

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds used so far by the contestant's processes and by the servers."""
        ours = [psutil.Process(child.pid) for child in self.processes.children]
        servers = [one for one in psutil.Process().children() if one.name() in {"postgres", "valkey-server"}]
        return {"cpu": _cpu_of(ours), "server_cpu": _cpu_of(servers)}

    def broker_mb(self) -> float:
        """Return the memory that the broker uses, in megabytes (2^20 bytes)."""
        with redis.Redis.from_url(self.broker) as broker:
            info: dict[str, Any] = broker.info("memory")  # type: ignore[assignment]
            return float(info["used_memory"]) / 2**20


def _cpu_of(processes: list[psutil.Process]) -> float:
    every = [one for process in processes for one in [process, *process.children(recursive=True)]]
    times = [one.cpu_times() for one in every]
    return sum(one.user + one.system for one in times)


def wait(true: Callable[[], object], within: float, every: float = 0.05) -> None:
    """Wait until the condition is true. Raises `TimeoutError`."""
    end = time.monotonic() + within
    while not true():
        if time.monotonic() > end:
            message = f"not so within {within:g} s"
            raise TimeoutError(message)
        time.sleep(every)
