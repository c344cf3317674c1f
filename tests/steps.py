"""Claim, begin and settle like a worker, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from sqlalchemy.orm import Session

from followups.delivery.attempts import Attempt
from followups.delivery.begin import begin
from followups.delivery.claim import claim
from followups.delivery.send import checked
from followups.delivery.settle import settle
from followups.store import chats
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.delivery.attempts import BatchResult, Begun
    from followups.delivery.claim import Claim
    from followups.settings import Settings
    from followups.store.leases import Lease
    from followups.transports.port import Outcome
    from world import World


@dataclass(frozen=True)
class Steps:
    """Runs the steps of a delivery on a worker's engine; each step may use different settings."""

    engine: Engine
    settings: Settings

    def claim(self, settings: Settings | None = None, since: datetime | None = None) -> Claim:
        """Claim due follow-ups; with ``since``, only those that fell due after that time."""
        return claim(self.engine, settings or self.settings, since)

    def lease(self, settings: Settings | None = None) -> Lease:
        """Claim due follow-ups; check that exactly one was leased, and return its lease."""
        (lease,) = self.claim(settings).leases
        return lease

    def begin(self, leases: Sequence[Lease], settings: Settings | None = None) -> BatchResult:
        """Begin claimed follow-ups."""
        return begin(self.engine, settings or self.settings, leases)

    def begun(self, settings: Settings | None = None) -> Begun:
        """Claim and begin due follow-ups, and return the only attempt in flight."""
        (begun,) = self.begin(self.claim(settings).leases, settings).begun
        return begun

    def settle(self, attempts: Sequence[Attempt], settings: Settings | None = None) -> BatchResult:
        """Settle attempts and record their outcomes."""
        return settle(self.engine, settings or self.settings, attempts)


def attempt(begun: Begun, outcome: Outcome) -> Attempt:
    """Return an attempt as the transport would return it."""
    return Attempt(begun, checked(outcome), 0.001, uptime(), 0.0)


def reply(world: World, chat_id: UUID, role: chats.Role = chats.Role.USER) -> tuple[UUID, ...]:
    """Receive a chat message; return the ids of the follow-ups that it cancelled."""
    with Session(world.engine) as session, session.begin():
        received = chats.receive(
            session, world.workspace_id, message_id=uuid4(), chat_id=chat_id, role=role, created_at=None
        )
    return received.cancelled
