"""The guards of the promises: how to remove each guard, and what fails without it.

A guard is removed by cutting its text out of the SQL statements. A guard's text must occur in the statement from which
it is cut. Otherwise, the guard would silently stay in place.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy.orm import Session

import followups
from cursors import intercepted
from followups.delivery.attempts import Attempt
from followups.delivery.begin import begin
from followups.delivery.claim import claim, claim_fairly, rhythm_of
from followups.delivery.settle import settle
from followups.errors import DeliveryInProgressError, IdempotencyKeyInUseError
from followups.sending_hours import SendingHours
from followups.states import ReasonCode, Status, finish
from followups.store import (
    chat_order,
    chats,
    claims,
    follow_ups,
    idempotency,
    last_tick,
    leases,
    rate_limits,
    sending_hours,
)
from followups.transports.port import Rejected, Retry, Sent
from followups.uptime import uptime
from stack import wait_until
from world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from sqlalchemy import Connection, Engine

    from followups.delivery.attempts import Begun
    from followups.settings import Settings
    from followups.store.claims import Claim
    from followups.store.leases import Lease
    from followups.transports.port import Outcome


class PromiseBroken(AssertionError):  # noqa: N818 - a promise that is broken, no error of the code
    """Raised when a promise is broken."""


def expect(kept: object, promise: str) -> None:
    """Raise `PromiseBroken` if the guarantee was broken."""
    if not kept:
        raise PromiseBroken(promise)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a guard's test scenario uses: an engine, a store and the steps of a delivery."""

    world: World
    settings: Settings
    claim: Callable[[Engine, Settings], Claim] = claim
    take: Callable[[Connection, claims.ClaimSearch], Claim] = claims.claim
    """The scenario's claim statement, which runs in the caller's transaction."""

    @property
    def engine(self) -> Engine:
        """An engine that can run statements from which a guard has been removed."""
        return self.world.engine

    def lease(self) -> Lease:
        """Claim the follow-up that is due and return its lease."""
        (lease,) = self.claim(self.engine, self.settings).leases
        return lease

    def leased_anew(self, lease: Lease) -> Lease:
        """Expire a lease, and claim its follow-up again."""
        self.world.expire(lease.id)
        return self.lease()

    def begin(self, lease: Lease) -> tuple[Begun, ...]:
        """Begin the follow-up of a lease."""
        return begin(self.engine, self.settings, [lease]).begun

    def settle(self, begun: Begun, outcome: Outcome) -> None:
        """Settle an attempt."""
        attempt = Attempt(begun, outcome, 0.0, uptime(), 0.0)
        settle(self.engine, self.settings, [attempt])

    def cancel(self, follow_up_id: UUID) -> None:
        """Cancel a follow-up as the API does."""
        with Session(self.engine) as session, session.begin():
            followups.cancel(session, follow_up_id)

    def reply(self, chat_id: UUID) -> None:
        """Record a user's reply in the chat."""
        with Session(self.engine) as session, session.begin():
            chats.receive(
                session,
                self.world.workspace_id,
                message_id=uuid4(),
                chat_id=chat_id,
                role=chats.Role.USER,
                created_at=None,
            )


def paused_begins(scene: Scene) -> None:
    """Try to begin a follow-up in a paused workspace."""
    scene.world.follow_up()
    scene.world.sql("INSERT INTO pauses (workspace_id) VALUES (:id)", id=scene.world.workspace_id)
    expect(not scene.begin(scene.lease()), "nothing paused begins")


def begins_outside_hours(scene: Scene) -> None:
    """Try to begin a follow-up outside its workspace's sending hours."""
    scene.world.follow_up()
    opening = datetime.now(UTC) + timedelta(hours=3)
    hours = SendingHours("UTC", opening.time(), (opening + timedelta(hours=1)).time())
    with Session(scene.engine) as session, session.begin():
        sending_hours.put(session, scene.world.workspace_id, hours)
    expect(not scene.begin(scene.lease()), "nothing begins outside the sending hours")


