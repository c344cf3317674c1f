"""Heartbeat files: each worker or beat writes its state to a file that supervisors read.

Each process keeps one small file in the runtime directory, rewritten every second. For each component that must make
progress, the file contains a deadline for the next report. Reading the file needs neither Celery nor the broker. A
check therefore costs little more than starting a Python interpreter. Supervisors do not restart the processes during a
broker outage, because a restart would not help.

- Times are on the monotonic clock, which all processes of a machine share. So setting the wall clock raises no alarm,
  and after a machine has slept, its processes do not count as dead.
- The writer keeps a lock on its file. The kernel releases the lock when the process ends, even if it is killed. So a
  leftover file is never mistaken for the file of a hanging process, even if the process id has been reused.
- A process that is stopped, or whose threads no longer run, stops writing, so its file grows old.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SETTING = "FOLLOWUPS_RUNTIME_DIR"
"""The environment variable of the runtime directory. This variable is read directly, because loading all settings takes
a third of a second.
"""

INTERVAL = timedelta(seconds=1)
SILENCE = timedelta(seconds=10)
"""A process whose heartbeat file is older than this counts as stopped. On a busy machine, a heartbeat may be a second
or two late.
"""

SIZE = 2048
"""Size of a heartbeat file in bytes. The file is written by one system call, so no reader sees half a file."""

TRIES = 50
PAUSE = 0.02
"""Seconds between two tries to lock a file that another process is reading or writing."""


class HeartbeatError(Exception):
    """The runtime directory cannot be used."""


def default_directory() -> Path:
    """Return the default runtime directory.

    Each user has a separate directory, because another user's directory cannot be trusted. ``XDG_RUNTIME_DIR`` is not
    used, because it exists in login sessions but not in services. With `XDG_RUNTIME_DIR`, a login session and a service
    would use different directories.
    """
    try:
        parent = tempfile.gettempdir()
    except FileNotFoundError:  # no directory is writable, and `_open_directory` reports this
        parent = "/tmp"  # noqa: S108 - `_open_directory` makes it private
    return Path(parent) / f"followups-{os.getuid()}"


def directory_of(configured: str | None) -> Path:
    """Return the runtime directory that the setting names; an empty value counts as unset."""
    return Path(configured) if configured else default_directory()


def _open_directory(path: Path) -> None:
    """Create the directory, or reject the default directory if another user has created it. Raises `HeartbeatError`."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        message = f"{path}: {error.strerror}"
        raise HeartbeatError(message) from None
    if not stat.S_ISDIR(found.st_mode) or (found.st_uid != os.getuid() and path == default_directory()):
        message = f"{path} is not a directory of this user's"
        raise HeartbeatError(message)


class Heartbeat:
    """The heartbeat of one process. The method `report` may be called from any thread."""

    def __init__(self, directory: Path, role: str, name: str) -> None:
        """Store the process's role (``worker``, ``beat``) and its name, which is shown to operators."""
        self._path = directory / f"{role}-{socket.gethostname()}-{os.getpid()}.json"
        self._about = {"role": role, "name": name, "pid": os.getpid()}
        self._components: dict[str, dict[str, Any]] = {}
        self._waits: dict[str, Any] | None = None
        self._probes: list[Callable[[], None]] = []
        # reentrant, because a signal handler may interrupt `report` and call it again
        self._lock = threading.RLock()
        self._ending = False
        self._stopping = threading.Event()
        self._file = -1
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start writing the heartbeat file. Raises `HeartbeatError` if the directory cannot be used."""
        _open_directory(self._path.parent)
        _remove_stale_files(self._path.parent)
        try:
            self._file = _open_locked(self._path)
            self._write()
        except OSError as error:
            message = f"{self._path}: {error.strerror}"
            raise HeartbeatError(message) from None
        self._thread.start()

    def probe(self, report_progress: Callable[[], None]) -> None:
        """Register a function that reports a component's progress before each heartbeat is written."""
        self._probes.append(report_progress)

    def report(self, component: str, within: timedelta, otherwise: str, at: float | None = None) -> None:
        """Record that a component made progress.

        ``at`` is the time of the progress in monotonic seconds; the default is now. ``within`` is the longest time that
        may pass before the component's next report. If the next report is late, the heartbeat names the component and
        shows ``otherwise``. For example, ``otherwise`` can be "has not asked the broker for work".
        """
        with self._lock:
            if not self._ending:
                self._components[component] = _component_state(
                    within, otherwise, time.monotonic() if at is None else at
                )

    def wait(self, why: str, since: float = 0.0) -> None:
        """Record why the process makes no progress; an empty reason clears the record.

        ``since`` is the monotonic time, in seconds, at which the process stopped making progress.
        """
        self._waits = {"why": why, "since": since} if why else None

    def waits(self) -> str:
        """Return why and for how long this process has made no progress, for the heartbeat file."""
        return _waits({"waits": self._waits}, time.monotonic())

    def end(self, within: timedelta, otherwise: str) -> None:
        """Stop expecting reports from the components, because the process is about to end."""
        with self._lock:
            self._ending = True
            self._components = {"end": _component_state(within, otherwise, time.monotonic())}

    def trouble(self) -> str:
        """Return the problem that the heartbeat file shows, or an empty string."""
        return _trouble({"written": time.monotonic(), "parts": self.components()}, time.monotonic())

    def components(self) -> dict[str, dict[str, Any]]:
        """Return the components in the heartbeat file's format."""
        with self._lock:
            return dict(self._components)

    def stop(self) -> None:
        """Stop writing and remove the heartbeat file."""
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL.total_seconds()):
            for report_progress in self._probes:
                report_progress()
            # on a full disk, the heartbeat file is no longer updated, so supervisors notice the fault
            with suppress(OSError):
                self._write()

    def _write(self) -> None:
        document = {**self._about, "written": time.monotonic(), "parts": self.components(), "waits": self._waits}
        os.pwrite(self._file, json.dumps(document).encode().ljust(SIZE)[:SIZE], 0)


