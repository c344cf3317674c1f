"""How readiness checks, doctor and other commands report a read-only database."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from followups.api.routes.health import ReadinessChecks
from followups.cli import main
from followups.database import make_engine
from followups.operations.doctor import database_checks
from foreign import read_only, url_for_any_server

if TYPE_CHECKING:
    from followups.settings import Settings
    from world import World


@pytest.mark.parametrize("any_server", [False, True])
def test_readiness_and_doctor_report_read_only(
    settings: Settings, world: World, database_url: str, *, any_server: bool
) -> None:
    """Readiness and doctor report a read-only database, even if the URL excludes read-only servers.

    Doctor never advises the operator to start more workers.
    """
    world.follow_up(due=-timedelta(hours=1))
    url = url_for_any_server(database_url) if any_server else database_url
    engine = make_engine(url)
    health = ReadinessChecks(settings, engine)
    with read_only(database_url):
        check = health.checks()["database"]
        findings = [*database_checks.databases(settings, engine), *database_checks.of_database(settings, engine)]
    assert (check.ok, check.detail.partition(":")[0]) == (False, "it is read-only")
    found = {finding.name: finding for finding in findings}
    assert "it is read-only" in found["database"].detail
    assert found["database"].advice.startswith("Wait for the failover to end, or point FOLLOWUPS_DATABASE_URL at")
    assert "backlog" not in found
    health.close()
    engine.dispose()


def test_commands_report_read_only(
    environment: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    database_url: str,
) -> None:
    """Every command reports a read-only database in one sentence, even a command that only reads."""
    for url in (database_url, url_for_any_server(database_url)):
        environment.setenv("FOLLOWUPS_DATABASE_URL", url)
        with read_only(database_url):
            assert main(["workspace", "create", "acme"]) == 1
        told = capsys.readouterr().err
        assert told.startswith("followups: The database '")
        assert "cannot be used: it is read-only: wait for the failover to end" in told
        assert told.count("\n") == 1
