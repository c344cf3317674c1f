"""A child process in a separate session, with its output in a log file."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, TYPE_CHECKING

from followups.embedded.watchdog import WATCHDOG
from followups.errors import FollowUpsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

POLL = timedelta(milliseconds=20)
"""Seconds between two checks of whether a process is ready."""

TAIL_LINES = 20
"""Number of lines at the end of the log that an error message quotes."""

GONE_WITHIN = timedelta(seconds=5)
"""How long the descendants of a killed process may take to end."""


class EmbeddedError(FollowUpsError):
    """A process on this machine could not be started or stopped."""

    slug = "embedded"


@dataclass(frozen=True, slots=True)
class Command:
    """A command to run, its stop signal, and how long to wait (``grace``) before SIGKILL."""

    name: str
    argv: Sequence[str]
    log: Path
    environment: Mapping[str, str] | None = None
    """The command's environment, or None to inherit this process's environment."""
    directory: Path | None = None
    stdin: bytes = b""
    run_as: tuple[int, int] | None = None
    """The user and group ids to run the command as, if this process is root. If None, the command runs as the user and
    group of this process.
    """
    stop_signal: signal.Signals = signal.SIGTERM
    grace: timedelta = timedelta(seconds=10)
    echo: Callable[[str], None] | None = None
    """A function that a thread calls with each line of the command's output."""


class Child:
    """A running command. The command can be started again after it has been stopped or killed."""

    def __init__(self, command: Command) -> None:
        """Store the command, which `start` runs."""
        self.command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._forks = -1  # read end of a pipe; the process and its descendants keep the write end open
        self._asked_at: float | None = None
        self._echo: threading.Thread | None = None

    @property
    def pid(self) -> int:
        """The process id. Raises `EmbeddedError` if the command was never started."""
        return self._running().pid

    @property
    def exit_code(self) -> int | None:
        """The command's exit code, or None while it is running or was never started.

        The exit code is negative if a signal ended the command.
        """
        return self._process.poll() if self._process else None

    @property
    def running(self) -> bool:
        """Whether the command has been started and is still running."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the command with an empty log. Raises `EmbeddedError` if the program cannot be run."""
        if self.running:
            message = f"{self.command.name} is already running."
            raise EmbeddedError(message)
        self._forks, held_by_child = os.pipe()
        try:
            self._process = _popen(self.command, held_by_child)
        except OSError as error:
            os.close(self._forks)
            message = f"{self.command.name} could not be started: {error}."
            raise EmbeddedError(message) from error
        finally:
            os.close(held_by_child)
        self._asked_at = None
        WATCHDOG.guard_process(self._process.pid, self.command.stop_signal, self.command.grace.total_seconds())
        _feed(self._process, self.command.stdin)
        if self.command.echo:
            self._echo = threading.Thread(target=_pump, args=(self._process.stdout, self.command), daemon=True)
            self._echo.start()

    def wait_until(self, ready: Callable[[], bool], within: timedelta) -> None:
        """Wait until ``ready`` returns true.

        If the command does not become ready, stop it and raise `EmbeddedError` with the end of its log.
        """
        deadline = time.monotonic() + within.total_seconds()
        while not ready():
            code = self.exit_code
            if code is None and time.monotonic() < deadline:
                time.sleep(POLL.total_seconds())
                continue
            self.stop()
            what = f"was not ready after {within.total_seconds():g} s" if code is None else f"ended with code {code}"
            message = f"{self.command.name} {what}. The end of its log:\n{self.tail()}"
            raise EmbeddedError(message)

    def tail(self) -> str:
        """Return the last lines of the command's log."""
        with contextlib.suppress(FileNotFoundError):
            lines = self.command.log.read_text(errors="replace").splitlines()
            return "\n".join(lines[-TAIL_LINES:]) or "(it is empty)"
        return "(there is none)"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, not to its process group.

        In a worker pool, the parent process signals its children itself.
        """
        if self.running:
            self._running().send_signal(number)

    def ask(self) -> None:
        """Send the command's stop signal, without waiting for the command to end."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self.signal(self.command.stop_signal)

    def stop(self) -> None:
        """Send the stop signal, wait for up to ``grace``, and kill what is still running.

        If the command is not running, nothing happens.
        """
        if self._process is None:
            return
        self.ask()
        left = self.command.grace.total_seconds() - (time.monotonic() - (self._asked_at or 0.0))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(left, 0.0))
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to the process and its group, and return once all descendants have ended."""
        if self._process is None:
            return
        # Even if the process has ended, other processes of its group may still be running.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        WATCHDOG.release(self._process.pid)
        gone = _closed_within(self._forks, GONE_WITHIN)
        os.close(self._forks)
        if self._echo:
            self._echo.join(GONE_WITHIN.total_seconds())
        if self._process.stdout:
            self._process.stdout.close()
        self._process = self._echo = None
        if not gone:
            message = f"Processes that {self.command.name} started are still running."
            raise EmbeddedError(message)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            message = f"{self.command.name} is not running."
            raise EmbeddedError(message)
        return self._process


def _popen(command: Command, held_by_child: int) -> subprocess.Popen[bytes]:
    user, group = command.run_as or (None, None)
    with command.log.open("wb") as log:
        return subprocess.Popen(  # noqa: S603 - our own commands, never a shell
            command.argv,
            env=command.environment,
            cwd=command.directory,
            stdin=subprocess.PIPE if command.stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE if command.echo else log,
            stderr=subprocess.STDOUT,
            user=user,
            group=group,
            extra_groups=None if command.run_as is None else [],
            pass_fds=(held_by_child,),
            start_new_session=True,
        )


def _feed(process: subprocess.Popen[bytes], stdin: bytes) -> None:
    if process.stdin:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(stdin)


def _pump(output: IO[bytes], command: Command) -> None:
    with command.log.open("ab", buffering=0) as log:
        for line in output:
            log.write(line)
            if command.echo:
                command.echo(line.decode(errors="replace").rstrip("\n"))


def _closed_within(pipe: int, within: timedelta) -> bool:
    watched = select.poll()
    watched.register(pipe, select.POLLIN)
    return bool(watched.poll(within / timedelta(milliseconds=1)))
