"""How child processes are started, watched and stopped, by their owner or by the watchdog."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from followups.embedded import EmbeddedError, Processes, answers, free_port
from followups.embedded.directories import closed_above
from followups.embedded.watchdog import WATCHDOG, is_alive

if TYPE_CHECKING:
    from collections.abc import Callable

SOON = timedelta(seconds=20)
"""A long timeout, because the machine may be busy."""

OWNER = """
import os, sys, time
from followups.embedded import EmbeddedPostgres, EmbeddedValkey, Processes
postgres, valkey, processes = EmbeddedPostgres(), EmbeddedValkey(), Processes()
postgres.start()
valkey.start()
child = processes.spawn("sleeper", ["sleep", "600"])
if (forked := os.fork()) == 0:
    os.close(1)
    time.sleep(600)
print(forked)
print(child.pid, valkey.child.pid, postgres.child.pid)
print(processes.logs, valkey._directory, postgres._directory, flush=True)
sys.stdin.readline()
"""
"""A program that starts one process of each type, forks, and exits without stopping them."""


def _until(condition: Callable[[], bool], within: timedelta = SOON) -> bool:
    deadline = time.monotonic() + within.total_seconds()
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


class TestProcesses:
    """The `Processes` supervisor."""

    def test_start_waits_until_ready(self, tmp_path: Path) -> None:
        """Each process has its own log, and counts as started once its check passes."""
        (tmp_path / "index.html").write_text("hello")
        port = free_port()
        with Processes(tmp_path) as processes:
            server = processes.spawn(
                "web",
                [sys.executable, "-u", "-m", "http.server", str(port), "--bind", "127.0.0.1", "-d", str(tmp_path)],
                ready=answers(f"http://127.0.0.1:{port}/"),
            )
            assert server.running
            assert processes.ended() == []
        assert not server.running
        assert "GET / HTTP/1.1" in (tmp_path / "web.log").read_text()

    def test_an_early_exit_shows_the_end_of_the_log(self) -> None:
        """If a process ends early, the error shows its exit code and the end of its log."""
        with Processes() as processes, pytest.raises(EmbeddedError, match=r"(?s)beat ended with code 3\..*no broker"):
            processes.spawn("beat", ["sh", "-c", "echo no broker >&2; exit 3"], ready=lambda: False)

    def test_readiness_has_a_deadline(self) -> None:
        """If a process is not ready in time, it is stopped, and the error names the time limit."""
        with Processes() as processes:
            with pytest.raises(EmbeddedError, match=r"was not ready after 0\.1 s"):
                processes.spawn("worker", ["sleep", "600"], ready=lambda: False, within=timedelta(seconds=0.1))
            assert not processes.children[0].running

    def test_a_missing_program_is_an_error_in_one_sentence(self) -> None:
        """If a program is missing, the error names it."""
        with Processes() as processes, pytest.raises(EmbeddedError, match=r"flower could not be started.*no-such"):
            processes.spawn("flower", ["no-such-program"])

    def test_ignored_sigterm_ends_in_sigkill_of_the_group(self) -> None:
        """If a process ignores SIGTERM, it is killed with its process group after the grace period."""
        script = "trap '' TERM; sleep 600 & echo $!; wait; sleep 600"
        with Processes() as processes:
            stubborn = processes.spawn("stubborn", ["sh", "-c", script], grace=timedelta(seconds=0.2))
            assert _until(lambda: (processes.logs / "stubborn.log").read_text().endswith("\n"))
            started = int((processes.logs / "stubborn.log").read_text())
            pid = stubborn.pid
        assert not is_alive(pid)
        assert _until(lambda: not is_alive(started))

    def test_only_a_pools_parent_gets_sigterm(self, tmp_path: Path) -> None:
        """SIGTERM is sent only to a pool's parent process, which drains its child processes.

        A process that exits by itself is reported.
        """
        done = tmp_path / "done"
        script = f"trap 'wait; exit 7' TERM; (sleep 0.3; touch {done}) & echo up; wait"
        with Processes() as processes:
            pool = processes.spawn("pool", ["sh", "-c", script])
            assert _until(lambda: (processes.logs / "pool.log").read_text() == "up\n")
            pool.signal(signal.SIGTERM)
            assert _until(lambda: pool.exit_code == 7)
            assert processes.ended() == [pool]
        assert done.exists()

    def test_output_lines_are_passed_on(self) -> None:
        """Each logged output line is also passed to ``echo``, with the name of its process."""
        lines: list[tuple[str, str]] = []
        with Processes(echo=lambda name, line: lines.append((name, line))) as processes:
            processes.spawn("talker", ["sh", "-c", "echo one; echo two >&2"], environment={"X": "1"})
            assert _until(lambda: len(lines) == 2)
            assert (processes.logs / "talker.log").read_text() == "one\ntwo\n"
        assert lines == [("talker", "one"), ("talker", "two")]

    def test_ctrl_c_reaches_only_the_owner(self) -> None:
        """A child process has a separate session, so the terminal's signals do not reach it."""
        with Processes() as processes:
            child = processes.spawn("worker", ["sleep", "600"])
            assert os.getsid(child.pid) == child.pid != os.getsid(0)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None], ids=str)