def stale_hint_begins(scene: Scene) -> None:
    """Try to begin a follow-up with an outdated token."""
    scene.world.follow_up()
    old = scene.lease()
    scene.leased_anew(old)
    expect(not scene.begin(old), "a stale hint begins nothing")


def repeated_hint_begins(scene: Scene) -> None:
    """Try to begin a follow-up twice with the same hint."""
    scene.world.follow_up()
    lease = scene.lease()
    scene.begin(lease)
    expect(not scene.begin(lease), "a repeated hint begins nothing")


def ended_lease_begins(scene: Scene) -> None:
    """Try to begin a follow-up with an expired lease."""
    scene.world.follow_up()
    lease = scene.lease()
    scene.world.expire(lease.id)
    expect(not scene.begin(lease), "a lease that has ended begins nothing")


def cancelled_begins(scene: Scene) -> None:
    """Try to begin a follow-up that was cancelled while its hint was in the broker."""
    scene.world.follow_up()
    lease = scene.lease()
    scene.cancel(lease.id)
    expect(not scene.begin(lease), "nothing begins after its cancel")


def later_one_begins(scene: Scene) -> None:
    """Try to begin the later of two follow-ups in a chat before the earlier one."""
    chat_id = scene.world.chat()
    scene.world.follow_up(chat_id, due=-timedelta(seconds=2))
    later = scene.world.follow_up(chat_id, due=-timedelta(seconds=1))
    taken = {lease.id: lease for lease in claim(scene.engine, scene.settings).leases}
    expect(not scene.begin(taken[later]), "order within a chat")


def begins_in(chat: Callable[[Scene], UUID], **columns: Any) -> Callable[[Scene], None]:
    """Return a scenario that tries to begin a follow-up in a chat that must get no messages."""

    def scenario(scene: Scene) -> None:
        scene.world.follow_up(chat(scene), **columns)
        expect(not scene.begin(scene.lease()), "the world is looked at again before sending")

    return scenario


def rescheduled_begins(scene: Scene) -> None:
    """Try to begin a follow-up that was rescheduled to an hour later."""
    follow_up = scene.world.follow_up()
    lease = scene.lease()
    scene.world.sql("UPDATE follow_ups SET due_date = now() + interval '1 h' WHERE id = :id", id=follow_up)
    expect(not scene.begin(lease), "nothing is early")


def stale_result_settles(scene: Scene) -> None:
    """Try to settle an attempt with an outdated token while another attempt is in flight."""
    scene.world.follow_up()
    (frozen,) = scene.begin(scene.lease())
    (other,) = scene.begin(scene.leased_anew(frozen.lease))
    scene.settle(frozen, Retry("HTTP 500"))
    expect(scene.world.row(other.lease.id).begun_at is not None, "no stale writer's write is taken")


def result_settles_again(scene: Scene) -> None:
    """Try to settle the same attempt twice, with a cancel in between."""
    scene.world.follow_up()
    (begun,) = scene.begin(scene.lease())
    scene.settle(begun, Retry("HTTP 500"))
    scene.cancel(begun.lease.id)
    scene.settle(begun, Rejected("HTTP 403"))
    expect(scene.world.row(begun.lease.id).status == "cancelled", "final states never change")


def reply_in_flight_is_forgotten(scene: Scene) -> None:
    """Record a user's reply during an attempt that then fails."""
    chat_id = scene.world.chat()
    scene.world.follow_up(chat_id)
    (begun,) = scene.begin(scene.lease())
    scene.reply(chat_id)
    scene.settle(begun, Retry("HTTP 500"))
    expect(scene.world.row(begun.lease.id).status == "cancelled", "a reply stops the next try")


def leased_is_claimed(scene: Scene) -> None:
    """Try to claim a follow-up that is already leased."""
    scene.world.follow_up()
    scene.lease()
    expect(not scene.claim(scene.engine, scene.settings).leases, "a lease is given once")


