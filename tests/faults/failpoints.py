"""Arms failpoints in a test; `injected/sitecustomize.py` triggers them in the processes.

The steps ``claim``, ``begin`` and ``settle`` each have the failpoints ``.before``, ``.before_commit``, ``.answer_lost``
and ``.committed``. At ``.answer_lost``, the commit succeeds but its acknowledgement is lost. The step ``send`` has the
failpoints ``.before`` and ``.answered``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

INJECTED = Path(__file__).parent / "injected"


@dataclass
class Failpoints:
    """The armed failpoints of one system; ``directory`` must be empty and belong to this system."""

    directory: Path
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def environment(self) -> dict[str, str]:
        """Return the environment variables that enable failpoints in a process."""
        return {"PYTHONPATH": str(INJECTED), "FOLLOWUPS_TEST_FAILPOINTS": str(self.directory)}

    def arm(self, point: str, action: str = "kill", times: int = 1) -> None:
        """Arm this failpoint: the next ``times`` hits, by any process, perform the action.

        The action is ``kill``, ``stop``, ``raise``, ``sleep S``, or ``suspend``, which imitates a sleeping machine.
        """
        for _ in range(times):
            unseen = self.directory / f"new.{next(self._numbers):06}"
            unseen.write_text(action)
            unseen.rename(self.directory / f"{point}@{unseen.suffix[1:]}")

    def taken(self, point: str = "") -> int:
        """Return how many armed failpoints have been hit at this point, or at all points by default."""
        return len(list(self.directory.glob(f"taken.{point}*")))

    def disarm(self) -> None:
        """Disarm all failpoints."""
        for path in self.directory.glob("*@*"):
            if not path.name.startswith("taken."):
                path.unlink(missing_ok=True)
