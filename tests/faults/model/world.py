"""The model's states: two follow-ups of one chat, three workers, and a broker that loses hints.

The broker may also repeat hints. The model has no clock. A lease may expire at any moment, so every order of events is
covered. One chat without batches is enough, because no promise depends on more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from followups.states import Status


class ModelRow(NamedTuple):
    """A follow-up in the model's database; a `ModelWorld` has two, with the earlier one first."""

    status: Status = Status.PENDING
    reason: str = ""
    token: int = 0
    leased: bool = False
    begun: bool = False
    attempts: int = 0
    losses: int = 0
    cancel_requested: str = ""
    unknown: bool = False
    """Whether an attempt's outcome is recorded as unknown."""
    exists: bool = True

    @property
    def pending(self) -> bool:
        """Whether the follow-up exists and is still pending."""
        return self.exists and self.status is Status.PENDING


class Job(NamedTuple):
    """A worker's job: first a hint, then an attempt in flight, and finally an outcome."""

    row: int
    token: int
    stage: str
    """The stage of a worker's job: ``hinted``, ``begun`` or ``answered``."""
    outcome: str = ""
    attempt: int = 0


IDLE = Job(-1, 0, "idle")


class ModelWorld(NamedTuple):
    """A complete state of the model: the database, the chat, and the workers in sorted order.

    Workers are interchangeable. The broker has no state in the model: a hint may be read at any moment, repeatedly or
    never.
    """

    rows: tuple[ModelRow, ModelRow]
    workers: tuple[Job, ...] = (IDLE, IDLE, IDLE)
    accepted: tuple[int, int] = (0, 0)
    """How often the chat has accepted each follow-up's message."""
    replied: bool = False
    may_create: bool = False
    """Whether a check without a lock has allowed a client to create the second follow-up."""

    def with_row(self, number: int, row: ModelRow) -> ModelWorld:
        """Return a copy of the state with one row replaced."""
        return self._replace(rows=(row, self.rows[1]) if number == 0 else (self.rows[0], row))

    def without_dead_jobs(self) -> ModelWorld:
        """Return this state without the jobs that can no longer change anything.

        With all guards in place, dead jobs can be removed: no token is reused, and no final state changes.
        """
        if all(job is IDLE or job.stage == "begun" or self._is_alive(job) for job in self.workers):
            return self
        alive = [job if job.stage == "begun" or self._is_alive(job) else IDLE for job in self.workers]
        return self._replace(workers=tuple(sorted(alive)))

    def _is_alive(self, job: Job) -> bool:
        row = self.rows[job.row]
        return row.pending and row.token == job.token and row.begun == (job.stage == "answered")

    def with_worker(self, old: Job, new: Job) -> ModelWorld:
        """Return this state, but with another job for one worker."""
        workers = list(self.workers)
        workers[workers.index(old)] = new
        return self._replace(workers=tuple(sorted(workers)))


@dataclass(frozen=True, slots=True)
class Protocol:
    """The model's parameters: the transport, the active guards, and the limits of the exploration."""

    deduplicates: bool = True
    without: frozenset[str] = frozenset()
    most_claims: int = 2
    """Maximum number of claims of a follow-up: two in the short form of the test, three in the long form."""
    most_attempts: int = 2
    creates_late: bool = False
    """Whether the second follow-up is created later; otherwise it exists from the start."""

    def guards(self, name: str) -> bool:
        """Return whether the model includes the given guard."""
        return name not in self.without


class Broken(Exception):  # noqa: N818 - a broken promise, named as such
    """Raised by a step that violates a guarantee."""


def break_promise(name: str) -> None:
    """Raise `Broken` with the name of the broken guarantee."""
    raise Broken(name)
