"""A real streaming replica: a primary, its standby, and one address for the primary."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import make_url

from faults.proxy import Proxy
from followups.embedded import EmbeddedPostgres, memory_directory
from followups.embedded import postgres as embedded
from followups.embedded.child import Command
from stack import wait_until

if TYPE_CHECKING:
    from typing import Self

INSTALLED = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
"""The directory of Debian's newest PostgreSQL binaries, or None if there is none."""

MISSING = "PostgreSQL is not installed: apt-get install postgresql."
"""The reason for skipping a test if PostgreSQL is not installed."""

CONFIGURATION = """
listen_addresses = ''
max_connections = 200
timezone = 'UTC'
fsync = off
full_page_writes = off
dynamic_shared_memory_type = mmap
"""

FOLLOWERS = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"


def ask(server: EmbeddedPostgres, statement: str, database: str = "postgres") -> str:
    """Execute a statement on this server, not through the shared address; return one value."""
    with psycopg.connect(server.url(database), autocommit=True) as connection:
        found = connection.execute(statement.encode())
        row = found.fetchone() if found.description else None
        return str(row[0]) if row else ""


def _change(server: EmbeddedPostgres, setting: str, value: str) -> None:
    ask(server, f"ALTER SYSTEM SET {setting} = '{value}'")
    ask(server, "SELECT pg_reload_conf()")


def socket_of(server: EmbeddedPostgres) -> Path:
    """Return the socket directory that a server's URL names as its host."""
    return Path(str(make_url(server.url()).query["host"]))


def _data(server: EmbeddedPostgres) -> Path:
    return socket_of(server).with_name("data")


class Server(EmbeddedPostgres):
    """A PostgreSQL server of a given version: a new primary, or a standby until it is promoted."""

    def __init__(self, binaries: Path, primary: EmbeddedPostgres | None = None) -> None:
        """Store the server programs and the server to replicate; None means an independent server."""
        super().__init__(parent=memory_directory())
        self._binaries, self._primary = binaries, primary

    def _prepare(self, directory: Path) -> Command:
        data, socket = directory / "data", directory / "socket"
        data.mkdir(0o700)
        socket.mkdir(0o700)
        run_as = embedded._give_up_root(directory, data, socket) if os.geteuid() == 0 else None  # noqa: SLF001 - as it does
        if self._primary:
            command = ["pg_basebackup", "--write-recovery-conf", "--checkpoint=fast", "--dbname", self._primary.url()]
        else:
            command = ["initdb", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"]
        subprocess.run(
            [self._binaries / command[0], *command[1:], "--no-sync", "--pgdata", data],
            **({"user": run_as[0], "group": run_as[1], "extra_groups": []} if run_as else {}),
            cwd=data,
            check=True,
            capture_output=True,
        )
        with (data / "postgresql.conf").open("a") as file:
            file.write(f"{CONFIGURATION}unix_socket_directories = '{socket}'\n")
        return Command(
            name="PostgreSQL",
            argv=(str(self._binaries / "postgres"), "-D", str(data)),
            log=directory / "postgres.log",
            directory=data,
            run_as=run_as,
            stop_signal=signal.SIGINT,
            grace=embedded.STOP_WITHIN,
        )


class Replicated:
    """A primary and its standby behind one address, which tests kill and restart like a single server.

    ``restart`` makes the standby take over. If ``synchronous`` is true, a failover loses no commit; otherwise, it may
    lose commits.
    """

    def __init__(self, *, synchronous: bool = True, binaries: Path = embedded.BINARIES) -> None:
        """Store the directory of the server programs, without starting a server."""
        self._synchronous, self._binaries = synchronous, binaries
        self._running = ExitStack()
        self.primary = Server(binaries)
        self.standby = Server(binaries, self.primary)
        self.proxy: Proxy

    def __enter__(self) -> Self:
        """Start the primary and the standby."""
        with ExitStack() as starting:
            starting.callback(self._stop)
            self.primary.start()
            self.standby.start()
            self._attach()
            self.proxy = starting.enter_context(Proxy(self.primary.url()))
            self._running = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the primary and the standby."""
        self._running.close()

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database on the current primary."""
        return make_url(self.proxy.url).set(database=database).render_as_string(hide_password=False)

    def kill(self) -> None:
        """Kill the primary and its sessions with SIGKILL."""
        self.primary.kill()

    def restart(self) -> None:
        """Fail over to the standby and start a new standby."""
        self.promote()
        self.move()
        self.proxy.cut()
        self.replace_standby()

    def promote(self) -> None:
        """Promote the standby and restart the old primary read-only, without moving the address."""
        old = self.primary
        self.primary, self.standby = self.standby, old
        _data(old).joinpath("standby.signal").touch()
        with _data(old).joinpath("postgresql.auto.conf").open("a") as configuration:
            configuration.write(f"primary_conninfo = 'host={socket_of(self.primary)} user=postgres'\n")
        old.restart()  # before it stops, the old primary sends its remaining WAL to the standby
        ask(self.primary, "SELECT pg_promote()")

    def move(self) -> None:
        """Route new connections to the current primary; existing connections stay where they are."""
        self.proxy.lead_to(self.primary.url())

    def replace_standby(self) -> None:
        """Replace the standby, which may have diverged, with a new copy of the primary."""
        self.standby.stop()
        self.standby = Server(self._binaries, self.primary)
        self.standby.start()
        self._attach()

    def detach(self) -> None:
        """Disconnect the standby, so that it no longer receives commits."""
        _change(self.standby, "primary_conninfo", "")
        wait_until(lambda: ask(self.primary, FOLLOWERS) == "0")

    def _stop(self) -> None:
        for server in (self.primary, self.standby):
            server.stop()

    def _attach(self) -> None:
        wait_until(lambda: ask(self.primary, FOLLOWERS) == "1")
        if self._synchronous:
            _change(self.primary, "synchronous_standby_names", "*")
