"""Prometheus itself beside the real system: each query of the dashboard is answered, real faults wake the alerts.

Its minutes are made two seconds long, so that a test need not wait for them.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

import web
from deploy.manifests import DEPLOY
from deploy.test_alerts import DASHBOARD, QUERIES, RECORDED
from followups.embedded import answers, free_port
from stack import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from stack import Stack

MINUTE = 2
"""Seconds."""


@dataclass
class Prometheus:
    """A running Prometheus."""

    url: str

    def ask(self, query: str) -> list[Any]:
        """Return the series that a query gives now."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=10).json()
        assert answer["status"] == "success", answer
        series: list[Any] = answer["data"]["result"]
        return series

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {one["metric"]["alertname"] for one in self.ask('ALERTS{alertstate="firing"}')}


def hastened(rules: str) -> str:
    """Return rules with short minutes, no patience, and a tick that is late after three seconds."""
    rules = re.sub(r"\[(\d+)m\]", lambda found: f"[{int(found[1]) * MINUTE}s]", rules)
    rules = re.sub(r"offset (\d+)m", lambda found: f"offset {int(found[1]) * MINUTE}s", rules)
    rules = re.sub(r"for: \w+", "for: 1s", rules)
    late = "max(followups_last_tick_timestamp_seconds) >"
    assert f"{late} 30" in rules
    return rules.replace(f"{late} 30", f"{late} 3")


@pytest.fixture
def scraped(stack: Stack) -> str:
    """Start everything, web included; return web's address."""
    stack.options |= {"FOLLOWUPS_MAX_ATTEMPTS": "2", "FOLLOWUPS_TICK_INTERVAL": "0.5"}
    stack.start()
    return web.start(stack.processes, stack.environment())[1]


@pytest.fixture
def prometheus(stack: Stack, scraped: str, tmp_path: Path) -> Prometheus:
    """Return a Prometheus that scrapes web, with the rules of deploy/."""
    if not (found := shutil.which("prometheus")):
        pytest.skip("prometheus is not installed")
    (tmp_path / "alerts.yaml").write_text(hastened((DEPLOY / "prometheus" / "alerts.yaml").read_text()))
    configuration = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    configuration["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    configuration["scrape_configs"][0]["static_configs"][0]["targets"] = [scraped.removeprefix("http://")]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    url = f"http://127.0.0.1:{(port := free_port())}"
    arguments = [f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    command = [found, *arguments, f"--web.listen-address=127.0.0.1:{port}"]
    stack.processes.spawn("prometheus", command, ready=answers(f"{url}/-/ready"))
    wait_until(lambda: Prometheus(url).ask("followups_pending"), within=30)
    return Prometheus(url)


def test_the_dashboard_has_answers(stack: Stack, prometheus: Prometheus) -> None:
    """With some sent and one refused, every query of every panel gives series, and no alert is on before the fault."""
    stack.wait_until_done(*[stack.world.follow_up() for _ in range(20)])
    wait_until(lambda: prometheus.ask('followups:attempts:total{outcome="sent"} >= 20'), within=30)
    assert prometheus.firing() == set()
    refused = stack.world.chat()
    stack.behave(refused, kind="reject", status=403)
    stack.wait_until_done(stack.world.follow_up(refused))
    queries = [query.replace("$__rate_interval", "10s") for query in QUERIES]
    assert len(queries) >= len(DASHBOARD["panels"])
    for query in [*queries, *RECORDED]:
        wait_until(lambda query=query: prometheus.ask(query), within=30)


@pytest.mark.faults_long
def test_faults_wake_the_alerts(stack: Stack, prometheus: Prometheus) -> None:
    """A failing chat, stopped workers, a stopped web: each is told by its own alerts, which end with it."""
    wait_until(lambda: prometheus.ask(f"followups:pending offset {10 * MINUTE}s"), within=60)
    assert prometheus.firing() == set()
    chat_server = {"FollowUpsTransportFailing", "FollowUpsGivenUp"}
    failing = stack.world.chat()
    stack.behave(failing, kind="fail", status=500)

    def fails_and_tells() -> bool:
        stack.wait_until_done(stack.world.follow_up(failing))
        return prometheus.firing() >= chat_server

    wait_until(fails_and_tells, within=60, every=0.2)
    assert prometheus.firing() == chat_server
    wait_until(lambda: prometheus.firing() == set(), within=60)

    (worker,) = (child for child in stack.processes.children if child.command.name == "worker")
    worker.ask()
    wait_until(lambda: not worker.running)
    stack.world.follow_up()
    wait_until(lambda: prometheus.firing() == {"FollowUpsTicksStopped", "FollowUpsNothingSent"}, within=30)
    stack.worker("worker-again")
    wait_until(lambda: prometheus.firing() == set(), within=30)

    (served,) = (child for child in stack.processes.children if child.command.name == "web")
    served.ask()
    wait_until(lambda: prometheus.firing() == {"FollowUpsWebDown"}, within=30)
