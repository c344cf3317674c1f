"""The checks of ``followups doctor``, which return or yield findings and never raise.

A finding with advice needs immediate attention. A finding without advice is for information only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check. ``advice`` says how to fix the problem, and is empty if there is no problem."""

    name: str
    detail: str
    advice: str = ""

    @property
    def ok(self) -> bool:
        """Whether the check passed."""
        return not self.advice

    def document(self) -> dict[str, object]:
        """Return the JSON form of the finding."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "advice": self.advice}
