"""Tests of the web process without a database or broker, or with invalid settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from databases import OWNER, SERVICE, make_roles, url_as, url_of
from followups.embedded import EmbeddedPostgres, Processes, free_port
from stack import wait_until
from web import FOLLOW_UPS, Api, command, in_days, is_problem, start

if TYPE_CHECKING:
    from followups.settings import Settings
    from world import World

KEY = {"authorization": f"fup_{'A' * 43}"}


def test_nothing_reachable() -> None:
    """Without a database and broker, the web process starts and runs, but rejects requests.

    The readiness check names the servers that cannot be reached.
    """
    nobody = f"127.0.0.1:{free_port()}"
    environment = {"DATABASE_URL": f"postgresql://u:hunter2@{nobody}/x", "REDIS_URL": f"redis://:hunter2@{nobody}/0"}
    with Processes() as processes:
        _, url = start(processes, environment)
        with httpx.Client(base_url=url, headers=KEY, verify=False) as client:  # noqa: S501 - the server has no TLS
            assert client.get("/healthz").status_code == 200
            problem = is_problem(client.get("/readyz"), 503, "not-ready")
            assert "database (" in problem["detail"]
            assert "broker (" in problem["detail"]
            refused = client.get(FOLLOW_UPS)
            is_problem(refused, 503, "unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            metrics = client.get("/metrics")
            assert metrics.status_code == 200
            assert "followups_claimed_total" in metrics.text
            told = [problem["detail"], refused.text, (processes.logs / "web.log").read_text()]
        assert not any("hunter2" in text or nobody in text for text in told)


def test_broker_unreachable(settings: Settings, world: World) -> None:
    """While the broker is unreachable, requests are served quickly; the web process counts and logs the outage."""
    options = {"FOLLOWUPS_BROKER_URL": f"redis://127.0.0.1:{free_port()}/0"}
    with Processes() as processes:
        api = Api(start(processes, settings.environment() | options)[1], world)
        with api.client:
            begun = time.monotonic()
            assert all(api.create(due="2020-01-01T00:00:00Z") for _ in range(10))
            assert time.monotonic() - begun < 5
            counted = "followups_rate_limit_unavailable_total "
            lines = [line for line in api.get("/metrics").text.splitlines() if line.startswith(counted)]
            assert float(lines[0].split()[1]) >= 20
        assert (processes.logs / "web.log").read_text().count('"rate_limit_unavailable"') == 1


def test_database_restart(settings: Settings) -> None:
    """During a database restart, requests get 503; afterwards, requests succeed again."""
    from followups.database import make_engine  # noqa: PLC0415 - used only in this test
    from followups.schema import migrate  # noqa: PLC0415 - used only in this test
    from world import World  # noqa: PLC0415 - used only in this test

    with EmbeddedPostgres() as postgres, Processes() as processes:
        make_roles(postgres.url())
        database_url = url_of(postgres.url(), SERVICE)
        migrate(url_as(database_url, OWNER))
        engine = make_engine(database_url)
        api = Api(start(processes, settings.environment() | {"FOLLOWUPS_DATABASE_URL": database_url})[1], World(engine))
        with api.client:
            chat_id = api.chat()
            postgres.kill()
            is_problem(api.get(FOLLOW_UPS), 503, "unavailable")
            assert api.get("/healthz").status_code == 200
            postgres.restart()
            assert wait_until(lambda: api.get(FOLLOW_UPS).status_code == 200)
            assert api.create(chat_id)
        engine.dispose()


def test_stop_lets_requests_finish(settings: Settings, world: World) -> None:
    """On SIGTERM, the web process completes a running request and then exits."""
    with Processes() as processes:
        child, url = start(processes, settings.environment())
        api = Api(url, world)
        with api.client, ThreadPoolExecutor(1) as pool, world.engine.connect() as connection:
            chat_id = api.chat()
            connection.exec_driver_sql("LOCK TABLE follow_ups IN EXCLUSIVE MODE")
            body = {"chatId": chat_id, "dueDate": in_days(1), "message": "?"}
            answer = pool.submit(api.post, FOLLOW_UPS, body)
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: world.scalar(waiting))
            child.ask()
            wait_until(lambda: "Shutting down" in (processes.logs / "web.log").read_text())
            connection.rollback()
            assert answer.result().status_code == 201
        wait_until(lambda: child.exit_code is not None)
        assert child.exit_code in {0, -signal.SIGTERM}  # uvicorn sends itself the signal again before it exits


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({}, ["FOLLOWUPS_DATABASE_URL", "FOLLOWUPS_BROKER_URL"]),
        ({"DATABASE_URL": "mysql://x", "REDIS_URL": "redis://x"}, ["DATABASE_URL", "postgresql://"]),
        ({"DATABASE_URL": "postgresql://x", "REDIS_URL": "redis://x", "PORT": "http"}, ["PORT"]),
        ({"DATABASE_URL": "postgresql://x", "REDIS_URL": "redis://x", "FOLLOWUPS_LEASE": "5"}, ["FOLLOWUPS_LEASE"]),
        (
            {"DATABASE_URL": "postgresql://x", "REDIS_URL": "redis://x", "FOLLOWUPS_RATE_LIMIT": "-1"},
            ["FOLLOWUPS_RATE_LIMIT"],
        ),
        (
            {"DATABASE_URL": "postgresql://x", "REDIS_URL": "redis://x", "FOLLOWUPS_API_RATE_LIMIT": "-1"},
            ["FOLLOWUPS_API_RATE_LIMIT"],
        ),
    ],
)
def test_wrong_settings(variables: dict[str, str], names: list[str]) -> None:
    """With an invalid setting, the web process exits with code 2 and names the setting."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    kept["PATH"] = str(Path(sys.executable).parent)
    run = subprocess.run(command("web"), env=kept | variables, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert all(name in run.stderr for name in names)
