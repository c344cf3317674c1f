"""The Procfile under honcho: every process starts, a follow-up goes through all of them, SIGTERM ends them."""

from __future__ import annotations

import os
import signal
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from followups.cli import main
from followups.cli.rest import Rest
from followups.embedded import free_port
from process_tree import assert_gone, descendants, needs_proc
from stack import wait_until

if TYPE_CHECKING:
    import pytest

    from stack import Stack

ROOT = Path(__file__).parents[2]
BINARIES = Path(sys.executable).parent


def get(url: str) -> bytes | None:
    """Return what a URL answers with; None while nobody answers, or says that it is not ready."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answered:  # noqa: S310 - our own loopback URL
            body: bytes = answered.read()
            return body
    except OSError:
        return None


def api_key(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Make a workspace and an API key, as an operator does."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["migrate"]) == main(["workspace", "create", "acme"]) == 0
    capsys.readouterr()
    assert main(["api-key", "create", "--workspace", "acme"]) == 0
    return capsys.readouterr().out.strip()


@needs_proc
def test_honcho_runs_every_process(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under honcho a follow-up goes from the API to the receiver, Flower shows the worker, SIGTERM ends all of them."""
    stack.sandbox()
    port, flower_port = free_port(), free_port()
    environment = stack.environment() | {
        "FLOWER_PORT": str(flower_port),
        "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
    }
    key = api_key(stack.environment(), monkeypatch, capsys)
    honcho_start = [str(BINARIES / "honcho"), "-f", str(ROOT / "Procfile"), "start", "-p", str(port)]
    command = [*honcho_start, "web", "worker", "beat", "flower"]
    honcho = stack.processes.spawn("honcho", command, environment=environment)
    api = f"http://127.0.0.1:{port}"
    wait_until(lambda: get(f"{api}/readyz"), within=40)
    rest, chat_id = Rest(api, key), str(uuid4())
    rest.call("POST", "/api/v1/chat-messages", {"id": str(uuid4()), "chatId": chat_id, "role": "agent"})
    follow_up = {"chatId": chat_id, "dueDate": datetime.now(UTC).isoformat(), "message": "Still there?"}
    created = rest.call("POST", "/api/v1/chat-message-follow-ups", follow_up)
    rest.close()
    wait_until(lambda: stack.accepted(created["id"]))
    wait_until(lambda: b"worker.1@" in (get(f"http://127.0.0.1:{flower_port}/workers") or b""), within=30)

    started = descendants(honcho.pid)
    assert len(started) >= 4
    honcho.signal(signal.SIGTERM)
    wait_until(lambda: honcho.exit_code is not None, within=20)
    assert_gone(started)
