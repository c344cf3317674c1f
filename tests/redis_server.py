"""Debian's Redis with TLS and users, for tests; the embedded Valkey is built without TLS."""

from __future__ import annotations

import shutil
import socket
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from followups.embedded import free_port
from followups.embedded.child import Child, Command
from followups.embedded.directories import make_temporary_directory, remove_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    import trustme

PROGRAM = shutil.which("redis-server")

MISSING = "Redis is not installed: apt-get install redis-server."
"""The reason given when tests that need this Redis are skipped."""

PASSWORD = "s3cret/with?odd#characters"  # noqa: S105 - of a server that lives as long as a test


class RedisServer:
    """A Redis that accepts only TLS, started by ``with``; its certificate is for ``localhost``."""

    def __init__(self, authority: trustme.CA, name: str = "localhost", users: str = "") -> None:
        """Create a certificate for the host ``name``, signed by ``authority``.

        ``users`` is the content of an ACL file. If ``users`` is empty, the default user has a password.
        """
        self._authority, self._name, self._users = authority, name, users
        self._port = free_port()
        self._directory: Path | None = None
        self._child: Child | None = None

    def url(self, query: str = "", user: str = "", password: str = PASSWORD) -> str:
        """Return a URL that trusts the server's certificate authority; ``query`` adds parameters."""
        return f"rediss://{user}:{password}@localhost:{self._port}/0?ssl_ca_certs={self._file('authority.pem')}{query}"

    def client(self) -> redis.Redis:
        """Return a client with all permissions."""
        return redis.Redis(
            host="localhost", port=self._port, password=PASSWORD, ssl=True, ssl_ca_certs=self._file("authority.pem")
        )

    def __enter__(self) -> Self:
        """Start the server, and wait until it answers."""
        self._directory = make_temporary_directory()
        certificate = self._authority.issue_cert(self._name)
        self._authority.cert_pem.write_to_path(self._file("authority.pem"))
        certificate.private_key_and_cert_chain_pem.write_to_path(self._file("server.pem"))
        settings = {
            "port": "0",
            "bind": "127.0.0.1",
            "tls-port": str(self._port),
            "tls-cert-file": self._file("server.pem"),
            "tls-key-file": self._file("server.pem"),
            "tls-auth-clients": "no",
            "save": '""',
            "maxmemory-policy": "noeviction",
        }
        if self._users:
            Path(self._file("users.acl")).write_text(self._users)
            settings["aclfile"] = self._file("users.acl")
        else:
            settings["requirepass"] = f'"{PASSWORD}"'
        lines = "".join(f"{name} {value}\n" for name, value in settings.items())
        self._child = Child(
            Command(
                name="Redis",
                argv=(PROGRAM or "redis-server", "-"),
                log=self._directory / "redis.log",
                directory=self._directory,
                stdin=lines.encode(),
            )
        )
        self._child.start()
        self._child.wait_until(self._listens, timedelta(seconds=10))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server, and delete its temporary files."""
        if self._child and self._directory:
            self._child.stop()
            remove_directory(self._directory)

    def _file(self, name: str) -> str:
        return str(self._directory and self._directory / name)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """Return a Redis server from Debian's package, with TLS."""
    import trustme  # noqa: PLC0415 - not for unit tests

    if PROGRAM is None:
        pytest.skip(MISSING)
    with RedisServer(trustme.CA()) as running:
        yield running