def test_nothing_outlives_a_killed_owner(end: signal.Signals | None) -> None:
    """If an owner is killed by SIGKILL, its servers, processes and directories are soon removed.

    Servers, processes and directories are removed even if a forked child of the owner survives.
    """
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as owner:
        assert owner.stdin
        assert owner.stdout
        forked = int(owner.stdout.readline())
        pids = [int(word) for word in owner.stdout.readline().split()]
        directories = [Path(word.decode()) for word in owner.stdout.readline().split()]
        assert len(pids) == len(directories) == 3
        assert all(map(is_alive, pids))
        assert all(directory.is_dir() for directory in directories)
        if end:
            owner.send_signal(end)
        else:
            owner.communicate(b"end\n")
    try:
        _assert_gone(pids, directories)
    finally:
        os.kill(forked, signal.SIGKILL)


def _assert_gone(pids: list[int], directories: list[Path]) -> None:
    assert _until(lambda: not any(map(is_alive, pids)))
    assert _until(lambda: not any(directory.exists() for directory in directories))


def test_a_killed_watchdog_is_replaced() -> None:
    """If a watchdog has been killed, a new one is started together with the next process.

    The new watchdog exits after the last guarded process has ended.
    """
    with Processes() as processes:
        processes.spawn("first", ["sleep", "600"])
        first = WATCHDOG._process  # noqa: SLF001 - only this test needs the process
        assert first
        first.kill()
        first.wait()
        processes.spawn("second", ["sleep", "600"])
        second = WATCHDOG._process  # noqa: SLF001 - only this test needs the process
        assert second
        assert second is not first
        assert second.poll() is None
    assert second.poll() == 0 or WATCHDOG._process is second  # noqa: SLF001 - it may watch other tests' servers


def test_the_topmost_closed_directory(open_directory: Path) -> None:
    """If a user may not enter some directories on a path, the topmost of them is returned.

    The directory's owner may enter it, so None is returned for the owner.
    """
    inner = open_directory / "closed" / "data"
    inner.mkdir(parents=True)
    (open_directory / "closed").chmod(0o700)
    assert closed_above(inner, -1) == (open_directory / "closed").resolve()
    assert closed_above(inner, os.getuid()) is None


def test_a_free_port_can_be_listened_on() -> None:
    """A server can listen on the port that `free_port` returns."""
    with socket.create_server(("127.0.0.1", free_port())) as server:
        assert server.getsockname()[0] == "127.0.0.1"


def test_a_free_port_is_reserved() -> None:
    """On Linux, a port from `free_port` is not given to a socket that binds to port 0."""
    reserved = {free_port() for _ in range(20)}
    # Without the reservation, some of 5,000 servers would almost certainly get one of these 20 ports.
    for _ in range(5_000):
        with socket.create_server(("127.0.0.1", 0)) as server:
            assert server.getsockname()[1] not in reserved
