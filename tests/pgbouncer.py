"""PgBouncer in front of a PostgreSQL server, for tests; Debian's package is `pgbouncer`."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url

from followups.embedded import free_port
from followups.embedded.child import Command
from followups.embedded.directories import let_through
from followups.embedded.embedded_server import EmbeddedServer
from followups.embedded.postgres import SYSTEM_USER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROGRAM = shutil.which("pgbouncer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))

MISSING = "PgBouncer is not installed: apt-get install pgbouncer."
"""The reason shown when tests that need PgBouncer are skipped."""


class PgBouncer(EmbeddedServer):
    """A PgBouncer on a TCP port of the loopback interface.

    Clients may connect without a password and under any user name. PgBouncer connects to the server as the user in the
    server's URL. Every database of the server is available under its own name. The configuration is strict: an unknown
    startup parameter is refused.
    """

    name = "PgBouncer"
    start_within = timedelta(seconds=10)

    def __init__(self, server_url: str, *, pool_mode: str = "session", pool_size: int = 100) -> None:
        """Store the server's URL, which names any database and a socket directory or TCP address."""
        super().__init__()
        self._url = make_url(server_url)
        self._settings = {
            "pool_mode": pool_mode,
            "default_pool_size": str(pool_size),
            "max_client_conn": "1000",
            "auth_type": "any",
            "listen_addr": "127.0.0.1",
            "unix_socket_dir": "",
            "server_login_retry": "1",
        }
        self._port = free_port()

    def url(self, database: str | None = None) -> str:
        """Return a database's URL through PgBouncer; None means the database in the server's URL."""
        name = database or self._url.database
        url = self._url.set(host="127.0.0.1", port=self._port, database=name, query={})
        return url.render_as_string(hide_password=False)

    def _prepare(self, directory: Path) -> Command:
        run_as = None
        # PgBouncer refuses to run as root; the socket is open only to the embedded server's user
        if os.geteuid() == 0:
            user = pwd.getpwnam(SYSTEM_USER)
            run_as = (user.pw_uid, user.pw_gid)
            let_through(directory)
        file = directory / "pgbouncer.ini"
        file.write_text(self._configuration())
        file.chmod(0o644)
        return Command(
            name=self.name,
            argv=(PROGRAM or "pgbouncer", str(file)),
            log=directory / "pgbouncer.log",
            run_as=run_as,
            grace=timedelta(seconds=2),
        )

    def _configuration(self) -> str:
        server = self._url
        host = server.host or server.query.get("host", "127.0.0.1")
        place = f"host={host} port={server.port or 5432} user={server.username}"
        if server.password:
            place += f" password={server.password}"
        settings = {**self._settings, "listen_port": str(self._port)}
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        return f"[databases]\n* = {place}\n\n[pgbouncer]\n{lines}"

    def _is_ready(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0


@pytest.fixture
def pgbouncer(database_url: str) -> Iterator[PgBouncer]:
    """Return a PgBouncer in session mode in front of this test's database."""
    if PROGRAM is None:
        pytest.skip(MISSING)
    with PgBouncer(database_url) as running:
        yield running
