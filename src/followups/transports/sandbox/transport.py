"""The transport ``sandbox``: chats in the same process, for tests and experiments."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from followups.transports.answers import Answer, outcome_of
from followups.transports.http import DIALECT
from followups.transports.port import Delivery, Outcome, Unknown
from followups.transports.sandbox.behaviour import Incoming
from followups.transports.sandbox.chats import SandboxChats

if TYPE_CHECKING:
    from followups.settings import Settings


class SandboxTransport:
    """A `Transport` that delivers into `SandboxChats` without a network.

    The sandbox maps responses to outcomes with the same table as the transport ``http``.
    """

    name = "sandbox"

    def __init__(self, settings: Settings, chats: SandboxChats | None = None) -> None:
        """Deliver to ``chats``, or to new sandbox chats if ``chats`` is None.

        New sandbox chats deduplicate requests if `FOLLOWUPS_TRANSPORT_DEDUPLICATES` is true.
        """
        self.chats = chats or SandboxChats(deduplicates=settings.transport_deduplicates)
        self._timeout = settings.transport_timeout.total_seconds()

    async def open(self) -> None:
        """Do nothing, because this transport has no connection to open."""

    async def send(self, delivery: Delivery) -> Outcome:
        """Deliver the message once, with the outcome that the chat's behaviour determines."""
        reply = self.chats.receive(_incoming(delivery), str(delivery.follow_up_id))
        if reply.dropped:
            return Unknown("the connection broke before an answer arrived")
        if reply.delay:
            await asyncio.sleep(min(reply.delay, self._timeout))
        if reply.delay >= self._timeout:
            return Unknown(f"no answer within {self._timeout:g} s")
        return outcome_of(Answer(reply.status, reply.headers, reply.body.encode()), DIALECT)

    async def check(self) -> str:
        """Report that there is no chat server to connect to."""
        return "The sandbox runs in this process; it accepts every message and delivers none."

    async def close(self) -> None:
        """Do nothing: the sandbox's chats must remain readable."""


def _incoming(delivery: Delivery) -> Incoming:
    return Incoming.model_construct(
        follow_up_id=str(delivery.follow_up_id),
        chat_id=str(delivery.chat_id),
        external_chat_id=delivery.external_chat_id,
        trigger_chat_message_id=str(delivery.trigger_chat_message_id),
        message=delivery.message,
        due_date=delivery.due_date,
        attempt=delivery.attempt,
    )
