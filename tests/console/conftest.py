"""A console server in a thread, shared by all tests of a process; each test has a separate workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from console.person import Person
from followups.console import access
from followups.database import make_engine
from web import served, settings_on_database
from world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

    from followups.settings import Settings


@pytest.fixture(scope="session")
def console_settings(postgres_url: str, template_database: str, server_urls: tuple[str, str]) -> Iterator[Settings]:
    """Return settings with a migrated database that the tests share."""
    with settings_on_database("test_console", postgres_url, template_database, server_urls[1]) as settings:
        yield settings


@pytest.fixture(scope="session")
def console_url(console_settings: Settings) -> Iterator[str]:
    """Serve the application in a thread, and return its URL."""
    with served(console_settings) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture(scope="session")
def console_engine(console_settings: Settings) -> Iterator[Engine]:
    """Return an engine for the server's database."""
    engine = make_engine(console_settings.database_url.get_secret_value())
    yield engine
    engine.dispose()


@pytest.fixture(autouse=True)
def many_failed_sign_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow many failed sign-ins, because all tests sign in from one address within a minute."""
    monkeypatch.setattr(access, "MAX_BY_CLIENT", 10_000)


@pytest.fixture
def own(console_engine: Engine) -> World:
    """Return the test's own workspace."""
    return World(console_engine)


@pytest.fixture
def foreign(console_engine: Engine) -> World:
    """Return a workspace other than the test's own."""
    return World(console_engine)


@pytest.fixture
def person(console_url: str, console_engine: Engine) -> Iterator[Callable[..., Person]]:
    """Return a function that signs a person in with the given role and workspace."""
    people: list[Person] = []

    def come(role: str | None = None, world: World | None = None, chat_id: object = None) -> Person:
        people.append(Person(console_url, console_engine))
        if role is None:
            return people[-1]
        return people[-1].signed_in(role, world and world.workspace_id, chat_id)  # type: ignore[arg-type] # a UUID

    yield come
    for each in people:
        each.client.close()