def token_stays(scene: Scene) -> None:
    """Claim a follow-up again after its first lease has expired."""
    scene.world.follow_up()
    lease = scene.lease()
    expect(scene.leased_anew(lease).token > lease.token, "the fencing token grows")


def token_repeats(scene: Scene) -> None:
    """Claim a follow-up again after a failover has lost the first claim."""
    follow_up = scene.world.follow_up()
    lease = scene.lease()
    scene.world.sql("UPDATE follow_ups SET lease_token = 0, lease_until = NULL WHERE id = :id", id=follow_up)
    expect(scene.lease().token != lease.token, "a fencing token is given once")


def taken_from_its_worker(scene: Scene) -> None:
    """After a long outage, try to claim a follow-up whose worker has not yet recorded the outcome."""
    scene.world.follow_up()
    (begun,) = scene.begin(scene.lease())
    scene.world.expire(begun.lease.id)
    scene.world.sql("UPDATE dispatcher_state SET last_tick_at = last_tick_at - interval '1 hour'")
    scene.claim(scene.engine, scene.settings)
    scene.settle(begun, Sent())
    expect(scene.world.row(begun.lease.id).status == Status.SENT, "what was accepted ends as sent")


def claimed_beside_another(scene: Scene) -> None:
    """Try to claim while another dispatcher is claiming."""
    scene.world.follow_up()
    # The recorded tick is slightly in the future, so neither claim updates its row.
    scene.world.sql("UPDATE dispatcher_state SET last_tick_at = now() + interval '900 ms'")
    with scene.engine.begin() as another:
        last_tick.begin(another, rhythm_of(scene.settings))
        expect(scene.claim(scene.engine, scene.settings).busy, "one dispatcher claims at a time")


def ended_is_claimed(scene: Scene) -> None:
    """Try to claim a follow-up that has ended."""
    follow_up = scene.world.follow_up()
    scene.cancel(follow_up)
    expect(not scene.claim(scene.engine, scene.settings).leases, "what has ended is not claimed")


def stale_release(scene: Scene) -> None:
    """Try to release the old lease of a follow-up that another worker has taken over."""
    scene.world.follow_up()
    old = scene.lease()
    scene.leased_anew(old)
    with scene.engine.begin() as connection:
        leases.release_if_not_begun(connection, [old])
    expect(scene.world.row(old.id).lease_until is not None, "no stale writer's write is taken")


def stale_end(scene: Scene) -> None:
    """Try to end a follow-up under a lease that another worker's lease has replaced."""
    scene.world.follow_up()
    old = scene.lease()
    scene.leased_anew(old)
    with scene.engine.begin() as connection:
        leases.end_if_not_begun(connection, [(old, finish(Status.FAILED, ReasonCode.TOO_LATE))])
    expect(scene.world.row(old.id).status == "pending", "no stale writer's write is taken")


def cancelled_in_flight(scene: Scene) -> None:
    """Try to cancel a follow-up while its attempt is in flight."""
    scene.world.follow_up()
    (begun,) = scene.begin(scene.lease())
    try:
        scene.cancel(begun.lease.id)
    except DeliveryInProgressError:
        return
    expect(False, "a cancel that is acknowledged is final")  # noqa: FBT003 - it was acknowledged, in flight


def another_workspaces(scene: Scene) -> None:
    """Read another workspace's follow-up by its id."""
    follow_up = scene.world.follow_up()
    with Session(scene.engine) as session:
        expect(follow_ups.find(session, follow_up, uuid4()) is None, "no workspace sees another's")


def none_is_unblocked(scene: Scene) -> None:
    """End a chat's earlier follow-up, and check that the later one is unblocked."""
    chat_id = scene.world.chat()
    scene.world.follow_up(chat_id, due=-timedelta(seconds=2))
    later = scene.world.follow_up(chat_id, due=-timedelta(seconds=1))
    begun = begin(scene.engine, scene.settings, claim(scene.engine, scene.settings).leases).begun
    expect(scene.world.row(later).waits_for is not None, "the later one waits")
    scene.settle(begun[0], Sent(None))
    expect(scene.world.row(later).waits_for is None, "nothing is left waiting for what has ended")


