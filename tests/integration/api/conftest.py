"""One web process in each test process, for all tests with its settings; a workspace for each test."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import make_url

from followups.database import make_engine
from followups.embedded import Processes
from followups.embedded.postgres import create_database, drop_database
from followups.settings import Settings, load_settings
from web import Api, start
from world import World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine


@pytest.fixture(scope="session")
def web_settings(postgres_url: str, template_database: str, server_urls: tuple[str, str]) -> Iterator[Settings]:
    """Return settings on a migrated database that the tests share."""
    name = f"test_web_{uuid4().hex}"
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
def web_url(web_settings: Settings) -> Iterator[str]:
    """Start the Procfile's `web`; return its URL."""
    with Processes() as processes:
        yield start(processes, web_settings.environment())[1]


@pytest.fixture(scope="session")
def web_engine(web_settings: Settings) -> Iterator[Engine]:
    """Return an engine on the process's database."""
    engine = make_engine(web_settings.database_url.get_secret_value())
    yield engine
    engine.dispose()


@pytest.fixture
def api(web_url: str, web_engine: Engine) -> Iterator[Api]:
    """Return a client with its own workspace."""
    api = Api(web_url, World(web_engine))
    with api.client:
        yield api


@pytest.fixture
def other(web_url: str, web_engine: Engine) -> Iterator[Api]:
    """Return a client of another workspace."""
    other = Api(web_url, World(web_engine))
    with other.client:
        yield other
