"""Tests that every alert fires as intended, is documented, and uses existing series."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import web
from deploy.manifests import DEPLOY, documents
from followups.delivery.settle import OUTCOME_NAMES
from followups.states import ReasonCode, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from followups.settings import Settings

PROMETHEUS = DEPLOY / "prometheus"
(RULES,) = documents(PROMETHEUS / "alerts.yaml")
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
RECORDED = {rule["record"]: rule["expr"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = [*(rule["expr"] for rule in ALERTS.values()), *RECORDED.values(), *QUERIES]
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


@pytest.fixture
def shown(settings: Settings) -> Iterator[set[str]]:
    """Return the name of every series that a web process exposes."""
    with web.served(settings) as (host, port):
        text = httpx.get(f"http://{host}:{port}/metrics", timeout=20).text
    families = text_string_to_metric_families(text)
    return {f"{family.name}{suffix}" for family in families for suffix in SUFFIXES.get(family.type, ("",))}


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run promtool if it is installed."""
    if not (found := shutil.which("promtool")):
        pytest.skip("promtool is not installed (Debian: prometheus)")
    return subprocess.run([found, *map(str, arguments)], cwd=PROMETHEUS, capture_output=True, text=True, check=False)


def test_prometheus_accepts_the_rules() -> None:
    """Prometheus accepts the configuration and its rules."""
    ran = promtool("check", "config", "prometheus.yaml")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_each_alert_fires_for_its_fault_alone() -> None:
    """For each fault, only the alert for that fault fires; no alert fires for a healthy system."""
    ran = promtool("test", "rules", "alerts.test.yaml")
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_is_tested_firing_and_not_firing(name: str) -> None:
    """For each alert, the promtool tests cover a case in which it fires and one in which it does not."""
    (suite,) = documents(PROMETHEUS / "alerts.test.yaml")
    expected = [
        (one["name"].startswith("All is well"), bool(case.get("exp_alerts")))
        for one in suite["tests"]
        for case in one["alert_rule_test"]
        if case["alertname"] == name
    ]
    assert {(True, False), (False, True), (False, False)} <= set(expected)


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, without punctuation and with dashes for spaces."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_has_advice(name: str) -> None:
    """Each alert has a severity, a text, and an entry in OPERATIONS.md."""
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor == name.lower()
    assert anchor in anchors((DEPLOY.parent / path).read_text())


def test_operations_explains_exactly_the_existing_alerts() -> None:
    """OPERATIONS.md explains every existing alert and no other alerts."""
    explained = re.findall(r"^#+ (FollowUps\w+)$", (DEPLOY / "OPERATIONS.md").read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(ALERTS)


def test_every_queried_series_is_exposed(shown: set[str]) -> None:
    """Every time series in an alert, rule or dashboard comes from `web` or a recording rule."""
    asked = {name for one in EXPRESSIONS for name in re.findall(r"\bfollowups_[a-z_]+|\bprocess_[a-z_]+", one)}
    recorded = {name for one in EXPRESSIONS for name in re.findall(r"\bfollowups:[a-z0-9_:]+", one)}
    assert asked <= shown | set(re.findall(r'job="(\w+)"', " ".join(EXPRESSIONS)))
    assert recorded == RECORDED.keys()


def test_each_recorded_series_is_used() -> None:
    """Every recorded series is used by an alert, a graph or another series."""
    for name in RECORDED:
        assert [one for one in EXPRESSIONS if re.search(rf"{name}(?![\w:])", one)]


def test_labels_have_values_that_exist() -> None:
    """The alerts' queries name only existing states, reasons and outcomes."""
    known: dict[str, set[str]] = {
        "code": {code.value for code in ReasonCode},
        "status": {status.value for status in Status},
        "outcome": set(OUTCOME_NAMES.values()),
    }
    found: list[tuple[str, str]] = [
        (label, value)
        for one in EXPRESSIONS
        for label, values in re.findall(r'\b(code|status|outcome)=~?"([^"]+)"', one)
        for value in values.split("|")
    ]
    assert found
    assert not [(label, value) for label, value in found if value not in known[label]]


def test_no_count_is_summed_over_web_processes() -> None:
    """Alerts and graphs use the maximum of the counts from all web processes, never their sum.

    All `web` processes expose the same counts.
    """
    raw = re.compile(r"followups_\w+(_total|_bucket)\b")
    for one in (*(rule["expr"] for rule in ALERTS.values()), *QUERIES):
        assert not raw.search(one)
    assert all(RECORDED[name].startswith("max") for name in RECORDED if not name.startswith("followups:failed"))


def test_the_dashboard_is_complete() -> None:
    """Every panel has a unique number, a description, a grid position, and the selected datasource."""
    panels: list[Any] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource"]
