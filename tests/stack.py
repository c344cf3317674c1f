"""Runs the system as in production: a sandbox chat, and workers and beats as separate processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from followups.embedded import Processes, answers, free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from followups.embedded import Child
    from followups.settings import Settings
    from world import World

COMMANDS = Path(__file__).with_name("bin")
"""A directory, first on PATH, with a `celery` command that starts quickly."""
CELERY = (sys.executable, str(COMMANDS / "celery"), "-A", "followups.worker")

PAGE = 5_000
"""Number of requests on one page of the chat server's list. While the chat server returns a page of its list, it
accepts no messages.
"""


def wait_until(true: Callable[[], Any], within: float = 20, every: float = 0.02) -> Any:
    """Call a function until it returns a true value, and return it; fail after ``within`` seconds."""
    end = time.monotonic() + within
    while not (answer := true()):
        assert time.monotonic() < end, f"not so within {within} s"
        time.sleep(every)
    return answer


@dataclass
class Stack:
    """The running processes, and the requests that the chat has received."""

    settings: Settings
    world: World
    processes: Processes
    sandbox_port: int = field(default_factory=free_port)
    options: dict[str, str] = field(default_factory=dict)
    """Settings that differ from the defaults, keyed by their environment variables."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables for the system's processes."""
        return (
            self.settings.environment()
            | {"FOLLOWUPS_TRANSPORT_URL": f"http://127.0.0.1:{self.sandbox_port}/messages"}
            | {"FOLLOWUPS_RUNTIME_DIR": str(self.processes.logs / "signs")}  # separate from other tests' processes
            | self.options
        )

    def sandbox(self, *arguments: str) -> Child:
        """Start the sandbox chat server, which receives the messages."""
        argv = [sys.executable, "-m", "followups.transports.sandbox.server", "--port", str(self.sandbox_port)]
        return self.processes.spawn(
            "sandbox", [*argv, *arguments], ready=answers(f"http://127.0.0.1:{self.sandbox_port}/sandbox/summary")
        )

    def worker(self, name: str = "worker", *, ready: bool = True) -> Child:
        """Start a worker; with ``ready``, wait until it is consuming messages."""
        log = self.processes.logs / f"{name}.log"
        argv = [*CELERY, "worker", "--loglevel=info", "-n", f"{name}@%h"]
        consumes = (lambda: log.exists() and "ready." in log.read_text()) if ready else None
        return self.processes.spawn(name, argv, environment=self.environment(), ready=consumes)

    def beat(self, name: str = "beat") -> Child:
        """Start a beat."""
        return self.processes.spawn(name, [*CELERY, "beat", "--loglevel=info"], environment=self.environment())

    def start(self) -> Child:
        """Start one process of each type; return the worker."""
        # beat starts first because it is the slowest; the test does not wait for beat
        beat = self.beat()
        assert beat.running
        self.sandbox()
        return self.worker()

    def stop(self, within: float = 20) -> None:
        """Stop every process; if a process does not exit, fail and show its log."""
        for child in self.processes.children:
            child.ask()
        end = time.monotonic() + within
        for child in self.processes.children:
            while child.exit_code is None and time.monotonic() < end:
                time.sleep(0.02)
            assert child.exit_code is not None, f"did not end within {within} s of SIGTERM:\n{child.tail()}"

    def log(self, name: str = "worker") -> list[dict[str, Any]]:
        """Return the JSON lines of a process's log, without an incomplete last line."""
        lines = (self.processes.logs / f"{name}.log").read_text().rpartition("\n")[0].splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def log_events(self, event: str, name: str = "worker") -> list[dict[str, Any]]:
        """Return the log lines of one event."""
        return [line for line in self.log(name) if line["event"] == event]

    def received(self) -> list[dict[str, Any]]:
        """Return every request that the chat received, oldest first."""
        requests: list[dict[str, Any]] = []
        while True:
            after = requests[-1]["number"] if requests else 0
            page = self._call("GET", f"/sandbox/requests?after={after}&limit={PAGE}")
            requests += page
            if len(page) < PAGE:
                return requests

    def accepted(self, *ids: UUID) -> list[str]:
        """Return the ids of the follow-ups that the chat accepted, in order and with repetitions.

        If ``ids`` are given, only these follow-ups are returned.
        """
        wanted = set(map(str, ids))
        return [
            one["followUpId"]
            for one in self.received()
            if one["accepted"] and not one["duplicate"] and (not wanted or one["followUpId"] in wanted)
        ]

    def attempts(self, follow_up_id: UUID) -> list[int]:
        """Return the attempt numbers of the requests for one follow-up, in the order received."""
        return [one["attempt"] for one in self.received() if one["followUpId"] == str(follow_up_id)]

    def behave(self, chat_id: UUID | None = None, **behaviour: Any) -> None:
        """Set the behaviour of one chat, or of every chat if ``chat_id`` is None."""
        path = f"/sandbox/chats/{chat_id}/behaviour" if chat_id else "/sandbox/behaviour"
        self._call("PUT", path, behaviour)

    def pending(self, *ids: UUID) -> int:
        """Return how many of these follow-ups (by default, of all) are pending."""
        return sum(row.status == "pending" for row in self.world.rows(*ids))

    def wait_until_done(self, *ids: UUID, within: float = 20) -> None:
        """Wait until none of the given follow-ups (by default, of all follow-ups) is pending."""
        wait_until(lambda: self.pending(*ids) == 0, within, every=0.1)

    def broker(self) -> redis.Redis:
        """Return a Redis client connected to the broker."""
        return redis.Redis.from_url(self.settings.broker_url.get_secret_value())

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.sandbox_port}{path}"
        request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - our own loopback URL
            text = answer.read()
        return json.loads(text) if text else None


def kill(child: Child) -> None:
    """End a process with SIGKILL, as if its machine had crashed."""
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: child.exit_code is not None)
