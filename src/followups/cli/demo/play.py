"""Plays the demo's scenario through the REST API, as a chat platform would."""

from __future__ import annotations

import http.client
import json
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

from followups.cli.demo.scenario import Scheduled
from followups.errors import FollowUpsError
from followups.wording import rfc3339

if TYPE_CHECKING:
    from followups.cli.demo.scenario import Scenario, ScenarioStep
    from followups.embedded.system import Stack

TIMEOUT = 30.0
"""Seconds to wait for a response."""

FIRST_ERROR = 400

LEAST_LEAD = 1.5
"""Minimum seconds between a follow-up's creation and its due time.

Every follow-up is created before it is due, so that its lag shows only how punctual the dispatcher is.
"""

CALLS_A_CHAT = 3
"""Number of requests that open one chat. The duration of these requests predicts how long all other requests take."""


class Rest:
    """An HTTP client for one host, for use in one thread."""

    def __init__(self, address: str, key: str = "") -> None:
        """Store ``http://host:port`` and an optional API key. The first call opens the connection."""
        self._connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=TIMEOUT)
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def close(self) -> None:
        """Close the connection. The next call opens a new one."""
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


class Stage:
    """The chats of one run of the demo, for use in one thread."""

    def __init__(self, stack: Stack, key: str, scenario: Scenario) -> None:
        """Store the API's address and the script, without opening any chat."""
        self._api = Rest(stack.api, key)
        self._sandbox = Rest(stack.sandbox)
        self._scenario = scenario
        self._chats = {name: uuid4() for name in scenario.chats}
        self._replies = dict(scenario.replies)
        self.start = datetime.now(UTC)
        """The moment that counts as second 0 of the scenario."""

    def open_chats(self) -> timedelta:
        """Open the chats with an agent's message in each, and configure the receiver.

        Return the seconds that one call takes.
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

        All follow-ups are created before the first one is due, provided that no request takes more than twice ``call``.
        """
        lead = max(timedelta(seconds=LEAST_LEAD), 2 * call * len(self._scenario.parts))
        self.start = datetime.now(UTC) + lead
        return [self._create(part) for part in self._scenario.parts]

    def play(self, now: datetime) -> list[str]:
        """Send the user messages that are due, and return the names of the chats that they belong to."""
        due = [name for name, at in self._replies.items() if now >= self.start + timedelta(seconds=at)]
        for name in due:
            del self._replies[name]
            self._write(self._chats[name], "user", "Yes, I am back. Thank you!")
        return due

    def receipts(self) -> dict[str, object]:
        """Return the receiver's summary of the requests that it has received."""
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
        # The API accepts no text for a chat message; the sandbox shows this text on its page.
        self._sandbox.call("POST", f"/sandbox/chats/{chat}/messages", {"role": role, "text": text})
        message = {"id": str(uuid4()), "chatId": str(chat), "role": role}
        self._api.call("POST", "/api/v1/chat-messages", message)

    def _behave(self, name: str, behaviour: dict[str, object]) -> None:
        self._sandbox.call("PUT", f"/sandbox/chats/{self._chats[name]}/behaviour", behaviour)
