"""Background work in a thread of a worker process, which is started whenever there may be work."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod


class Background(ABC):
    """A thread that runs while there is work. Starting the thread while it is running has no effect."""

    name: str

    def __init__(self) -> None:
        """Prepare the thread, but do not start it."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the work in a thread unless the thread is already running, and return immediately."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop after the current batch; another process or a later run does the remaining work."""
        self._stopping.set()
        if self._thread and self._thread.is_alive():
            self._thread.join()

    @abstractmethod
    def _run(self) -> None:
        """Do the work until it is finished or `stop` is called. Errors are reported, never raised."""
