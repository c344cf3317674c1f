"""Heartbeat files, the health check that reads them, and the cost of this check."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from followups.telemetry import heartbeat
from followups.telemetry.heartbeat import Heartbeat, HeartbeatError, directory_of, read_states

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECOND = timedelta(seconds=1)

PROCESS = """
import sys, time
from datetime import timedelta
from pathlib import Path
from followups.telemetry.heartbeat import Heartbeat
heart = Heartbeat(Path(sys.argv[1]), "worker", "w@here")
heart.report("consumer", timedelta(seconds=float(sys.argv[2])), "has not asked")
heart.wait("the database is unreachable", time.monotonic() - 5)
heart.start()
print("started", flush=True)
time.sleep(60)
"""


def test_without_any_temporary_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If no temporary directory is writable, heartbeats use the configured directory.

    The name of the default directory contains the user's id.
    """

    def nothing_is_writable() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nothing_is_writable)
    monkeypatch.setattr(os, "getuid", lambda: 12_345)  # the directory belongs to another user
    heart = Heartbeat(directory_of(str(tmp_path)), "beat", "beat@here")
    heart.start()
    heart.stop()
    assert directory_of(None).name == "followups-12345"


@pytest.fixture
def reporting_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that keeps writing heartbeats; its only progress report expires after two seconds."""
    command = [sys.executable, "-c", PROCESS, str(tmp_path), "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "started\n"
        yield process
        process.kill()


def test_an_overdue_component(reporting_process: subprocess.Popen[str], tmp_path: Path) -> None:
    """A process counts as healthy until one of its components fails to report in time.

    A process that has been killed has no heartbeat.
    """
    (state,) = read_states(tmp_path, "worker")
    assert (state.name, state.pid, state.trouble) == ("w@here", reporting_process.pid, "")
    assert read_states(tmp_path, "worker", "w") == read_states(tmp_path, "worker", "w@here") == [state]
    assert read_states(tmp_path, "worker", "x") == read_states(tmp_path, "beat") == []
    time.sleep(2.2)
    assert read_states(tmp_path, "worker")[0].trouble == "has not asked for 2 s"
    reporting_process.kill()
    reporting_process.wait()
    assert read_states(tmp_path, "worker") == []


def test_files_of_ended_processes_are_removed(reporting_process: subprocess.Popen[str], tmp_path: Path) -> None:
    """When a process starts, it removes only the heartbeat files of processes that have ended."""
    dead = tmp_path / next(tmp_path.iterdir()).name.replace(str(reporting_process.pid), "1")
    dead.write_text("{}")
    heart = Heartbeat(tmp_path, "beat", "b@here")
    heart.start()
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == ["beat", "worker"]
    heart.stop()
    heart.stop()
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["worker"]


def test_a_process_that_waits(reporting_process: subprocess.Popen[str], tmp_path: Path) -> None:
    """A waiting process is healthy, and reports the reason and length of its wait."""
    assert reporting_process.stdout
    (state,) = read_states(tmp_path, "worker")
    assert (state.trouble, state.waits) == ("", "the database is unreachable, for 5 s")
    heart = Heartbeat(tmp_path, "worker", "w@here")
    heart.wait("the database is read-only", time.monotonic() - 7)
    assert heart.waits() == "the database is read-only, for 7 s"
    heart.wait("")
    assert heart.waits() == ""


def test_probes_run_before_each_write(tmp_path: Path) -> None:
    """The probes run before each write of the heartbeat.

    A stopping process reports only that it is ending.
    """
    heart = Heartbeat(tmp_path, "worker", "w@here")
    heart.probe(lambda: heart.report("loop", SECOND, "is stuck"))
    heart.start()
    time.sleep(1.3)
    assert heart.components().keys() == {"loop"}
    heart.end(SECOND, "has been stopping")
    time.sleep(1.1)
    assert heart.components().keys() == {"end"}
    heart.stop()


def test_the_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The heartbeat directory is the configured one, or a per-user temporary directory."""
    assert directory_of(str(tmp_path)) == tmp_path
    monkeypatch.setattr(heartbeat.tempfile, "gettempdir", lambda: str(tmp_path))
    assert directory_of("") == directory_of(None) == tmp_path / f"followups-{os.getuid()}"
    heart = Heartbeat(directory_of(None), "beat", "b")
    heart.start()
    assert directory_of(None).stat().st_mode & 0o777 == 0o700
    heart.stop()


def test_a_link_or_file_is_rejected(tmp_path: Path) -> None:
    """If the heartbeat directory is a link or a file, a one-sentence error is shown."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(HeartbeatError, match=name):
            Heartbeat(tmp_path / name, "beat", "b").start()


def test_health_imports_few_modules() -> None:
    """`followups health` does not import Celery, FastAPI, SQLAlchemy, pydantic or a broker client."""
    script = """
import sys
from followups.cli import main
assert main(["health", "beat"]) == 1
heavy = ("celery", "kombu", "redis", "fastapi", "sqlalchemy", "pydantic", "aiohttp", "alembic", "structlog")
print([name for name in sys.modules if name.startswith(heavy)])
"""
    environment = os.environ | {"FOLLOWUPS_RUNTIME_DIR": "/nowhere"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
