"""The steps that are possible in the model: each actor's steps, and the faults between these steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from faults.model.rules import end_after_loss, end_before_begin, honest, settlement
from faults.model.world import IDLE, Job, ModelRow, ModelWorld, Protocol, break_promise
from followups.states import ReasonCode, Status, finish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from followups.states import Final


class Step(NamedTuple):
    """A possible step of the model: description, action (kind and object), and next state (or `Broken`)."""

    name: str
    action: tuple[Any, ...]
    make: Callable[[], ModelWorld]


NAMES = ("first", "second")


def steps(world: ModelWorld, protocol: Protocol) -> Iterator[Step]:
    """Yield every step that the model allows in this state."""
    for number, row in enumerate(world.rows):
        if row.pending:
            yield from _of_row(world, number, row, protocol)
        for token in range(1, row.token + 1) if IDLE in world.workers else ():
            job = Job(number, token, "hinted")
            yield Step(
                f"a worker reads the hint of the {NAMES[number]}, token {token}",
                ("read", job),
                _taking(world, IDLE, job),
            )
    for job in set(world.workers) - {IDLE}:
        yield from _of_worker(world, job, protocol)
    yield from _of_chat(world, protocol)


def _taking(world: ModelWorld, old: Job, new: Job) -> Callable[[], ModelWorld]:
    return lambda: world.with_worker(old, new)


def _of_row(world: ModelWorld, number: int, row: ModelRow, protocol: Protocol) -> Iterator[Step]:
    if not row.leased and row.token < protocol.most_claims:
        yield Step(f"the {NAMES[number]} is claimed", ("claim", number), lambda: _claimed(world, number, row, protocol))
    if row.leased:
        yield Step(
            f"the lease of the {NAMES[number]} ends",
            ("expire", number),
            lambda: world.with_row(number, row._replace(leased=False)),
        )
    if not row.begun or not protocol.guards("begun at cancel"):
        cancelled = finish(Status.CANCELLED, ReasonCode.CANCELLED_BY_API)
        yield Step(
            f"the {NAMES[number]} is cancelled",
            ("cancel", number),
            lambda: world.with_row(number, ended(row, cancelled)),
        )


def ended(row: ModelRow, final: Final) -> ModelRow:
    """Return the row in its final state, with the values that the store writes."""
    reason = honest(final.reason, final.status, unknown=row.unknown)
    return row._replace(status=final.status, reason=reason, leased=False, begun=False)


def _claimed(world: ModelWorld, number: int, row: ModelRow, protocol: Protocol) -> ModelWorld:
    new = row._replace(token=row.token + 1, leased=True, begun=False)
    if row.begun:
        new = new._replace(losses=row.losses + 1, attempts=row.attempts - 1, unknown=True)
        final = end_after_loss(new.losses, row.cancel_requested, deduplicates=protocol.deduplicates)
        if final:
            return world.with_row(number, ended(new, final))
    return world.with_row(number, new)


def _of_worker(world: ModelWorld, job: Job, protocol: Protocol) -> Iterator[Step]:
    name = NAMES[job.row]
    yield Step(
        f"the worker with the {name} ({job.stage}, token {job.token}) dies", ("die", job), _taking(world, job, IDLE)
    )
    if job.stage == "hinted":
        yield Step(
            f"a worker begins the {name} by token {job.token}", ("begin", job), lambda: _begun(world, job, protocol)
        )
    elif job.stage == "begun":
        for outcome, accepts in (("sent", True), ("unknown", True), ("unknown", False), ("retry", False)):
            taken = "takes it" if accepts else "does not take it"
            yield Step(
                f"the {name} is sent; the chat {taken}; the worker hears: {outcome}",
                ("send", job),
                lambda outcome=outcome, accepts=accepts: _sent(world, job, outcome, protocol, accepts=accepts),
            )
        yield Step(
            f"the {name} is rejected",
            ("send", job),
            _taking(world, job, job._replace(stage="answered", outcome="rejected")),
        )
    else:
        for heard, after in (("", IDLE), (", but the worker sees an error", job)):
            yield Step(
                f"a worker settles the {name} as {job.outcome} by token {job.token}{heard}",
                ("settle", job),
                lambda after=after: _settled(world, job, protocol, after),
            )


def _begun(world: ModelWorld, job: Job, protocol: Protocol) -> ModelWorld:
    row, done = world.rows[job.row], world.with_worker(job, IDLE)
    if not row.exists:
        return done
    held = (
        (row.token == job.token or not protocol.guards("token at begin"))
        and (row.status is Status.PENDING or not protocol.guards("pending at begin"))
        and (not row.begun or not protocol.guards("begun at begin"))
        and (row.leased or not protocol.guards("lease at begin"))
    )
    if not held:
        return done
    if (final := end_before_begin(replied=world.replied)) and protocol.guards("silence at begin"):
        return done.with_row(job.row, ended(row, final))
    if job.row == 1 and world.rows[0].pending and protocol.guards("order at begin"):
        # the second follow-up stays parked until the first follow-up has ended
        return done.with_row(1, row._replace(leased=False))
    _check_write(row, job)
    if row.status is Status.CANCELLED:
        break_promise("nothing after its cancel: an attempt begins")
    begun = Job(job.row, job.token, "begun", attempt=row.attempts + 1)
    return world.with_worker(job, begun).with_row(
        job.row, row._replace(begun=True, leased=True, attempts=row.attempts + 1)
    )


def _check_write(row: ModelRow, job: Job) -> None:
    if row.token != job.token:
        break_promise("no stale writer's write is taken")


def _sent(world: ModelWorld, job: Job, outcome: str, protocol: Protocol, *, accepts: bool) -> ModelWorld:
    known = protocol.deduplicates and world.accepted[job.row] > 0
    counts = list(world.accepted)
    counts[job.row] += accepts and not known
    if counts[job.row] > 1:
        break_promise("nothing doubled")
    if accepts and job.row == 1 and world.rows[0].pending:
        break_promise("order within a chat")
    answered = job._replace(stage="answered", outcome=outcome)
    return world.with_worker(job, answered)._replace(accepted=(counts[0], counts[1]))


def _settled(world: ModelWorld, job: Job, protocol: Protocol, after: Job) -> ModelWorld:
    row, done = world.rows[job.row], world.with_worker(job, after)
    held = (
        (row.token == job.token or not protocol.guards("token at settle"))
        and (row.status is Status.PENDING or not protocol.guards("pending at settle"))
        and (row.begun or not protocol.guards("begun at settle"))
    )
    if not held:
        return done
    _check_write(row, job)
    if row.status is not Status.PENDING:
        break_promise("final states never change")
    decided = settlement(job.outcome, job.attempt, protocol.most_attempts, deduplicates=protocol.deduplicates)
    unknown = row.unknown or job.outcome == "unknown"
    new = row._replace(begun=False, leased=False, unknown=unknown)
    status, reason = decided.status, decided.reason
    if decided.cancel_takes_precedence and row.cancel_requested:
        status, reason = Status.CANCELLED, row.cancel_requested + decided.cancel_detail
    if status is Status.PENDING:
        return done.with_row(job.row, new)
    return done.with_row(job.row, new._replace(status=status, reason=honest(reason, status, unknown=row.unknown)))


def _of_chat(world: ModelWorld, protocol: Protocol) -> Iterator[Step]:
    if not world.replied:
        yield Step("the user replies", ("reply",), lambda: _replied(world))
    if not world.rows[1].exists:
        created = world.with_row(1, ModelRow())._replace(may_create=False)
        if protocol.guards("chat lock"):
            if not world.replied:
                yield Step("the second is created", ("create",), lambda: created)
        elif world.may_create:
            yield Step("the second is inserted", ("insert",), lambda: created)
        elif not world.replied:
            yield Step("a client's request looks at the chat", ("look",), lambda: world._replace(may_create=True))


def _replied(world: ModelWorld) -> ModelWorld:
    replied = world._replace(replied=True)
    final = finish(Status.CANCELLED, ReasonCode.USER_REPLIED)
    for number, row in enumerate(world.rows):
        if row.pending and row.begun:
            replied = replied.with_row(
                number, row._replace(cancel_requested=row.cancel_requested or final.reason or "")
            )
        elif row.pending:
            replied = replied.with_row(number, ended(row, final))
    return replied
