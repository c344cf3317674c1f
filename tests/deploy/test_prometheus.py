"""Tests of Prometheus with the real system: dashboard queries return data, and faults trigger alerts.

To keep these tests short, every minute in Prometheus's configuration becomes two seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deploy.prometheus import MINUTE
from deploy.test_alerts import DASHBOARD, QUERIES, RECORDED
from stack import wait_until

if TYPE_CHECKING:
    from deploy.prometheus import Prometheus
    from stack import Stack


def test_each_panel_has_data(stack: Stack, prometheus: Prometheus) -> None:
    """After some sends and one rejection, each panel's query returns data, and no alert fires."""
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
def test_faults_fire_their_alerts(stack: Stack, prometheus: Prometheus) -> None:
    """If chats fail, workers stop or `web` stops, the matching alerts fire.

    When the fault ends, its alerts are resolved.
    """
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
