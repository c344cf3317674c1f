"""A server that runs as one child process, with its own temporary directory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from followups.embedded.child import Child, Command, EmbeddedError
from followups.embedded.directories import make_temporary_directory, remove_directory

if TYPE_CHECKING:
    from datetime import timedelta
    from pathlib import Path
    from types import TracebackType
    from typing import Self


class EmbeddedServer(ABC):
    """Starts and stops the server, either in a ``with`` block or by `start` and `stop`."""

    name: ClassVar[str]
    """The program's name, for use in error messages."""
    start_within: ClassVar[timedelta]
    """How long the server may take to start."""

    def __init__(self, parent: Path | None = None) -> None:
        """Store the parent of the temporary directory without starting the server."""
        self._parent = parent
        self._directory: Path | None = None
        self._server: Child | None = None

    def __enter__(self) -> Self:
        """Start the server."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self.stop()

    @property
    def child(self) -> Child:
        """The server's process. Raises `EmbeddedError` unless the server was started."""
        if self._server is None:
            message = f"{self.name} was not started."
            raise EmbeddedError(message)
        return self._server

    @property
    def directory(self) -> Path:
        """The temporary directory. Raises `EmbeddedError` unless the server was started."""
        if self._directory is None:
            message = f"{self.name} was not started."
            raise EmbeddedError(message)
        return self._directory

    def start(self) -> None:
        """Start the server and wait until it is ready. Raises `EmbeddedError`."""
        self._directory = make_temporary_directory(self._parent)
        try:
            self._server = Child(self._prepare(self._directory))
            self._run(self._server)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and remove its temporary files."""
        if self._server:
            self._server.stop()
            self._server = None
        if self._directory:
            remove_directory(self._directory)
            self._directory = None

    def restart(self) -> None:
        """Stop the server if it is running, and start it again. The URL stays the same.

        Data is kept only if the server has a data directory.
        """
        self.child.stop()
        self._run(self.child)

    def kill(self) -> None:
        """Kill the server and its children with SIGKILL; `restart` starts it again."""
        self.child.kill()

    def _run(self, server: Child) -> None:
        server.start()
        server.wait_until(self._is_ready, self.start_within)

    @abstractmethod
    def _prepare(self, directory: Path) -> Command:
        """Write the server's configuration and return its command."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Return whether the server answers requests."""
