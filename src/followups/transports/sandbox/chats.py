"""The sandbox's chats, which accept each idempotency key once and behave as configured.

This module does no I/O.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING
from uuid import uuid4

from followups.transports.sandbox.behaviour import OUTCOMES, Behaviour, Incoming, Reply
from followups.transports.sandbox.ledger import KEEP_RECORDS, Arrival, Ledger, LedgerEntry, timestamp

if TYPE_CHECKING:
    from collections.abc import Iterator

KEEP_CHATS = 300
"""Number of chats that are kept for display; counts and deduplication cover all chats."""

KEEP_MESSAGES = 30
"""Number of messages that are kept for each chat."""
KEEP_ATTEMPTS = 20
"""Number of attempts kept for each message."""
KEEP_TEXT = 2_000
"""Number of characters that are kept of each message."""

ACCEPT = Behaviour()
REFUSAL = {"error": "refused by the sandbox"}


@dataclass(slots=True)
class Message:
    """A message in the chat: either a follow-up, which has attempts, or a participant's message."""

    id: str
    role: str
    """``follow_up``, ``user``, ``agent`` or ``operator``."""
    text: str
    at: float
    """The Unix time at which the message first appeared."""
    attempts: list[LedgerEntry] = field(default_factory=list)

    def document(self) -> dict[str, object]:
        """Return the message as JSON; ``lagMs`` is the lag of the first accepted attempt."""
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
    """The number of the chat's latest change; the changes to all chats are numbered in one sequence."""
    total: int = 0
    """Number of all messages so far, including messages that are no longer kept."""
    messages: dict[str, Message] = field(default_factory=dict)

    def attempted(self, record: LedgerEntry, text: str) -> None:
        """Record a delivery attempt; the first attempt creates the message."""
        message = self.messages.get(record.follow_up_id)
        if message is None:
            message = Message(record.follow_up_id, "follow_up", text[:KEEP_TEXT], record.received.wall)
            self.add_message(message)
        message.attempts = [*message.attempts, record][-KEEP_ATTEMPTS:]

    def add_message(self, message: Message) -> None:
        """Add a message; if the chat is full, the chat's oldest message is removed."""
        self.messages[message.id] = message
        self.total += 1
        if len(self.messages) > KEEP_MESSAGES:
            del self.messages[next(iter(self.messages))]

    def document(self) -> dict[str, object]:
        """Return the JSON form of the conversation."""
        return {
            "chatId": self.chat_id,
            "changed": self.changed,
            "messageCount": self.total,
            "messages": [message.document() for message in self.messages.values()],
        }


def _attempt(record: LedgerEntry) -> dict[str, object]:
    return {
        "attempt": record.attempt,
        "receivedAt": timestamp(record.received.wall),
        "outcome": record.outcome,
        "status": record.status,
        "accepted": record.accepted,
        "duplicate": record.duplicate,
    }


@dataclass(slots=True)
class _Applied:
    behaviour: Behaviour
    left: int | None


class SandboxChats:
    """A simulated chat server, to be used from one thread.

    A behaviour applies to every request of its chat, including repeated requests. Repeats of accepted requests are
    deduplicated. If the behaviour accepts a request with a known key, the response contains the first message's id, and
    no message is added.
    """

    def __init__(self, *, deduplicates: bool = True, keep: int = KEEP_RECORDS) -> None:
        """Keep the last ``keep`` requests. Without deduplication, a repeated key adds a second message."""
        self._deduplicates = deduplicates
        self._keep = keep
        self._default = ACCEPT
        self._applied: dict[str, _Applied] = {}
        self.clear()

    def clear(self) -> None:
        """Delete every request and conversation; behaviours are kept."""
        self.ledger = Ledger(self._keep)
        self.changes = 0
        self.cleared = uuid4()
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()

    def receive(self, incoming: Incoming, key: str, received: Arrival | None = None) -> Reply:
        """Receive one request and return its answer; ``key`` is the request's idempotency key."""
        behaviour = self._next_behaviour(incoming.chat_id)
        known = self.ledger.message_id(key)
        accepted = behaviour.accepts and not (known and self._deduplicates)
        message_id = self.ledger.new_message_id(key) if accepted else known
        reply = behaviour.reply({"chatMessageId": message_id} if behaviour.accepts and message_id else REFUSAL)
        record = LedgerEntry(
            follow_up_id=incoming.follow_up_id,
            chat_id=incoming.chat_id,
            idempotency_key=key,
            attempt=incoming.attempt,
            due=incoming.due_date.timestamp(),
            received=received or Arrival.now(),
            message_length=len(incoming.message),
            outcome=OUTCOMES[behaviour.kind],
            status=None if reply.dropped else reply.status,
            accepted=accepted,
            duplicate=known is not None,
        )
        self.ledger.add(record)
        self._touched(incoming.chat_id).attempted(record, incoming.message)
        return reply

    def add_message(self, chat_id: str, role: str, text: str) -> Message:
        """Add another participant's message to a chat; the role is ``user``, ``agent`` or ``operator``."""
        message = Message(str(uuid4()), role, text[:KEEP_TEXT], Arrival.now().wall)
        self._touched(chat_id).add_message(message)
        return message

    @property
    def default(self) -> Behaviour:
        """The behaviour of chats that have no behaviour of their own. The default behaviour ignores ``times``."""
        return self._default

    @default.setter
    def default(self, behaviour: Behaviour) -> None:
        self._default = behaviour
        self.changes += 1

    def behaviour(self, chat_id: str) -> Behaviour | None:
        """Return the chat's behaviour, with the ``times`` that remain, or None if the chat has none."""
        applied = self._applied.get(chat_id)
        return None if applied is None else applied.behaviour.model_copy(update={"times": applied.left})

    def behave(self, chat_id: str, behaviour: Behaviour) -> None:
        """Give a chat its own behaviour, either permanently or for the next ``times`` requests."""
        self._applied[chat_id] = _Applied(behaviour, behaviour.times)
        self._touched(chat_id)

    def reset(self, chat_id: str) -> None:
        """Remove a chat's behaviour, so that the default applies."""
        self._applied.pop(chat_id, None)
        self._touched(chat_id)

    def conversations(self, since: int = 0) -> Iterator[dict[str, object]]:
        """Yield, as JSON, the chats that changed after ``since``, most recently changed first."""
        newest_first = reversed(self._conversations.values())
        for conversation in takewhile(lambda each: each.changed > since, newest_first):
            own = self.behaviour(conversation.chat_id)
            yield {**conversation.document(), "behaviour": own and own.model_dump(mode="json", by_alias=True)}

    def _next_behaviour(self, chat_id: str) -> Behaviour:
        applied = self._applied.get(chat_id)
        if applied is None:
            return self._default
        if applied.left is not None:
            applied.left -= 1
            if not applied.left:
                del self._applied[chat_id]
        return applied.behaviour

    def _touched(self, chat_id: str) -> Conversation:
        conversation = self._conversations.pop(chat_id, None) or Conversation(chat_id)
        self._conversations[chat_id] = conversation
        if len(self._conversations) > KEEP_CHATS:
            self._conversations.popitem(last=False)
        self.changes += 1
        conversation.changed = self.changes
        return conversation