def created_behind_a_reply(scene: Scene) -> None:
    """Create a follow-up while a reply arrives; one transaction waits for the other."""
    chat_id = scene.world.chat()
    with Session(scene.engine) as session:
        created = followups.schedule(
            session,
            workspace_id=scene.world.workspace_id,
            chat_id=chat_id,
            message="Still there?",
            due_date=datetime.now(UTC),
        )
        follow_up = created.id
        with beside(lambda: scene.reply(chat_id), scene):
            session.commit()
    expect(scene.world.row(follow_up).status == "cancelled", "a reply stops what was created before it")


def claimed_at_once(scene: Scene) -> None:
    """Claim twice concurrently."""
    scene.world.follow_up()
    second: list[Lease] = []
    look = claims.ClaimSearch(timedelta(0), scene.settings.lease, window=10, most=10)
    with scene.engine.connect() as connection:
        first = scene.take(connection, look).leases
        with beside(lambda: second.extend(scene.claim(scene.engine, scene.settings).leases), scene):
            connection.commit()
    expect(len(first) + len(second) == 1, "two ticks at once lease a follow-up once")


def fairly(scenario: Callable[[Scene], None]) -> Callable[[Scene], None]:
    """Return a scenario in which all claims are fair claims."""
    return lambda scene: scenario(replace(scene, claim=claim_fairly, take=claims.claim_fairly))


def window_overflows(scene: Scene) -> None:
    """Try to claim again after the first claim has reached ``MAX_IN_FLIGHT``."""
    bounded = scene.settings.model_copy(update={"max_in_flight": 2})
    scene.world.burst([timedelta(0)] * 5)
    taken = [len(scene.claim(scene.engine, bounded).leases) for _ in range(2)]
    expect(taken == [2, 0], "no more are in flight than MAX_IN_FLIGHT")


def one_takes_all(scene: Scene) -> None:
    """Claim a follow-up that falls due later than another workspace's whole backlog."""
    scene.world.burst([-timedelta(seconds=9)] * 5)
    follow_up = World(scene.engine).follow_up()
    claimed = scene.claim(scene.engine, scene.settings.model_copy(update={"max_in_flight": 2}))
    expect(follow_up in {lease.id for lease in claimed.leases}, "a backlog delays no other workspace")


def two_in_a_chat(scene: Scene) -> tuple[UUID, Lease]:
    """Lease two follow-ups in one chat; return the id of the earlier one and the lease of the later one."""
    chat_id = scene.world.chat()
    earlier = scene.world.follow_up(chat_id, due=-timedelta(seconds=2))
    scene.world.follow_up(chat_id, due=-timedelta(seconds=1))
    later = next(lease for lease in claim(scene.engine, scene.settings).leases if lease.id != earlier)
    return earlier, later


def park(scene: Scene, lease: Lease, earlier: UUID) -> None:
    """Park a leased follow-up until an earlier follow-up of its chat has ended."""
    with scene.engine.begin() as connection:
        chat_order.park_if_leased(connection, [(lease, earlier)])


def stale_park(scene: Scene) -> None:
    """Try to park a follow-up under a lease that another worker's lease has replaced."""
    earlier, old = two_in_a_chat(scene)
    scene.leased_anew(old)
    park(scene, old, earlier)
    expect(scene.world.row(old.id).lease_until is not None, "no stale writer's write is taken")


def parked_behind_an_end(scene: Scene) -> None:
    """Park a follow-up behind an earlier one whose cancellation is not yet committed."""
    earlier, later = two_in_a_chat(scene)
    with Session(scene.engine) as session:
        followups.cancel(session, earlier)
        session.flush()
        park(scene, later, earlier)
        session.commit()
    expect(scene.world.row(later.id).waits_for is None, "nothing is left waiting for what has ended")


