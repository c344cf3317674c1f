"""Tests for ``followups bench`` on servers that are already in use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import redis
from sqlalchemy import text

from databases import OWNER, url_as
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sqlalchemy import Engine

    from followups.settings import Settings
    from world import World

SCHEMAS = "SELECT count(*) FROM pg_namespace WHERE starts_with(nspname, 'followups_bench_')"


def start(settings: Settings, tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    """Start the benchmark on the configured servers, with a role that may create schemas."""
    owner = {"FOLLOWUPS_DATABASE_URL": url_as(settings.database_url.get_secret_value(), OWNER)}
    environment = os.environ | settings.environment() | owner | {"FOLLOWUPS_RUNTIME_DIR": str(tmp_path)}
    command: Sequence[str] = [sys.executable, "-m", "followups.cli", "bench", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_bench_measures_and_changes_no_data(settings: Settings, world: World, tmp_path: Path) -> None:
    """A benchmark reports throughput, lag and duplicates, and changes no existing data.

    The rows that the benchmark inserts are deleted.
    """
    mine = world.follow_up()
    bench = start(settings, tmp_path, "--count", "300", "--rate", "50", "--seconds", "2", "--json")
    stdout, stderr = bench.communicate(timeout=120)
    assert bench.returncode == 0, stderr
    found = json.loads(stdout)
    assert (found["ok"], found["duplicates"], found["early"], found["unsent"]) == (True, 0, 0, 0)
    assert found["throughput"]["perSecond"] > 0
    assert found["lagMs"]["p50"] <= found["lagMs"]["p99"] <= found["lagMs"]["max"]
    row = world.row(mine)
    assert (row.status, row.lease_token) == ("pending", 0)
    assert world.scalar(SCHEMAS) == 0
    with redis.Redis.from_url(settings.broker_url.get_secret_value()) as broker:
        assert not list(broker.scan_iter("*bench*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted(settings: Settings, world: World, engine: Engine, tmp_path: Path, number: int) -> None:
    """A benchmark stopped with Ctrl-C removes its data; after SIGKILL, the next run removes the data."""
    bench = start(settings, tmp_path, "--count", "10000", "--delay", "0.2")
    wait_until(lambda: world.scalar(SCHEMAS) == 1, within=60)
    world.alter("CREATE SCHEMA followups_bench_elsewhere")
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(hashtext('followups_bench_elsewhere'))"))
        connection.commit()
        bench.send_signal(number)
        bench.communicate(timeout=120)
        assert bench.returncode != 0
        if number == signal.SIGINT:
            assert world.scalar(SCHEMAS) == 1
            return
        again = start(settings, tmp_path, "--count", "10", "--rate", "1", "--seconds", "1")
        _, stderr = again.communicate(timeout=120)
        assert again.returncode == 0, stderr
        assert world.scalar(SCHEMAS) == 1
