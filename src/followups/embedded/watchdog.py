"""Stops the children of a process that ended without stopping them itself.

The watchdog reads from a pipe that its owner process keeps open. When the owner process ends, even by SIGKILL, the
kernel closes the owner's end of the pipe. A pipe works on every Unix and in every thread. Linux's parent-death signal
is bound to one thread and does not reach grandchildren.

The process to be watched imports this module. The watchdog process runs this file as a script. The script uses only the
standard library and starts in about 20 ms. Each owner has one watchdog, which runs as long as there is something to
guard.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

POLL = 0.02
"""Seconds between two checks of a process that has received its stop signal."""

REMOVAL_TRIES = 50
"""How many times to try to remove a directory in use, at intervals of `POLL`."""


class Watchdog:
    """The watchdog as its owner sees it: the guarded processes and directories, and the pipe."""

    def __init__(self) -> None:
        """Create a watchdog that does not guard anything yet.

        The watchdog process starts with the first `guard_process` or `guard_directory`.
        """
        self._lock = threading.Lock()
        self._guarded: dict[int | str, list[object]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        os.register_at_fork(after_in_child=self._close_in_fork)

    def guard_process(self, pid: int, stop_signal: signal.Signals, grace: float) -> None:
        """Have the watchdog stop a process once the owner has ended.

        The watchdog sends the signal to the process and, after ``grace`` seconds, SIGKILL to its group.
        """
        self._guard(pid, ["process", pid, int(stop_signal), grace])

    def guard_directory(self, path: Path) -> None:
        """Have the watchdog remove the directory after the owner and the guarded processes have ended."""
        self._guard(str(path), ["directory", str(path)])

    def release(self, key: int | Path) -> None:
        """Stop guarding this pid or directory. After the last pid or directory has been released, the watchdog ends."""
        name = key if isinstance(key, int) else str(key)
        with self._lock:
            self._guarded.pop(name, None)
            self._send(["release", name])
            if not self._guarded:
                self._end()

    def _guard(self, key: int | str, entry: list[object]) -> None:
        with self._lock:
            self._guarded[key] = entry
            if self._process is None:
                self._start()
            else:
                self._send(entry)

    def _start(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - this very file
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            # The watchdog must not inherit the owner's output. A program that reads the owner's output would otherwise
            # wait until the watchdog ends.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        for entry in self._guarded.values():
            self._send(entry)

    def _send(self, entry: list[object]) -> None:
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(json.dumps(entry).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # the watchdog was killed, so a new one is started with the complete list
            self._end()
            self._start()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(BrokenPipeError):
                process.communicate()

    def _close_in_fork(self) -> None:
        """Close a forked child's copy of the pipe, so that the watchdog notices when the owner ends."""
        self._lock = threading.Lock()
        self._guarded = {}
        if self._process is not None and self._process.stdin is not None:
            os.close(self._process.stdin.fileno())
            self._process.returncode = 0  # the watchdog is not a child of this process, so nothing is left to wait for
        self._process = None


WATCHDOG = Watchdog()
"""The watchdog of this process."""


def is_alive(pid: int) -> bool:
    """Return whether the process exists and is not a zombie.

    A zombie does not count as alive, since its parent may never collect it.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError, IndexError):  # on a system without /proc, a zombie counts as alive
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    return True


def stop(pid: int, stop_signal: int, grace: float) -> None:
    """Signal a process; once it ends or ``grace`` seconds pass, kill its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, stop_signal)
    deadline = time.monotonic() + grace
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(POLL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def remove(directory: str) -> None:
    """Remove the directory; retry if a program is still writing into it."""
    for _ in range(REMOVAL_TRIES):
        shutil.rmtree(directory, ignore_errors=True)
        if not Path(directory).exists():
            return
        time.sleep(POLL)


def main() -> None:
    """When the owner has ended, stop its processes and remove its directories, as listed on stdin.

    The processes and directories that were added last are stopped and removed first.
    """
    processes: dict[int, tuple[int, float]] = {}
    directories: set[str] = set()
    for line in sys.stdin:
        verb, key, *how = json.loads(line)
        if verb == "process":
            processes[key] = (how[0], how[1])
        elif verb == "directory":
            directories.add(key)
        else:
            processes.pop(key, None)
            directories.discard(key)
    for pid, (stop_signal, grace) in reversed(processes.items()):
        stop(pid, stop_signal, grace)
    for directory in directories:
        remove(directory)


if __name__ == "__main__":
    main()
