"""The conformance suite's rigs: each has a transport and the chats that receive its messages."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from followups.transports.http import HttpTransport
from followups.transports.matrix import MatrixTransport
from followups.transports.sandbox.behaviour import Behaviour
from followups.transports.sandbox.chats import SandboxChats
from followups.transports.sandbox.server import build_app, serving
from followups.transports.sandbox.transport import SandboxTransport
from unit.transports.doubles import SIGNING_SECRET, TOKEN, homeserver, opened, settings_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from followups.transports.port import Delivery, Outcome, Transport


@dataclass
class TransportRig:
    """A transport and the chats that receive its messages."""

    transport: Transport
    chats: SandboxChats

    async def send(self, delivery: Delivery, **behaviour: object) -> Outcome:
        """Deliver a message to a chat that has the given behaviour."""
        self.chats.behave(str(delivery.chat_id), Behaviour(**behaviour))
        return await self.transport.send(delivery)

    @property
    def accepted(self) -> object:
        return self.chats.ledger.summary()["accepted"]


@asynccontextmanager
async def http_rig(within: float) -> AsyncIterator[TransportRig]:
    """Deliver to the sandbox server over HTTP, with signatures."""
    chats = SandboxChats()
    async with serving(build_app(chats, secret=SIGNING_SECRET)) as url:
        settings = settings_for(f"{url}/messages", transport_timeout=within, transport_secret=SIGNING_SECRET)
        async with opened(HttpTransport(settings)) as transport:
            yield TransportRig(transport, chats)


@asynccontextmanager
async def matrix_rig(within: float) -> AsyncIterator[TransportRig]:
    """Deliver to a simulated Matrix homeserver, which uses the sandbox's chats."""
    chats = SandboxChats()
    async with serving(homeserver(chats)) as url:
        settings = settings_for(url, transport="matrix", transport_timeout=within, transport_secret=TOKEN)
        async with opened(MatrixTransport(settings)) as transport:
            yield TransportRig(transport, chats)


@asynccontextmanager
async def sandbox_rig(within: float) -> AsyncIterator[TransportRig]:
    """Return a rig that delivers to sandbox chats in the test's process."""
    chats = SandboxChats()
    settings = settings_for(transport="sandbox", transport_timeout=within)
    async with opened(SandboxTransport(settings, chats)) as transport:
        yield TransportRig(transport, chats)


RIGS = {"http": http_rig, "matrix": matrix_rig, "sandbox": sandbox_rig}
