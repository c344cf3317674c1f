"""Records and prints the figures of each fault test for the table of results."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faults.promises import Verdict

KEPT = "FOLLOWUPS_TEST_FIGURES"
"""The file to which figures are appended as JSON lines; without it, figures are only printed."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Records the figures of one test."""

    seed: int
    test: str
    form: str
    """The form of the test, ``short`` or ``long``."""

    def keep(self, fault: int, verdict: Verdict | None = None, **figures: Any) -> None:
        """Record the figures measured for a fault; fail if a promise was broken.

        The name of a figure is in snake_case and ends with the unit: ``recovery_s``, ``claim_p99_ms``.
        """
        line = {"fault": fault, "form": self.form, "test": self.test, "seed": self.seed, "figures": figures}
        line["at"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
        if verdict:
            line["ended"] = dict(verdict.ended)
            line["broken"] = verdict.broken()
            line["unknown"], line["repeated"] = verdict.unknown, verdict.repeated
        print(json.dumps(line))  # noqa: T201 - pytest shows it where a test fails
        if path := os.environ.get(KEPT):
            with Path(path).open("a") as file:
                file.write(json.dumps(line) + "\n")
        assert not (verdict and verdict.broken()), verdict
