"""The demo's script: its chats, each follow-up's due date and the expected endings. `DemoRun` performs it.

The demo's requests go to the REST API, like those of a chat platform.
"""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

from followups.errors import FollowUpsError
from followups.states import ReasonCode, Status
from followups.wording import rfc3339

if TYPE_CHECKING:
    from followups.embedded.system import Stack


@dataclass(frozen=True, slots=True)
class Ending:
    """How a follow-up is expected to end. ``attempts`` is the number of requests to the receiver."""

    status: Status
    attempts: int
    code: ReasonCode | None = None


@dataclass(frozen=True, slots=True)
class ScenarioStep:
    """A follow-up in the demo's script. ``due`` is the due time, in seconds after the demo's start."""

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
    """The demo's script: follow-ups in due order, and the actions of the receiver and users."""

    parts: tuple[ScenarioStep, ...]
    failures: dict[str, int]
    """How many times the receiver responds with 500 in each chat before it accepts a message."""
    refused: frozenset[str]
    """The chats for which the receiver responds with 403."""
    replies: dict[str, float]
    """For each chat in which the user replies, the seconds until the reply."""

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

Due times based on the golden ratio are spread evenly but without a pattern, as in real chats.
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


TIMEOUT = 30.0
"""Seconds to wait for a response."""

FIRST_ERROR = 400

LEAST_LEAD = 1.5
"""Minimum seconds between a follow-up's creation and its due time.

Each follow-up is created before it is due, so that its lag depends only on its delivery.
"""

CALLS_A_CHAT = 3
"""Number of requests that are needed to open one chat. The requests that open chats are timed, to estimate the duration
of all other requests.
"""


class RestClient:
    """An HTTP client for one host, for use in one thread."""

    def __init__(self, address: str, key: str = "") -> None:
        """Store the URL, ``http://host:port``, and an optional API key. The connection is opened by the first call."""
        self._connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=TIMEOUT)
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def close(self) -> None:
        """Close the connection. The next call opens a new connection."""
        self._connection.close()

    def call(self, method: str, path: str, document: object = None) -> Any:  # noqa: ANN401 - any JSON
        """Send a request and return the response's JSON.

        Raises `FollowUpsError` if the response is an error or there is no response.
        """
        body = None if document is None else json.dumps(document)
        try:
            self._connection.request(method, path, body, self._headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            message = f"{method} {path} got no answer ({type(error).__name__})."
            raise FollowUpsError(message) from error
        if answer.status >= FIRST_ERROR:
            message = f"{method} {path} was answered with {answer.status}: {content.decode(errors='replace')[:300]}"
            raise FollowUpsError(message)
        return json.loads(content) if content else None


class DemoRun:
    """The chats of one demo, for use in a single thread."""

    def __init__(self, stack: Stack, key: str, scenario: Scenario) -> None:
        """Store the API's address and the script, without opening a chat."""
        self._api = RestClient(stack.api, key)
        self._sandbox = RestClient(stack.sandbox)
        self._scenario = scenario
        self._chats = {name: uuid4() for name in scenario.chats}
        self._replies = dict(scenario.replies)
        self.start = datetime.now(UTC)
        """The time at which the scenario starts."""

    def open_chats(self) -> timedelta:
        """Open the chats, write an agent's message in each, and configure the receiver.

        Return the average duration of a call.
        """
        began = time.monotonic()
        for name, chat in self._chats.items():
            self._api.call("PUT", f"/api/v1/chats/{chat}", {"channel": "widget", "externalId": name})
            self._write(chat, "agent", f"Hello {name}, how can I help you?")
        for name, times in self._scenario.failures.items():
            self._behave(name, {"kind": "fail", "times": times})
        for name in self._scenario.refused:
            self._behave(name, {"kind": "reject"})
        return timedelta(seconds=(time.monotonic() - began) / (CALLS_A_CHAT * len(self._chats)))

    def schedule(self, call: timedelta) -> list[Scheduled]:
        """Create every follow-up.

        If each request takes at most twice ``call``, all follow-ups exist before the first one is due.
        """
        lead = max(timedelta(seconds=LEAST_LEAD), 2 * call * len(self._scenario.parts))
        self.start = datetime.now(UTC) + lead
        return [self._create(part) for part in self._scenario.parts]

    def play(self, now: datetime) -> list[str]:
        """Send the users' messages that are due; return the names of the chats."""
        due = [name for name, at in self._replies.items() if now >= self.start + timedelta(seconds=at)]
        for name in due:
            del self._replies[name]
            self._write(self._chats[name], "user", "Yes, I am back. Thank you!")
        return due

    def receipts(self) -> dict[str, object]:
        """Return the receiver's summary of all requests so far."""
        counted: dict[str, object] = self._sandbox.call("GET", "/sandbox/summary")
        return counted

    def close(self) -> None:
        """Close the connections."""
        self._api.close()
        self._sandbox.close()

    def _create(self, part: ScenarioStep) -> Scheduled:
        due = self.start + timedelta(seconds=part.due)
        document = {"chatId": str(self._chats[part.chat]), "dueDate": rfc3339(due), "message": part.message}
        created = self._api.call("POST", "/api/v1/chat-message-follow-ups", document)
        return Scheduled(UUID(created["id"]), part, due)

    def _write(self, chat: UUID, role: str, text: str) -> None:
        # The API takes no message text; the sandbox shows the text on its page.
        self._sandbox.call("POST", f"/sandbox/chats/{chat}/messages", {"role": role, "text": text})
        message = {"id": str(uuid4()), "chatId": str(chat), "role": role}
        self._api.call("POST", "/api/v1/chat-messages", message)

    def _behave(self, name: str, behaviour: dict[str, object]) -> None:
        self._sandbox.call("PUT", f"/sandbox/chats/{self._chats[name]}/behaviour", behaviour)
