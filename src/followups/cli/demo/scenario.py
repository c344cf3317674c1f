"""The demo's script: its chats, each follow-up's due date, and the expected endings. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from followups.states import ReasonCode, Status

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID


@dataclass(frozen=True, slots=True)
class Ending:
    """How a follow-up is expected to end. ``attempts`` is the number of requests to the receiver."""

    status: Status
    attempts: int
    code: ReasonCode | None = None


@dataclass(frozen=True, slots=True)
class ScenarioStep:
    """A follow-up of the demo's script. ``due`` is the due time in seconds after the start."""

    chat: str
    due: float
    message: str
    ending: Ending


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A follow-up of the scenario, with its id in the API."""

    id: UUID
    part: ScenarioStep
    due: datetime


@dataclass(frozen=True, slots=True)
class Scenario:
    """All follow-ups in the order of their due times, and the behaviour of the receiver and the users."""

    parts: tuple[ScenarioStep, ...]
    failures: dict[str, int]
    """How many times the receiver responds with 500 in each chat before it accepts a message."""
    refused: frozenset[str]
    """The chats in which the receiver responds with 403."""
    replies: dict[str, float]
    """The chats in which the user replies, each with the time of the reply in seconds after the start."""

    @property
    def chats(self) -> list[str]:
        """The chats, in the order in which the script lists them."""
        return list(dict.fromkeys(part.chat for part in sorted(self.parts, key=lambda part: NAMES.index(part.chat))))


STEADY = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gita", "Hugo")
"""The chats in which every follow-up arrives on time."""

FAILURES = {"Iris": 1, "Juan": 2, "Kim": 2}
REFUSED = "Max"
REPLYING = "Lena"
NAMES = (*STEADY, *FAILURES, REPLYING, REFUSED)

EACH = 6
"""Number of follow-ups in each steady chat."""
DURATION = 9.5
"""Seconds between the first due time and the last."""
REPLY_AT = 5.0
GOLDEN = 0.618_033_988_75
"""The fractional part of the golden ratio.

The fractional parts of its multiples are spread evenly without a pattern, so the due times resemble those of real
chats.
"""

SENT = Ending(Status.SENT, attempts=1)
CANCELLED = Ending(Status.CANCELLED, attempts=0, code=ReasonCode.USER_REPLIED)
REJECTED = Ending(Status.FAILED, attempts=1, code=ReasonCode.REJECTED)

LINES = (
    "Hello! Did you find what you were looking for?",
    "I am still here if you have a question.",
    "Your basket is waiting for you.",
    "Shall I keep the appointment for you?",
    "A colleague can call you, if you prefer.",
    "This is my last reminder for today. Take care!",
)


def script() -> Scenario:
    """Return the demo's scenario, which is the same in every run."""
    steady = [_steady(number) for number in range(len(STEADY) * EACH)]
    flaky = [
        ScenarioStep(name, 0.7 + number, "The receiver fails before it takes this.", Ending(Status.SENT, failures + 1))
        for number, (name, failures) in enumerate(FAILURES.items())
    ]
    replied = [
        ScenarioStep(REPLYING, 2.6, "Would you like to go on?", SENT),
        ScenarioStep(REPLYING, 7.9, "This is never sent: Lena replied.", CANCELLED),
        ScenarioStep(REPLYING, 9.1, "Neither is this.", CANCELLED),
    ]
    refused = [ScenarioStep(REFUSED, 4.3, "The receiver refuses this.", REJECTED)]
    parts = sorted([*steady, *flaky, *replied, *refused], key=lambda part: part.due)
    return Scenario(tuple(parts), dict(FAILURES), frozenset({REFUSED}), {REPLYING: REPLY_AT})


def _steady(number: int) -> ScenarioStep:
    turn, chat = divmod(number, len(STEADY))
    step = DURATION / (len(STEADY) * EACH)
    return ScenarioStep(STEADY[chat], round((number + GOLDEN * number % 1) * step, 3), LINES[turn], SENT)
