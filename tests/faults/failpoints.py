"""Arms failpoints from the test; `injected/sitecustomize.py` is the counterpart in the processes.

Points: ``claim``, ``begin`` and ``settle`` each with ``.before``, ``.before_commit``, ``.answer_lost`` (committed, but
the connection broke before the answer) and ``.committed``; ``send.before`` and ``send.answered``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

INJECTED = Path(__file__).parent / "injected"


@dataclass
class Failpoints:
    """The armed failpoints; ``directory`` is empty and belongs to one system."""

    directory: Path
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def environment(self) -> dict[str, str]:
        """Return the environment of processes that failpoints act on."""
        return {"PYTHONPATH": str(INJECTED), "FOLLOWUPS_TEST_FAILPOINTS": str(self.directory)}

    def arm(self, point: str, action: str = "kill", times: int = 1) -> None:
        """Arm the next ``times`` hits of the point, by any process, with this action.

        The action is ``kill``, ``stop``, ``suspend`` (stop as on a machine that sleeps), ``raise`` or ``sleep S``.
        """
        for _ in range(times):
            unseen = self.directory / f"new.{next(self._numbers):06}"
            unseen.write_text(action)
            unseen.rename(self.directory / f"{point}@{unseen.suffix[1:]}")

    def taken(self, point: str = "") -> int:
        """Return how many armings (of this point) were hit."""
        return len(list(self.directory.glob(f"taken.{point}*")))

    def disarm(self) -> None:
        """Let nothing be armed."""
        for path in self.directory.glob("*@*"):
            if not path.name.startswith("taken."):
                path.unlink(missing_ok=True)
