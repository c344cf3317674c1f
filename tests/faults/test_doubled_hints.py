"""Duplicated and shuffled broker messages do not change what is sent."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from celery import Celery

from followups.delivery.claim import claim
from followups.delivery.hints import DELIVER, DISPATCH, batches
from stack import wait_until

if TYPE_CHECKING:
    from faults.figures import Figures
    from faults.rig import Rig


def doubled(rig: Rig, figures: Figures, count: int, rounds: int) -> None:
    """Freeze the workers, duplicate and shuffle the queued messages, then resume the workers."""
    rig.options |= {"FOLLOWUPS_LEASE": "60", "FOLLOWUPS_BATCH_SIZE": "5"}
    reader, *others = rig.start(workers=3, beats=2)
    hints = 0
    for _ in range(rounds):
        for other in others:
            other.signal(signal.SIGSTOP)
        reader.signal(signal.SIGSTOP)
        rig.bulk(count, spread=0.5)
        hints += claimed_and_doubled(rig)
        for worker in (reader, *others):
            worker.signal(signal.SIGCONT)
        rig.settle_down(within=90)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(rig.created)}
    assert hints > 0
    requests = len(rig.received())
    figures.keep(11, verdict, hints_doubled=hints, sends_per_key=round(requests / len(rig.created), 4))


def claimed_and_doubled(rig: Rig) -> int:
    """Claim as a tick does, then queue each message twice, shuffled; return the number of originals.

    While a worker is frozen, its open BRPOP still takes one hint from the queue. This function therefore waits until
    all follow-ups are due. A claim of all due follow-ups publishes more hints than there are workers. A worker that is
    frozen during a claim blocks other claims until PostgreSQL ends its transaction. The claim is therefore repeated
    until it returns leases.
    """
    wait_until(lambda: rig.world.scalar("SELECT max(due_date) <= now() FROM follow_ups"))
    settings = rig.settings.model_copy(update={"lease": rig.settings.lease * 20})
    app = Celery("followups", broker=settings.broker_url.get_secret_value())
    app.conf.broker_transport_options = {"global_keyprefix": settings.broker_prefix}
    leases = wait_until(lambda: claim(rig.world.engine, settings).leases, within=60)
    for hint in batches(leases, 5):
        app.send_task("followups.deliver", args=hint, queue=DELIVER)
    app.close()
    total = 0
    with rig.broker() as broker:
        wait_until(lambda: broker.llen(f"{settings.broker_prefix}{DELIVER}"))
        for name in (f"{settings.broker_prefix}{DELIVER}", f"{settings.broker_prefix}{DISPATCH}"):
            messages = broker.lpop(name, 10_000) or []
            twice = messages * 2
            rig.rng.shuffle(twice)
            if twice:
                broker.rpush(name, *twice)
            total += len(messages)
    return total


def test_doubled_and_shuffled(rig: Rig, figures: Figures) -> None:
    """If hints are duplicated and shuffled, each follow-up is still sent by exactly one request."""
    doubled(rig, figures, count=100, rounds=2)


@pytest.mark.faults_long
def test_doubled_and_shuffled_often(rig: Rig, figures: Figures) -> None:
    """If hints are duplicated in many rounds, each follow-up is sent by exactly one request."""
    doubled(rig, figures, count=900, rounds=20)
