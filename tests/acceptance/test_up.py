"""Tests of `followups up` that use the system as the command's output describes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from followups.embedded import EmbeddedPostgres, free_port
from process_tree import assert_gone, descendants, needs_proc
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = str(Path(sys.executable).with_name("followups"))
BASH = shutil.which("bash") or "sh"
pytestmark = needs_proc


class Up:
    """A running `followups up` and its output so far."""

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        command = [COMMAND, "up", "--port", str(self.port), *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=bare_environment()
        )
        self.said = ""
        self.remarks: list[str] = []
        assert self.process.stderr
        self._reader = threading.Thread(target=self.remarks.extend, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Read the output up to the line that explains how to stop the command."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.said += line
            if "Ctrl-C" in line:
                return
        pytest.fail(f"It ended before it was ready: {self.end()}")

    def end(self) -> str:
        """Wait until the command exits, and return its output on stderr."""
        self.process.wait(120)
        self._reader.join(10)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream
            stream.close()
        return "".join(self.remarks)

    def found(self, pattern: str) -> str:
        """Return the text that the pattern's first group matches in the output."""
        match = re.search(pattern, self.said, re.DOTALL)
        assert match, self.said
        return match.group(1)


@contextmanager
def up(*arguments: str) -> Iterator[Up]:
    """Run `followups up`; at the end, stop the command if it is still running."""
    started = Up(*arguments)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.terminate()
            started.end()


def bare_environment() -> dict[str, str]:
    """Return an environment without any of the service's settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("FOLLOWUPS_", "PYTEST"))}


def get(url: str) -> Any:
    """Return the JSON document at a URL."""
    with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own loopback URL
        return json.loads(answer.read())


def test_the_printed_request_is_delivered_and_ctrl_c_stops_all_processes() -> None:
    """The request and the exports that `followups up` prints work; Ctrl-C ends all processes."""
    with up() as system:
        system.wait_until_ready()
        children = descendants(system.process.pid)
        sandbox = system.found(r"Sandbox chat\s+(http://[^/]+)/")
        assert get(f"http://127.0.0.1:{system.port}/readyz")["status"] == "ready"

        pasted = system.found(r"Paste this: [^\n]+\n\n(.*?)\n\n")
        ran = subprocess.run([BASH, "-ec", pasted], capture_output=True, text=True, check=True)
        follow_up_id = json.loads(ran.stdout[ran.stdout.index("}{") + 1 :])["id"]
        exports = "".join(re.findall(r"(export .*\n)", system.said))
        assert " FOLLOWUPS_DATABASE_URL='postgresql://followups@/postgres" in exports
        show = f"{exports} {COMMAND} show {follow_up_id} --json"
        shown = subprocess.run([BASH, "-ec", show], capture_output=True, check=True)
        assert json.loads(shown.stdout)["id"] == follow_up_id
        [request] = wait_until(lambda: get(f"{sandbox}/sandbox/requests"), within=60)
        assert (request["followUpId"], request["accepted"]) == (follow_up_id, True)

        began = time.monotonic()
        system.process.send_signal(signal.SIGINT)
        remarks = system.end()
        assert time.monotonic() - began < 30
    assert system.process.returncode == 0
    assert "Traceback" not in remarks
    assert_gone(children)


def test_a_crashed_process_is_named_and_stops_the_others(open_directory: Path) -> None:
    """If a process crashes, `followups up` prints the end of its log and exits; --data keeps all data."""
    with up("--data", str(open_directory / "kept")) as system:
        system.wait_until_ready()
        children = descendants(system.process.pid)
        [beat] = [pid for pid, command in children.items() if " beat " in command]
        os.kill(beat, signal.SIGKILL)
        remarks = system.end()
        assert system.process.returncode == 1
        assert "followups: beat ended by signal 9. The end of its log:\n" in remarks
        assert "Traceback" not in remarks
        assert_gone(children)
    kept = open_directory / "kept"
    assert {stat.S_IMODE(each.stat().st_mode) for each in (kept, *kept.iterdir())} == {0o700}
    with EmbeddedPostgres(kept / "postgres") as postgres, psycopg.connect(postgres.url()) as connection:
        assert connection.execute("SELECT name FROM api_keys").fetchall() == [("followups up",)]


def test_stopped_while_it_starts() -> None:
    """A signal during the start of `followups up` stops it and leaves no process running."""
    with up() as system:
        wait_until(lambda: any("Starting sandbox" in line for line in system.remarks), within=120)
        children = descendants(system.process.pid)
        system.process.send_signal(signal.SIGTERM)
        remarks = system.end()
    assert system.process.returncode == 0
    assert "Traceback" not in remarks
    assert_gone(children)


def test_a_port_in_use_is_an_error_of_one_sentence() -> None:
    """If a port is in use, `followups up` exits with an error before it starts any process."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = subprocess.run([COMMAND, "up", "--port", str(port)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == (
        f"followups: Port {port} is not available (address already in use); choose another one with --port.\n"
    )
