"""Executes each step in the model and in PostgreSQL, and compares the results."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy.orm import Session

import followups
from faults.model.rules import OUTCOMES
from faults.model.steps import steps
from faults.model.world import Job, ModelRow, Protocol
from faults.model.world import ModelWorld as Model
from followups.delivery.attempts import Attempt
from followups.delivery.begin import begin
from followups.delivery.claim import claim
from followups.delivery.settle import settle
from followups.scheduling import amend
from followups.states import code_of
from followups.store import chats
from followups.store.leases import Lease
from followups.uptime import uptime

if TYPE_CHECKING:
    from uuid import UUID

    from followups.delivery.attempts import Begun
    from followups.settings import Settings
    from world import World

LATER = "UPDATE follow_ups SET next_attempt_at = now() + interval '1 h' WHERE id = :id AND status = 'pending'"
NOW = "UPDATE follow_ups SET next_attempt_at = now() WHERE id = :id"


class DrivenStore:
    """The model and the real store, with the same two follow-ups of one chat."""

    def __init__(self, world: World, settings: Settings, *, deduplicates: bool, creates_late: bool) -> None:
        self.protocol = Protocol(deduplicates=deduplicates, creates_late=creates_late, most_claims=6)
        changes: dict[str, Any] = {"max_attempts": self.protocol.most_attempts, "transport_deduplicates": deduplicates}
        self.settings = settings.model_copy(update=changes)
        self.model = Model((ModelRow(), ModelRow(exists=not creates_late)))
        self.world = world
        self.chat_id = world.chat()
        self.ids: list[UUID] = [world.follow_up(self.chat_id, due=-timedelta(seconds=9))]
        if not creates_late:
            self.ids.append(world.follow_up(self.chat_id))
        for follow_up in self.ids:
            world.sql(LATER, id=follow_up)
        self.begun: dict[tuple[int, int], Begun] = {}
        self.tokens: dict[tuple[int, int], int] = {}
        """The lease tokens in the database, keyed by row number and model token."""

    def kinds(self) -> set[str]:
        """Return the kinds of steps that are possible in the current state."""
        return {step.action[0] for step in steps(self.model, self.protocol)}

    def choices(self, kind: str) -> list[int]:
        """Return the indexes of all steps of this kind that are possible now."""
        return [place for place, step in enumerate(steps(self.model, self.protocol)) if step.action[0] == kind]

    def take(self, place: int) -> None:
        """Carry out one step in the model and in the database."""
        step = list(steps(self.model, self.protocol))[place]
        self.model = step.make()
        kind, *what = step.action
        if does := getattr(self, f"_{kind}", None):
            does(*what)

    def compare(self) -> None:
        """Check that the database contains what the model predicts."""
        for number, (follow_up, expected) in enumerate(zip(self.ids, self.model.rows, strict=False)):
            row = self.world.row(follow_up)
            real = (
                row.status,
                code_of(row.reason),
                row.lease_token,
                row.begun_at is not None,
                row.attempts,
                row.losses,
            )
            said = (
                expected.status.value,
                code_of(expected.reason or None),
                self._token(number, expected.token, row.lease_token),
                expected.begun,
                expected.attempts,
                expected.losses,
            )
            assert real == said, (real, said)
            assert ("unknown" in (row.reason or "")) == ("unknown" in expected.reason), (row.reason, expected.reason)
            assert (row.cancel_requested or "") == expected.cancel_requested or not expected.pending
            assert (row.finished_at is None) == expected.pending

    def _token(self, number: int, counted: int, found: int) -> int:
        """Return the database token that corresponds to a model token; check that tokens only increase."""
        if (number, counted) not in self.tokens:
            before = max((token for (row, _), token in self.tokens.items() if row == number), default=-1)
            assert found > before, (found, before)
            self.tokens[number, counted] = found
        return self.tokens[number, counted]

    def amend(self, number: int, changes: dict[str, Any]) -> None:
        """Change fields of a follow-up as the API does."""
        with Session(self.world.engine) as session, session.begin():
            amend(session, self.ids[number], changes)

    def reschedule(self, number: int) -> None:
        """Change the follow-up's due date, which also revokes its lease."""
        self.amend(number, {"due_date": datetime.now(UTC) - timedelta(seconds=8 if number == 0 else 0)})
        self.world.sql(LATER, id=self.ids[number])
        row = self.model.rows[number]
        self.model = self.model.with_row(number, row._replace(token=row.token + 1, leased=False))

    def _lease(self, job: Job) -> Lease:
        return Lease(self.ids[job.row], self.tokens[job.row, job.token], datetime.now(UTC))

    def _claim(self, number: int) -> None:
        self.world.sql(NOW, id=self.ids[number])
        self.world.close_gap()
        claim(self.world.engine, self.settings)

    def _expire(self, number: int) -> None:
        self.world.expire(self.ids[number])
        self.world.sql(LATER, id=self.ids[number])

    def _begin(self, job: Job) -> None:
        beginning = begin(self.world.engine, self.settings, [self._lease(job)])
        for one in beginning.begun:
            self.begun[job.row, job.token] = one
        # The model does not include parking, so parked rows are made claimable here. Separate tests cover unblocking.
        self.world.sql("UPDATE follow_ups SET waits_for = NULL WHERE id = :id", id=self.ids[job.row])
        if not beginning.begun and not self.model.rows[job.row].leased:
            self.world.sql(LATER, id=self.ids[job.row])

    def _settle(self, job: Job) -> None:
        begun = self.begun[job.row, job.token]
        attempt = Attempt(begun, OUTCOMES[job.outcome], 0.0, uptime(), 0.0)
        settle(self.world.engine, self.settings, [attempt])
        if self.model.rows[job.row].pending and not self.model.rows[job.row].leased:
            self.world.sql(LATER, id=self.ids[job.row])

    def _cancel(self, number: int) -> None:
        with Session(self.world.engine) as session, session.begin():
            followups.cancel(session, self.ids[number])

    def _reply(self) -> None:
        with Session(self.world.engine) as session, session.begin():
            chats.receive(
                session,
                self.world.workspace_id,
                message_id=uuid4(),
                chat_id=self.chat_id,
                role=chats.Role.USER,
                created_at=None,
            )

    def _create(self) -> None:
        with Session(self.world.engine) as session, session.begin():
            created = followups.schedule(
                session,
                workspace_id=self.world.workspace_id,
                chat_id=self.chat_id,
                message="Still there?",
                due_date=datetime.now(UTC),
            )
            self.ids.append(created.id)
        self.world.sql(LATER, id=self.ids[1])
