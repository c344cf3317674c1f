"""Tests with random combinations of faults, to find bugs that no single fault reveals."""

from __future__ import annotations

import signal
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx
import pytest

from faults.rig import Load, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from faults.figures import Figures
    from faults.rig import Rig
    from followups.embedded import Child
    from web import Api

KINDS = ("fail", "rate_limit", "drop", "slow")
"""Temporary faults of the chat server."""


class RandomFaults:
    """Injects faults at random; repairs those that would keep the test from ending."""

    def __init__(self, rig: Rig, api: Api) -> None:
        self._rig, self._api = rig, api
        self._frozen: dict[Child, float] = {}
        self.workers: list[Child] = []
        self.beats: list[Child] = []
        self.done: Counter[str] = Counter()

    def begin(self) -> None:
        """Start two processes of each type."""
        self.beats = [self._rig.beat() for _ in range(2)]
        self._rig.sandbox()
        self.workers = [self._rig.worker(ready=False) for _ in range(2)]

    def strike(self) -> None:
        """Inject a random fault, and resume each process that has been frozen long enough."""
        kinds: list[Callable[[], None]] = [
            *(self.kill_worker, self.freeze_worker, self.kill_beat, self.flush_broker, self.restart_broker),
            *(self.restart_database, self.misbehave, self.cancel_some, self.cancel_some, self.reply),
        ]
        kind = self._rig.rng.choice(kinds)
        kind()
        self.done[kind.__name__] += 1
        for child, until in list(self._frozen.items()):
            if time.monotonic() > until:
                child.signal(signal.SIGCONT)
                del self._frozen[child]

    def calm(self) -> None:
        """Resume all processes, and let the chat server accept every request."""
        for child in self._frozen:
            child.signal(signal.SIGCONT)
        self._rig.behave(kind="accept")

    def kill_worker(self) -> None:
        """Kill a worker and start another, as a supervisor would."""
        number = self._rig.rng.randrange(len(self.workers))
        self._frozen.pop(self.workers[number], None)
        self.workers[number].signal(signal.SIGKILL)
        self.workers[number] = self._rig.worker(ready=False)

    def kill_beat(self) -> None:
        """Kill a beat and start another."""
        number = self._rig.rng.randrange(len(self.beats))
        self.beats[number].signal(signal.SIGKILL)
        self.beats[number] = self._rig.beat()

    def freeze_worker(self) -> None:
        """Freeze a worker for some time, which may be longer than a lease."""
        child = self._rig.rng.choice(self.workers)
        child.signal(signal.SIGSTOP)
        self._frozen[child] = time.monotonic() + self._rig.rng.uniform(0.2, 6.0)

    def flush_broker(self) -> None:
        """Delete all data in the broker."""
        with self._rig.broker() as broker:
            broker.flushall()

    def restart_broker(self) -> None:
        """Kill the broker and start it again without data."""
        assert self._rig.valkey
        self._rig.valkey.kill()
        time.sleep(self._rig.rng.random())
        self._rig.valkey.restart()

    def restart_database(self) -> None:
        """Restart PostgreSQL after a clean shutdown or a kill."""
        assert self._rig.postgres
        if self._rig.rng.random() < 0.5:
            self._rig.postgres.kill()
        self._rig.postgres.restart()

    def misbehave(self) -> None:
        """For a short time, make the chat server fail, reject, drop or delay requests."""
        kind = self._rig.rng.choice(KINDS)
        more = {"retry_after": 1} if kind == "rate_limit" else {"delay": 0.7} if kind == "slow" else {}
        self._rig.behave(kind=kind, **more)
        time.sleep(self._rig.rng.random())
        self._rig.behave(kind="accept")

    def cancel_some(self) -> None:
        """Cancel some of the pending follow-ups through the API."""
        query = "SELECT id FROM follow_ups WHERE status = 'pending' ORDER BY random() LIMIT 5"
        for (follow_up_id,) in rows_of(self._rig, query):
            with suppress(httpx.TransportError):
                self._rig.cancel(self._api, follow_up_id)

    def reply(self) -> None:
        """Send a user's message to a chat that has a pending follow-up."""
        query = "SELECT chat_id FROM follow_ups WHERE status = 'pending' ORDER BY random() LIMIT 1"
        for (chat_id,) in rows_of(self._rig, query):
            with suppress(httpx.TransportError):
                self._api.message(str(chat_id), "user")


def everything(rig: Rig, figures: Figures, seconds: float, rate: float) -> None:
    """Inject random faults under load, let all follow-ups end, and check every guarantee."""
    rig.options |= {"FOLLOWUPS_MAX_ATTEMPTS": "500"}
    api = rig.web()
    disorder = RandomFaults(rig, api)
    disorder.begin()
    end = time.monotonic() + seconds
    with api.client, Load(rig, rate, seconds, spread=2.0) as load:
        while time.monotonic() < end:
            with suppress(Exception):  # the database may be unreachable at this moment
                rig.bulk(6, spread=1.0, per_chat=3)
            disorder.strike()
            time.sleep(rig.rng.uniform(0.1, 1.0))
        load.wait()
        disorder.calm()
        took = rig.settle_down(within=120)
    verdict = rig.verdict()
    assert sum(disorder.done.values()) >= 3
    assert verdict.ended["sent"]
    assert verdict.ended.keys() <= {"sent", "cancelled", "failed"}
    lost = "SELECT count(*) FROM follow_ups WHERE status = 'failed' AND reason NOT LIKE 'worker_lost%'"
    assert rig.world.scalar(lost) == 0
    figures.keep(28, verdict, faults=dict(disorder.done), ended=dict(verdict.ended), at_rest_after_s=round(took, 2))


def test_everything_at_once(breakable: Rig, figures: Figures) -> None:
    """Ten random faults within ten seconds break no guarantee."""
    everything(breakable, figures, seconds=8, rate=40)


@pytest.mark.faults_long
def test_everything_for_minutes(breakable: Rig, figures: Figures) -> None:
    """After hundreds of random faults within minutes, every promise still holds."""
    everything(breakable, figures, seconds=600, rate=40)
