"""Fixtures that start the whole system; tests that break nothing share one system."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from conftest import brisk_settings
from databases import create_database, drop_database, url_of
from followups.database import make_engine
from followups.embedded import Processes
from followups.session_settings import BY_KEY
from stack import Stack
from world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from followups.settings import Settings


@pytest.fixture
def stack(settings: Settings, world: World) -> Iterator[Stack]:
    """Return the system with this test's database and broker, not yet started."""
    with Processes() as processes:
        stack = Stack(settings, world, processes)
        yield stack
        stack.stop()


@pytest.fixture(scope="module")
def running(server_urls: tuple[str, str], template_database: str) -> Iterator[Stack]:
    """Return a running system for tests that use only their own chats and follow-ups.

    While any test module uses the system, it ticks ten times per second.
    """
    postgres, valkey = server_urls
    name = f"running_{uuid4().hex}"
    create_database(postgres, name, template_database)
    engine = make_engine(url_of(postgres, name), options=BY_KEY)
    # This database number is outside the range of the tests' own databases.
    number = 32 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    settings = brisk_settings(url_of(postgres, name), f"{valkey.rpartition('/')[0]}/{number}")
    with Processes() as processes:
        stack = Stack(settings, World(engine), processes)
        # A long timeout suits slow machines, and does no harm, because these tests kill no process.
        stack.options |= {"FOLLOWUPS_TRANSPORT_TIMEOUT": "6", "FOLLOWUPS_LEASE": "30"}
        stack.start()
        yield stack
    engine.dispose()
    drop_database(postgres, name)
