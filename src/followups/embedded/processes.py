"""The commands of the project (worker, beat, web, ...), started one by one and stopped together.

A test checks that each process has the same command line as in the Procfile.
"""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
import urllib.request
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from followups.embedded.child import Child, Command
from followups.embedded.directories import make_temporary_directory, remove_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self


COMMANDS = {
    "web": "python -m followups.api",  # web comes first, so that it gets a Procfile runner's base port
    # Under honcho, each worker needs a distinct name. Without honcho, a host usually runs only one worker.
    "worker": (
        "celery -A followups.worker --quiet worker --loglevel=warning --hostname=${HONCHO_PROCESS_NAME:-worker}@%h"
        " --without-mingle --without-gossip"
    ),
    "beat": "celery -A followups.worker --quiet beat --loglevel=warning",
    # Flower can show and stop tasks. A password is therefore required on any address but the loopback address
    # (`followups.worker.flower`).
    "flower": ("celery -A followups.worker flower --loglevel=warning --address=${FLOWER_ADDRESS:-127.0.0.1}"),
    "release": "followups migrate",
}
"""Shell commands by process type, in a form that every Procfile runner accepts."""


def argv(process: str, *more: str) -> list[str]:
    """Return the Procfile's command for a process as arguments, followed by ``more``.

    The command must be run with the PATH that `search_path` returns.
    """
    return ["/bin/sh", "-c", f'exec {COMMANDS[process]} "$@"', process, *more]


def search_path() -> str:
    """Return a PATH in which this installation's commands precede all others."""
    own = (str(Path(sys.executable).parent), sysconfig.get_path("scripts"))
    return os.pathsep.join([*dict.fromkeys(own), os.environ.get("PATH", os.defpath)])


class Processes:
    """The commands of the project (worker, beat, web, ...), started one by one and stopped together."""

    def __init__(self, logs: Path | None = None, echo: Callable[[str, str], None] | None = None) -> None:
        """Write logs to ``logs`` or to a temporary directory; also pass each line and its process to ``echo``."""
        self.logs = logs or make_temporary_directory()
        self._temporary = logs is None
        self._echo = echo
        self.children: list[Child] = []

    def __enter__(self) -> Self:
        """Return these processes."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop all processes."""
        self.stop()

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        ready: Callable[[], bool] | None = None,
        within: timedelta = timedelta(seconds=90),
        grace: timedelta = timedelta(seconds=30),
    ) -> Child:
        """Start a command in the current environment plus ``environment``, and wait until it is ready.

        If the command does not become ready, raises `EmbeddedError` with the end of the log.
        """
        echo = self._echo
        command = Command(
            name=name,
            argv=argv,
            log=self.logs / f"{name}.log",
            environment={**os.environ, **(environment or {})},
            grace=grace,
            echo=(lambda line: echo(name, line)) if echo else None,
        )
        child = Child(command)
        child.start()
        self.children.append(child)
        if ready:
            child.wait_until(ready, within)
        return child

    def ended(self) -> list[Child]:
        """Return the commands that have ended by themselves."""
        return [child for child in self.children if child.exit_code is not None]

    def stop(self) -> None:
        """Send each process the stop signal, wait up to its ``grace``, then kill those still running."""
        for child in reversed(self.children):
            child.ask()
        # stop every process, newest first, even if one cannot be stopped
        with ExitStack() as stack:
            if self._temporary:
                stack.callback(remove_directory, self.logs)
            for child in self.children:
                stack.callback(child.stop)
            self._temporary = False
            self.children = []


def answers(url: str) -> Callable[[], bool]:
    """Return a readiness check: whether a GET of the URL returns 2xx within a second."""

    def check() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=1):  # noqa: S310 - our own loopback URL
                return True
        except (OSError, urllib.error.URLError):
            return False

    return check


def free_port() -> int:
    """Return a free TCP port of the loopback interface.

    On Linux, the port stays reserved until this process ends, so each call keeps one socket open.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = int(reserved.getsockname()[1])
        # While this socket is open, the kernel does not give its port to a socket that binds to port 0. On Linux, a
        # server with SO_REUSEADDR can still listen on the port. Detached, the socket stays open until the process ends.
        if sys.platform == "linux":
            reserved.detach()
    return port
