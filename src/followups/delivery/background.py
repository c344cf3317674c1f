"""Work in a thread of its own in a worker process, started again whenever there may be some."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod


class Background(ABC):
    """A thread while there is work. A start while it runs does nothing."""

    name: str

    def __init__(self) -> None:
        """Prepare; nothing runs yet."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Run once, in a thread. Returns at once."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop after the current batch; another process or a later run continues with the rest."""
        self._stopping.set()
        if self._thread and self._thread.is_alive():
            self._thread.join()

    @abstractmethod
    def _run(self) -> None:
        """Do the work, until it is done or `stop` is called. Errors are reported, never raised."""
