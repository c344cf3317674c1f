"""Memory, lag and dead tuples stay constant under a long load with failures, cancels and replies."""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from faults.rig import rows_of
from process_tree import descendants, needs_proc

if TYPE_CHECKING:
    from uuid import UUID

    from faults.figures import Figures
    from faults.rig import Rig
    from web import Api

SECONDS = "FOLLOWUPS_TEST_SOAK"
"""The environment variable that sets the duration of the long load test, in seconds."""
STEP = 0.25
"""The number of seconds between two inserts."""
AHEAD = 5.0
"""The inserted follow-ups fall due within this many seconds."""
ROOM_MB = 32.0
"""A process's final memory may exceed its median by a quarter plus this many megabytes. This margin is needed because
allocators keep freed memory.
"""

# Count only follow-ups created at least 0.5 s before their due date and accepted at the first attempt. The query uses
# the same index as the follow-up lists. Taking a sample therefore does not become slower as the table grows.
_LAG = """
    SELECT percentile_cont(0.99) WITHIN GROUP (ORDER BY extract(epoch FROM accepted_at - due_date)) * 1000, max(now())
      FROM follow_ups
     WHERE workspace_id = :workspace AND status = 'sent' AND attempts = 1 AND accepted_at >= :since
       AND created_at >= CAST(:since AS timestamptz) - interval '60 s' AND due_date >= created_at + interval '0.5 s'
"""
_DEAD = "SELECT coalesce(sum(n_dead_tup), 0)::int FROM pg_stat_user_tables WHERE relname <> 'history'"


@dataclass
class Samples:
    """Repeated samples: for each name, a list of values."""

    rig: Rig
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self._since = self.rig.world.scalar("SELECT now()")

    def take(self) -> None:
        """Take a sample, whose lag covers the time since the previous sample."""
        for child in self.rig.processes.children:
            self.values[f"{child.command.name.partition('.')[0]}_rss_mb"].append(resident_mb(child.pid))
        parameters = {"workspace": self.rig.world.workspace_id, "since": self._since}
        ((lag, now),) = rows_of(self.rig, _LAG, **parameters)
        if now:
            self.values["lag_p99_ms"].append(float(lag))
            self._since = now
        self.values["dead_tuples"].append(float(self.rig.world.scalar(_DEAD)))
        with self.rig.broker() as broker:
            self.values["broker_mb"].append(broker.info("memory")["used_memory"] / 2**20)

    def summary(self) -> dict[str, list[float]]:
        """Return the first, the median and the last value of each list of samples."""
        return {
            f"first_median_last_{name}": [round(float(v), 2) for v in (each[0], statistics.median(each), each[-1])]
            for name, each in self.values.items()
        }

    def grown(self) -> dict[str, list[float]]:
        """Return the processes whose memory grew, except the chat server, which keeps every request."""
        return {
            name: each
            for name, each in self.values.items()
            if name.endswith("_rss_mb")
            and not name.startswith("sandbox")
            and each[-1] > statistics.median(each) * 1.25 + ROOM_MB
        }


def resident_mb(pid: int) -> float:
    """Return the memory of a process and all its descendants, in megabytes."""
    kilobytes = 0
    for one in [pid, *descendants(pid)]:
        lines = Path(f"/proc/{one}/status").read_text().splitlines()
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return kilobytes / 1024


def disturb(rig: Rig, api: Api, fresh: list[UUID]) -> None:
    """Make one new follow-up fail once, cancel another, and send a reply to a third one's chat."""
    failing, cancelled, replied = rig.rng.sample(fresh, 3)
    rig.behave(chat_of(rig, failing), kind="fail", times=1)
    assert rig.cancel(api, cancelled) in {200, 409}
    assert api.message(str(chat_of(rig, replied)), "user").status_code == 201


def chat_of(rig: Rig, follow_up_id: UUID) -> UUID:
    """Return the chat of a follow-up."""
    ((chat_id,),) = rows_of(rig, "SELECT chat_id FROM follow_ups WHERE id = :id", id=follow_up_id)
    return chat_id


def start(rig: Rig) -> Api:
    """Start one process of each type and wait until a message is sent.

    Waiting for the log line "ready" would fail, because these workers log only warnings.
    """
    rig.options |= {
        "FOLLOWUPS_LOG_LEVEL": "warning",
        "FOLLOWUPS_TRANSPORT_TIMEOUT": "10",
        "FOLLOWUPS_LEASE": "30",
    }
    rig.beat()
    rig.worker(ready=False)
    rig.sandbox()
    api = rig.web()
    rig.bulk(1)
    rig.settle_down(within=60)
    return api


def soak(rig: Rig, figures: Figures, seconds: float, rate: float) -> None:
    """For ``seconds``, add ``rate`` follow-ups per second and take a sample at least every 30 seconds."""
    api = start(rig)
    samples = Samples(rig)
    started = time.monotonic()
    with api.client:
        stream(rig, api, samples, seconds, rate)
    rig.settle_down(within=60 + AHEAD)
    samples.take()
    finish(rig, figures, samples, lasted_s=round(time.monotonic() - started))


def stream(rig: Rig, api: Api, samples: Samples, seconds: float, rate: float) -> None:
    """Add ``rate`` follow-ups per second, disturb some of them, and take samples periodically."""
    begin, every, looks, owed = time.monotonic(), min(30.0, seconds / 6), 1, 0.0
    for number in range(1, int(seconds / STEP) + 1):
        owed += rate * STEP
        fresh, owed = rig.bulk(int(owed), AHEAD), owed % 1
        if number % round(1 / STEP) == 0:
            disturb(rig, api, fresh)
        if time.monotonic() - begin >= looks * every:
            looks += 1
            samples.take()
        time.sleep(max(0.0, begin + number * STEP - time.monotonic()))


def finish(rig: Rig, figures: Figures, samples: Samples, **more: Any) -> None:
    """Check that the load was as intended, and record the figures."""
    failed = rig.world.scalar("SELECT count(*) FROM failed_attempts")
    verdict = rig.verdict()
    figures.keep(20, verdict, failed_attempts=failed, **more, **samples.summary())
    assert failed
    assert rig.cancelled
    assert set(verdict.ended) == {"sent", "cancelled"}
    assert all(child.running for child in rig.processes.children)
    assert not samples.grown()


@needs_proc
def test_load(rig: Rig, figures: Figures) -> None:
    """Under load, failures, cancels and replies break no promise and crash no process."""
    soak(rig, figures, seconds=12, rate=40)


@needs_proc
@pytest.mark.faults_long
def test_load_for_long(rig: Rig, figures: Figures) -> None:
    """The promises hold during an hour of load, and no process's memory keeps growing."""
    soak(rig, figures, seconds=float(os.environ.get(SECONDS, "3600")), rate=40)
