"""The states of the model: two follow-ups of one chat, three workers, and a broker that loses and repeats hints.

It leaves out time (a lease may end at any moment, so every order of events is included), the claim's batch, and a
second chat, since nothing depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from followups.states import Status


class ModelRow(NamedTuple):
    """A follow-up in the database; the first of a `ModelWorld` is due before the second."""

    status: Status = Status.PENDING
    reason: str = ""
    token: int = 0
    leased: bool = False
    begun: bool = False
    attempts: int = 0
    losses: int = 0
    cancel_requested: str = ""
    unknown: bool = False
    """An attempt's outcome is recorded as unknown."""
    exists: bool = True

    @property
    def pending(self) -> bool:
        """Whether it exists and has not ended."""
        return self.exists and self.status is Status.PENDING


class Job(NamedTuple):
    """The job of one worker: a hint, then an attempt in flight, then its outcome."""

    row: int
    token: int
    stage: str
    """``hinted``, ``begun`` or ``answered``."""
    outcome: str = ""
    attempt: int = 0


IDLE = Job(-1, 0, "idle")


class ModelWorld(NamedTuple):
    """Everything: the database, the workers (in order, since they are alike), the chat.

    The broker needs no state: a hint of every token there has been may be read at any moment, again too, or never.
    """

    rows: tuple[ModelRow, ModelRow]
    workers: tuple[Job, ...] = (IDLE, IDLE, IDLE)
    accepted: tuple[int, int] = (0, 0)
    """How often the chat has accepted the message of each."""
    replied: bool = False
    may_create: bool = False
    """The creation of the second has checked the chat without its lock, and may proceed."""

    def with_row(self, number: int, row: ModelRow) -> ModelWorld:
        """Return the state with this row changed."""
        return self._replace(rows=(row, self.rows[1]) if number == 0 else (self.rows[0], row))

    def without_dead_jobs(self) -> ModelWorld:
        """Return the state without jobs that every guard will refuse from now on.

        With all guards in place this is sound, since tokens are never reused and ends are final.
        """
        if all(job is IDLE or job.stage == "begun" or self._is_alive(job) for job in self.workers):
            return self
        alive = [job if job.stage == "begun" or self._is_alive(job) else IDLE for job in self.workers]
        return self._replace(workers=tuple(sorted(alive)))

    def _is_alive(self, job: Job) -> bool:
        row = self.rows[job.row]
        return row.pending and row.token == job.token and row.begun == (job.stage == "answered")

    def with_worker(self, old: Job, new: Job) -> ModelWorld:
        """Return the state in which one worker has another job."""
        workers = list(self.workers)
        workers[workers.index(old)] = new
        return self._replace(workers=tuple(sorted(workers)))


@dataclass(frozen=True, slots=True)
class Protocol:
    """The transport, the guards in place, and how far to explore."""

    deduplicates: bool = True
    without: frozenset[str] = frozenset()
    most_claims: int = 2
    """Claims of each follow-up: by a first worker, and by one that takes over. The long form explores a third."""
    most_attempts: int = 2
    creates_late: bool = False
    """Whether the second follow-up does not exist at the start."""

    def guards(self, name: str) -> bool:
        """Return whether a guard is in place."""
        return name not in self.without


class Broken(Exception):  # noqa: N818 - a broken promise, named as such
    """Raised by a step that finds a promise broken."""


def break_promise(name: str) -> None:
    """Raise `Broken` for a promise."""
    raise Broken(name)
