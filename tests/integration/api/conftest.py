"""Fixtures for API tests: one web process per set of settings, one workspace per test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from followups.database import make_engine
from followups.embedded import Processes
from web import Api, settings_on_database, start
from world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

    from followups.settings import Settings


@pytest.fixture(scope="session")
def web_settings(postgres_url: str, template_database: str, server_urls: tuple[str, str]) -> Iterator[Settings]:
    """Return settings with a migrated database that the tests share."""
    with settings_on_database("test_web", postgres_url, template_database, server_urls[1]) as settings:
        yield settings


@pytest.fixture(scope="session")
def web_url(web_settings: Settings) -> Iterator[str]:
    """Start the Procfile's `web` process and return its URL."""
    with Processes() as processes:
        yield start(processes, web_settings.environment())[1]


@pytest.fixture(scope="session")
def web_engine(web_settings: Settings) -> Iterator[Engine]:
    """Return an engine for the web process's database."""
    engine = make_engine(web_settings.database_url.get_secret_value())
    yield engine
    engine.dispose()


@pytest.fixture
def api(web_url: str, web_engine: Engine) -> Iterator[Api]:
    """Return an API client with its own workspace."""
    api = Api(web_url, World(web_engine))
    with api.client:
        yield api


@pytest.fixture
def other(web_url: str, web_engine: Engine) -> Iterator[Api]:
    """Return an API client for another workspace."""
    other = Api(web_url, World(web_engine))
    with other.client:
        yield other
