"""A real streaming replica: a primary, a standby that follows it, and one address that leads to the primary."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import make_url

from faults.proxy import Proxy
from followups.embedded import EmbeddedPostgres, memory_directory
from followups.embedded.postgres import BINARIES
from stack import wait_until

if TYPE_CHECKING:
    from typing import Self

    from followups.embedded.child import Command

FOLLOWERS = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"


def ask(server: EmbeddedPostgres, statement: str) -> str:
    """Execute a statement on a server itself, whatever the address leads to; return the first column of its row."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        found = connection.execute(statement.encode())
        row = found.fetchone() if found.description else None
        return str(row[0]) if row else ""


def _change(server: EmbeddedPostgres, setting: str, value: str) -> None:
    ask(server, f"ALTER SYSTEM SET {setting} = '{value}'")
    ask(server, "SELECT pg_reload_conf()")


def _socket(server: EmbeddedPostgres) -> Path:
    return Path(str(make_url(server.url()).query["host"]))


def _data(server: EmbeddedPostgres) -> Path:
    return _socket(server).with_name("data")


class Standby(EmbeddedPostgres):
    """A server that begins as a copy of another one, and follows it until it is promoted."""

    def __init__(self, primary: EmbeddedPostgres) -> None:
        """Take which server to follow."""
        super().__init__(parent=memory_directory())
        self._primary = primary

    def _prepare(self, directory: Path) -> Command:
        data = directory / "data"
        command = [BINARIES / "pg_basebackup", "--pgdata", data, "--write-recovery-conf", "--checkpoint=fast"]
        subprocess.run([*command, "--no-sync", "--dbname", self._primary.url()], check=True, capture_output=True)
        owner = _data(self._primary).stat()
        for path in (data, *data.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)
        return super()._prepare(directory)


class Replicated:
    """Both servers, and the address. It can be killed and restarted as one server: its standby takes over.

    ``synchronous``: what was committed is on the standby too, so that a failover loses nothing. Otherwise it may.
    """

    def __init__(self, *, synchronous: bool = True) -> None:
        """Start nothing yet."""
        self._synchronous = synchronous
        self._running = ExitStack()
        self.primary = EmbeddedPostgres(parent=memory_directory())
        self.standby: EmbeddedPostgres = Standby(self.primary)
        self.proxy: Proxy

    def __enter__(self) -> Self:
        """Start both."""
        with ExitStack() as starting:
            starting.callback(self._stop)
            self.primary.start()
            self.standby.start()
            self._attach()
            self.proxy = starting.enter_context(Proxy(self.primary.url()))
            self._running = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop both."""
        self._running.close()

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database of the primary, whichever server that is."""
        return make_url(self.proxy.url).set(database=database).render_as_string(hide_password=False)

    def kill(self) -> None:
        """Kill the primary with SIGKILL, sessions and all."""
        self.primary.kill()

    def restart(self) -> None:
        """Let the standby take over, and get a new one."""
        self.promote()
        self.move()
        self.proxy.cut()
        self.replace_standby()

    def promote(self) -> None:
        """Promote the standby; what was the primary comes back read-only, and the address leads to it still."""
        old = self.primary
        self.primary, self.standby = self.standby, old
        _data(old).joinpath("standby.signal").touch()
        with _data(old).joinpath("postgresql.auto.conf").open("a") as configuration:
            configuration.write(f"primary_conninfo = 'host={_socket(self.primary)} user=postgres'\n")
        old.restart()  # one that was not killed sends the standby all that it has before it ends
        ask(self.primary, "SELECT pg_promote()")

    def move(self) -> None:
        """Let the address lead to the primary, as it is now. Connections that are open are kept."""
        self.proxy.lead_to(self.primary.url())

    def replace_standby(self) -> None:
        """Replace the standby with a new copy of the primary: what was one may have gone another way."""
        self.standby.stop()
        self.standby = Standby(self.primary)
        self.standby.start()
        self._attach()

    def detach(self) -> None:
        """Let the standby hear of nothing any more that is committed."""
        _change(self.standby, "primary_conninfo", "")
        wait_until(lambda: ask(self.primary, FOLLOWERS) == "0")

    def _stop(self) -> None:
        for server in (self.primary, self.standby):
            server.stop()

    def _attach(self) -> None:
        wait_until(lambda: ask(self.primary, FOLLOWERS) == "1")
        if self._synchronous:
            _change(self.primary, "synchronous_standby_names", "*")
