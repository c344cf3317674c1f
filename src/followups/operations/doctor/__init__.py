"""The checks of ``followups doctor``. Each returns or yields findings, and none raises.

A finding with advice has to be dealt with now; one without advice is information.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check. ``advice`` says what to do; without advice all is well."""

    name: str
    detail: str
    advice: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is nothing to do."""
        return not self.advice

    def document(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "advice": self.advice}
