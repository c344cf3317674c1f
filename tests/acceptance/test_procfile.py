"""Tests of the Procfile under honcho: all processes start, deliver a follow-up, and end on SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from databases import OWNER, url_as
from followups.cli import main
from followups.cli.demo.scenario import RestClient
from followups.embedded import free_port
from followups.schema import downgrade
from process_tree import assert_gone, descendants, needs_proc
from stack import wait_until

if TYPE_CHECKING:
    import pytest

    from stack import Stack

ROOT = Path(__file__).parents[2]
BINARIES = Path(sys.executable).parent


def get(url: str) -> bytes | None:
    """Return the body of a URL's response, or None if the request fails."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answered:  # noqa: S310 - our own loopback URL
            body: bytes = answered.read()
            return body
    except OSError:
        return None


def honcho_start(*arguments: str) -> list[str]:
    """Return the command that starts the Procfile's processes."""
    return [str(BINARIES / "honcho"), "-f", str(ROOT / "Procfile"), "start", *arguments]


def environment_of(stack: Stack, **more: str) -> dict[str, str]:
    """Return an environment in which honcho finds the settings and this installation's commands."""
    return {**stack.environment(), "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}", **more}


def api_key(capsys: pytest.CaptureFixture[str]) -> str:
    """Create a workspace and an API key with the commands that operators use."""
    assert main(["workspace", "create", "acme"]) == 0
    capsys.readouterr()
    assert main(["api-key", "create", "--workspace", "acme"]) == 0
    return capsys.readouterr().out.strip()


@needs_proc
def test_honcho_runs_every_process(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`honcho start` migrates an empty database, delivers a follow-up, and ends all processes on SIGTERM."""
    # the `release` process migrates the database, so it needs the owner's role
    owner = url_as(stack.settings.database_url.get_secret_value(), OWNER)
    stack.options["FOLLOWUPS_DATABASE_URL"] = owner
    for name, value in stack.environment().items():
        monkeypatch.setenv(name, value)
    downgrade(owner, "base")
    stack.sandbox()
    port, flower_port = free_port(), free_port()
    environment = environment_of(stack, FLOWER_PORT=str(flower_port))
    honcho = stack.processes.spawn("honcho", honcho_start("-p", str(port)), environment=environment)
    api = f"http://127.0.0.1:{port}"
    wait_until(lambda: get(f"{api}/readyz"), within=120)
    rest, chat_id = RestClient(api, api_key(capsys)), str(uuid4())
    rest.call("POST", "/api/v1/chat-messages", {"id": str(uuid4()), "chatId": chat_id, "role": "agent"})
    follow_up = {"chatId": chat_id, "dueDate": datetime.now(UTC).isoformat(), "message": "Still there?"}
    created = rest.call("POST", "/api/v1/chat-message-follow-ups", follow_up)
    rest.close()
    wait_until(lambda: stack.accepted(created["id"]), within=60)
    wait_until(lambda: b"worker.1@" in (get(f"http://127.0.0.1:{flower_port}/workers") or b""), within=60)

    started = descendants(honcho.pid)
    for process in ("followups.api", "worker", "beat", "flower", "migrate"):
        assert [command for command in started.values() if process in command]
    honcho.signal(signal.SIGTERM)
    wait_until(lambda: honcho.exit_code is not None, within=60)
    assert_gone(started)


@needs_proc
def test_a_release_without_honcho_ends(stack: Stack) -> None:
    """If `release` is started without honcho, the command migrates and exits."""
    command = honcho_start("release")
    ran = subprocess.run(command, env=os.environ | environment_of(stack), capture_output=True, timeout=120, check=False)
    assert ran.returncode == 0
    assert b"The schema is" in ran.stdout
