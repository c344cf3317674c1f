"""Fair claims satisfy max-min fairness.

While a workspace waits, no slot goes to a workspace with more follow-ups in flight.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from random import Random
from typing import TYPE_CHECKING

import pytest

from followups.delivery import claim as claiming
from followups.delivery.claim import claim_fairly, size_of_claim
from followups.store import claims
from followups.store.leases import key_of
from world import World

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from followups.settings import Settings

LEASE_THE_FIRST = """
    UPDATE follow_ups SET lease_token = 1, lease_until = now() + interval '1 min'
     WHERE id IN (SELECT id FROM follow_ups WHERE workspace_id = :id ORDER BY due_date, id LIMIT :count)
"""


@pytest.mark.parametrize("seed", range(20))
def test_max_min(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Even a small fair claim prefers the workspaces with the fewest follow-ups in flight.

    A fair claim uses all free slots.
    """
    random = Random(seed)  # noqa: S311 - not used for security
    monkeypatch.setattr(claims, "FEW", random.choice([1, 2, 6]))
    monkeypatch.setattr(claiming, "CLAIM_SIZE", random.choice([3, 5, 1000]))
    window = random.choice([1, 5, 12, 20, 30])
    few = settings.model_copy(update={"max_in_flight": window})
    worlds = [World(engine) for _ in range(random.randint(1, 6))]
    due, in_flight, room = [], [], window
    for world in worlds:
        due.append(random.choice([0, 1, 2, 5, 8, 20, 40]))
        in_flight.append(random.randint(0, min(due[-1], room)))
        room -= in_flight[-1]
        if due[-1]:
            world.burst([-timedelta(seconds=random.uniform(0, 60)) for _ in range(due[-1])])
        world.sql(LEASE_THE_FIRST, id=world.workspace_id, count=in_flight[-1])
    for _ in range(window // size_of_claim(window) + 1):
        free = min(size_of_claim(window), window - sum(in_flight), sum(due) - sum(in_flight))
        got = Counter(lease.key for lease in claim_fairly(engine, few).leases)
        after = [count + got[key_of(world.workspace_id)] for count, world in zip(in_flight, worlds, strict=True)]
        assert got.total() == free
        least = min((count for count, all_of_it in zip(after, due, strict=True) if count < all_of_it), default=window)
        assert all(new <= least + 1 for new, old in zip(after, in_flight, strict=True) if new > old)
        in_flight = after
