"""One server with the console for all tests of a process, in a thread; a workspace for each test."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import make_url

from console.person import Person
from followups.database import make_engine
from followups.embedded.postgres import create_database, drop_database
from followups.settings import Settings, load_settings
from web import served
from world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine


@pytest.fixture(scope="session")
def console_settings(postgres_url: str, template_database: str, server_urls: tuple[str, str]) -> Iterator[Settings]:
    """Return settings on a migrated database that the tests share."""
    name = f"test_console_{uuid4().hex}"
    create_database(postgres_url, name, template_database)
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    yield load_settings(
        database_url=make_url(postgres_url).set(database=name).render_as_string(hide_password=False),
        broker_url=f"{server_urls[1].rpartition('/')[0]}/{number}",
        transport_url="http://127.0.0.1:9/",
        tick_interval=timedelta(seconds=1),
        log_format="json",
    )
    drop_database(postgres_url, name)


@pytest.fixture(scope="session")
def console_url(console_settings: Settings) -> Iterator[str]:
    """Serve the application; return its URL."""
    with served(console_settings) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture(scope="session")
def console_engine(console_settings: Settings) -> Iterator[Engine]:
    """Return an engine on the server's database."""
    engine = make_engine(console_settings.database_url.get_secret_value())
    yield engine
    engine.dispose()


@pytest.fixture
def own(console_engine: Engine) -> World:
    """Return a workspace to fill."""
    return World(console_engine)


@pytest.fixture
def foreign(console_engine: Engine) -> World:
    """Return another workspace."""
    return World(console_engine)


@pytest.fixture
def person(console_url: str, console_engine: Engine) -> Iterator[Callable[..., Person]]:
    """Return a way to get a person, signed in with the role and the workspace that are given."""
    people: list[Person] = []

    def come(role: str | None = None, world: World | None = None, chat_id: object = None) -> Person:
        people.append(Person(console_url, console_engine))
        if role is None:
            return people[-1]
        return people[-1].signed_in(role, world and world.workspace_id, chat_id)  # type: ignore[arg-type] # a UUID

    yield come
    for each in people:
        each.client.close()