def put_off(scene: Scene, lease: Lease) -> None:
    """Defer a leased follow-up in the same way as a rate limit."""
    with scene.engine.begin() as connection:
        rate_limits.defer_if_leased(connection, [(lease, timedelta(minutes=1))])


def stale_defer(scene: Scene) -> None:
    """Try to defer a follow-up with an outdated lease."""
    scene.world.follow_up()
    old = scene.lease()
    scene.leased_anew(old)
    put_off(scene, old)
    expect(scene.world.row(old.id).lease_until is not None, "no stale writer's write is taken")


def ended_lease_deferred(scene: Scene) -> None:
    """Try to defer a follow-up after its lease has expired."""
    scene.world.follow_up()
    lease = scene.lease()
    scene.world.expire(lease.id)
    put_off(scene, lease)
    expect(scene.world.row(lease.id).limited_until is None, "a lease that has ended puts off nothing")


def cancelled_deferred(scene: Scene) -> None:
    """Try to defer a follow-up that was cancelled after it had been leased."""
    scene.world.follow_up()
    lease = scene.lease()
    scene.cancel(lease.id)
    put_off(scene, lease)
    expect(scene.world.row(lease.id).limited_until is None, "final states never change")


def deferred_in_flight(scene: Scene) -> None:
    """Try to defer a follow-up whose attempt has begun."""
    scene.world.follow_up()
    (begun,) = scene.begin(scene.lease())
    put_off(scene, begun.lease)
    expect(scene.world.row(begun.lease.id).begun_at is not None, "an attempt in flight belongs to no other worker")


def forgotten(scene: Scene) -> None:
    """Search for follow-ups that are still parked although their predecessor has ended."""
    earlier, later = two_in_a_chat(scene)
    scene.cancel(earlier)
    scene.world.sql("UPDATE follow_ups SET waits_for = :earlier WHERE id = :id", earlier=earlier, id=later.id)
    with scene.engine.begin() as connection:
        chat_order.unblock_orphaned(connection)
    expect(scene.world.row(later.id).waits_for is None, "what was forgotten is found")


def created_twice_by_a_key(scene: Scene) -> None:
    """Create a follow-up twice concurrently with the same idempotency key."""
    chat_id, workspace = scene.world.chat(), scene.world.workspace_id

    def create(session: Session) -> None:
        if idempotency.recall(session, workspace, "key", b"request") is None:
            moment = datetime.now(UTC)
            followups.schedule(session, workspace_id=workspace, chat_id=chat_id, message="Hello?", due_date=moment)
            idempotency.remember(session, workspace, "key", b"request", idempotency.StoredResponse(201, None, b"{}"))

    def create_beside() -> None:
        with suppress(IdempotencyKeyInUseError), Session(scene.engine) as session, session.begin():
            create(session)

    with Session(scene.engine) as session:
        create(session)
        session.flush()
        with beside(create_beside, scene):
            session.commit()
    expect(scene.world.scalar("SELECT count(*) FROM follow_ups") == 1, "a key creates once")


@contextmanager
def beside(work: Callable[[], object], scene: Scene) -> Iterator[None]:
    """Run ``work`` in a thread, and the ``with`` block once ``work`` has ended or is waiting for a lock."""
    thread = threading.Thread(target=work)
    thread.start()

    def settled() -> bool:
        return not thread.is_alive() or bool(scene.world.waiting_for_locks())

    wait_until(settled)
    try:
        yield
    finally:
        thread.join()


@contextmanager
def without(engine: Engine, within: str, cuts: dict[str, str]) -> Iterator[None]:
    """Replace parts of the SQL statements that contain ``within``; raise an error if a part is not found."""
    found = set()

    def cut(statement: str, _parameters: object) -> str:
        if within in statement:
            for piece, instead in cuts.items():
                if piece in statement:
                    found.add(piece)
                    statement = statement.replace(piece, instead)
        return statement

    try:
        with intercepted(engine, cut):
            yield
    finally:
        missing = cuts.keys() - found
        if missing:
            message = f"no statement with {within!r} holds {missing}"
            raise ValueError(message)
