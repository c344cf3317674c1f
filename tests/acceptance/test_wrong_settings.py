"""Tests for invalid settings and failed starts: the process exits with a one-line error."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url

from stack import wait_until
from web import ROOT

if TYPE_CHECKING:
    from followups.embedded import Child
    from stack import Stack

PROCFILE = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines() if ": " in line)
COMMANDS = PROCFILE | {"doctor": "followups doctor", "list": "followups list", "stats": "followups stats"}

WRONG = {
    "FOLLOWUPS_DATABASE_URL": "postgresql://app:pa55@db:port/chats",
    "FOLLOWUPS_BROKER_URL": "redis://:pa55@broker:port/0",
}

BROKEN = """
from followups.delivery.pipeline import Pipeline

def fail(self):
    raise RuntimeError("can't start new thread")

Pipeline.start = fail
"""


def start(stack: Stack, name: str, more: str = "", **environment: str) -> Child:
    """Start a Procfile process or a command."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    argv = ["/bin/sh", "-c", f"exec {COMMANDS[name]} {more}"]
    return stack.processes.spawn(
        name, argv, environment=stack.environment() | {"PATH": path, "PORT": "0"} | environment
    )


def test_invalid_urls(stack: Stack) -> None:
    """With invalid URLs, each process exits with code 2; the error names both settings but no secrets."""
    started = {name: start(stack, name, **WRONG) for name in COMMANDS}
    for name, child in started.items():
        wait_until(lambda child=child: not child.running, within=120)
        said = child.command.log.read_text()
        assert (name, child.exit_code, said.count("\n")) == (name, 2, 1), said
        assert said.startswith("followups: FOLLOWUPS_DATABASE_URL should be")
        assert "FOLLOWUPS_BROKER_URL should be" in said
        assert "pa55" not in said


def test_a_worker_whose_components_cannot_start(stack: Stack, tmp_path: Path) -> None:
    """If a worker's components cannot start, the worker exits and does not appear healthy."""
    (tmp_path / "broken.py").write_text(BROKEN)
    worker = start(stack, "worker", "-I broken", PYTHONPATH=str(tmp_path))
    wait_until(lambda: not worker.running, within=60)
    assert worker.exit_code == 1, worker.tail()
    (line,) = stack.log_events("worker_cannot_start", "worker")
    assert "start new thread" in str(line)


@pytest.mark.parametrize("form", ["libpq", "SQLAlchemy"])
def test_several_hosts(stack: Stack, form: str) -> None:
    """If a URL has several hosts, an unreachable or read-only host is skipped."""
    url = make_url(stack.settings.database_url.get_secret_value())
    socket = str(url.query["host"])
    hosts = f"nowhere.invalid:1,{socket.replace('/', '%2F')}" if form == "libpq" else ""
    query = f"host=/nowhere,{socket}&" if form == "SQLAlchemy" else ""
    several = f"postgresql://{url.username}@{hosts}/{url.database}?{query}target_session_attrs=read-write"
    stack.options["FOLLOWUPS_DATABASE_URL"] = several
    stack.start()
    stack.wait_until_done(stack.world.follow_up(), within=60)
    doctor = start(stack, "stats")
    wait_until(lambda: not doctor.running, within=60)
    assert doctor.exit_code == 0, doctor.tail()
