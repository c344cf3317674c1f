"""One chat of the sandbox as people see it: the latest messages, each with its attempts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from followups.transports.sandbox.ledger import timestamp

if TYPE_CHECKING:
    from followups.transports.sandbox.ledger import Record

KEEP_MESSAGES = 30
"""Messages kept for each chat."""
KEEP_ATTEMPTS = 20
"""Attempts kept for each message."""
KEEP_TEXT = 2_000
"""Characters kept of each message."""


@dataclass(slots=True)
class Message:
    """A message in the chat: a follow-up with its attempts, or a participant's own message without any."""

    id: str
    role: str
    """``follow_up``, ``user``, ``agent`` or ``operator``."""
    text: str
    at: float
    """When it first appeared, in Unix time."""
    attempts: list[Record] = field(default_factory=list)

    def document(self) -> dict[str, object]:
        """Return the JSON form; ``lagMs`` belongs to the first accepted attempt."""
        accepted = next((record for record in self.attempts if record.accepted), None)
        return {
            "id": self.id,
            "role": self.role,
            "text": self.text,
            "at": timestamp(self.at),
            "dueDate": timestamp(self.attempts[0].due) if self.attempts else None,
            "accepted": accepted is not None,
            "receivedAt": timestamp(accepted.received.wall) if accepted else None,
            "lagMs": round(accepted.lag, 3) if accepted else None,
            "attempts": [_attempt(record) for record in self.attempts],
        }


@dataclass(slots=True)
class Conversation:
    """The latest messages of one chat, oldest first."""

    chat_id: str
    changed: int = 0
    """Grows with every change of any chat, so the chat with the latest activity has the greatest value."""
    total: int = 0
    """Messages ever, including those no longer kept."""
    messages: dict[str, Message] = field(default_factory=dict)

    def attempted(self, record: Record, text: str) -> None:
        """Add one attempt to its message; the first attempt creates the message."""
        message = self.messages.get(record.follow_up_id)
        if message is None:
            message = Message(record.follow_up_id, "follow_up", text[:KEEP_TEXT], record.received.wall)
            self.say(message)
        message.attempts = [*message.attempts, record][-KEEP_ATTEMPTS:]

    def say(self, message: Message) -> None:
        """Add a message; the oldest one makes room."""
        self.messages[message.id] = message
        self.total += 1
        if len(self.messages) > KEEP_MESSAGES:
            del self.messages[next(iter(self.messages))]

    def document(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "chatId": self.chat_id,
            "changed": self.changed,
            "messageCount": self.total,
            "messages": [message.document() for message in self.messages.values()],
        }


def _attempt(record: Record) -> dict[str, object]:
    return {
        "attempt": record.attempt,
        "receivedAt": timestamp(record.received.wall),
        "outcome": record.outcome,
        "status": record.status,
        "accepted": record.accepted,
        "duplicate": record.duplicate,
    }