def _component_state(within: timedelta, otherwise: str, at: float) -> dict[str, Any]:
    return {"since": at, "due": at + within.total_seconds(), "otherwise": otherwise}


def _open_locked(path: Path) -> int:
    """Return the open heartbeat file, which stays locked while this process runs. Raises OSError."""
    for _ in range(TRIES):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Before this process locked the file, another process may have removed it as a leftover.
            if os.fstat(file).st_ino == path.stat().st_ino:
                return file
        except OSError:  # another process is reading the file, or has just removed it
            pass
        os.close(file)
        time.sleep(PAUSE)
    raise OSError(errno.EAGAIN, "it is locked by another process")


@dataclass(frozen=True, slots=True)
class ProcessState:
    """The content of one heartbeat file.

    ``trouble`` is empty if there is no problem, and ``waits`` is empty if the process makes progress.
    """

    name: str
    pid: int
    trouble: str
    waits: str = ""


def read_states(directory: Path, role: str, name: str = "") -> list[ProcessState]:
    """Return the states of a role's processes on this machine, or only that of the process ``name``.

    ``name`` is a Celery node's name, or the part before the ``@``. Processes that have ended are not included.
    """
    documents = [document for path in _files(directory, role) if (document := _read(path)) is not None]
    return [
        ProcessState(each["name"], each["pid"], _trouble(each, time.monotonic()), _waits(each, time.monotonic()))
        for each in documents
        if name in {"", each["name"], each["name"].partition("@")[0]}
    ]


def _trouble(document: dict[str, Any], now: float) -> str:
    if now - document["written"] > SILENCE.total_seconds():
        return f"has written no heartbeat for {now - document['written']:.0f} s"
    for component in document["parts"].values():
        if now > component["due"]:
            return f"{component['otherwise']} for {now - component['since']:.0f} s"
    return ""


def _waits(document: dict[str, Any], now: float) -> str:
    # A process of an older version does not write the field `waits`.
    waits = document.get("waits")
    return f"{waits['why']}, for {now - waits['since']:.0f} s" if waits else ""


def _files(directory: Path, role: str) -> list[Path]:
    return sorted(directory.glob(f"{role}-{socket.gethostname()}-*.json"))


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a process's heartbeat file, or None if the process has ended."""
    for _ in range(TRIES):
        try:
            with path.open("rb") as file:
                if not _is_held(file.fileno()):
                    return None
                document: dict[str, Any] = json.loads(file.read())
                return document
        except ValueError:
            time.sleep(PAUSE)
        except OSError:
            return None
    return None


def _is_held(file: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.lockf(file, fcntl.LOCK_UN)
    return False


def _remove_stale_files(directory: Path) -> None:
    """Remove the heartbeat files of processes that were killed."""
    for path in directory.glob(f"*-{socket.gethostname()}-*.json"):
        with suppress(OSError), path.open("rb") as file:
            if not _is_held(file.fileno()):
                path.unlink(missing_ok=True)
