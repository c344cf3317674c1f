"""Fixtures of the fault tests: seed, system under test, and recorder of figures."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from faults.figures import Figures
from faults.rig import chosen_servers, own_servers, running

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Engine

    from faults.proxy import Proxy
    from faults.rig import Rig
    from followups.settings import Settings

SEED = "FOLLOWUPS_TEST_SEED"


@pytest.fixture(scope="session")
def seed() -> int:
    """Return this run's seed: FOLLOWUPS_TEST_SEED or a new one. A failing test prints the seed."""
    return int(os.environ.get(SEED, random.SystemRandom().randrange(1_000_000)))


@pytest.fixture
def dice(seed: int) -> random.Random:
    """Return a seeded random generator, and print its seed."""
    print(f"{SEED}={seed}")  # noqa: T201 - pytest shows it where a test fails
    return random.Random(seed)  # noqa: S311 - not for secrets


@pytest.fixture
def figures(request: pytest.FixtureRequest, seed: int) -> Figures:
    """Return the recorder of this test's figures."""
    form = "long" if request.node.get_closest_marker("faults_long") else "short"
    servers = ", ".join(sorted(chosen_servers()))
    return Figures(seed, f"{request.node.name} ({servers})" if servers else request.node.name, form)


@pytest.fixture
def rig(request: pytest.FixtureRequest, dice: random.Random) -> Iterator[Rig]:
    """Return a system with its own database and broker on shared servers, which no test may stop."""
    if chosen_servers():
        with own_servers(dice) as (rig, _):
            yield rig
        return
    settings: Settings = request.getfixturevalue("settings")
    engine: Engine = request.getfixturevalue("engine")
    with running(settings, engine, dice) as rig:
        yield rig


@pytest.fixture
def breakable(dice: random.Random) -> Iterator[Rig]:
    """Return a system whose servers the test may kill and restart."""
    with own_servers(dice) as (rig, _):
        yield rig


@pytest.fixture
def proxied(dice: random.Random) -> Iterator[tuple[Rig, Sequence[Proxy]]]:
    """Return a system whose servers can be killed, with proxies in front of PostgreSQL and the broker."""
    with own_servers(dice, proxied=True) as both:
        yield both
