"""Tests of the web endpoints that are meant for operators."""

from __future__ import annotations

import shutil
import subprocess
import time
from datetime import timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from followups.api.request_limits import KEPT
from metrics_lint import flaws
from stack import wait_until
from web import is_problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from web import Api

HOUR = timedelta(hours=1)
NAMES = {
    "followups_pending", "followups_overdue", "followups_oldest_overdue_seconds", "followups_in_flight",
    "followups_transitions", "followups_attempts", "followups_attempt_duration_seconds", "followups_lag_seconds",
    "followups_claimed", "followups_stale_writes", "followups_leases_expired", "followups_tick_duration_seconds",
    "followups_last_tick_timestamp_seconds",
}  # fmt: skip


@pytest.fixture
def ticking(api: Api) -> Iterator[Api]:
    """Record a tick as if it had just run."""
    api.world.sql("UPDATE dispatcher_state SET last_tick_at = now()")
    yield api
    api.world.sql("UPDATE dispatcher_state SET last_tick_at = NULL")


def _answered(api: Api, status: int) -> Any:
    """Return the response of `/readyz` if it has the expected status, and otherwise None.

    The response may be a second old, because `/readyz` caches it.
    """
    answer = api.client.get("/readyz", headers={"authorization": ""})
    return answer.json() if answer.status_code == status else None


def _refused_for(api: Api, failing: str) -> Any:
    """Return the 503 response of `/readyz` if the given check failed; otherwise return None.

    A cached 503 response may name a different failed check.
    """
    answer = api.client.get("/readyz", headers={"authorization": ""})
    if answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
        return None
    problem = is_problem(answer, 503, "not-ready")
    return problem if problem["checks"][failing]["ok"] is False else None


def test_healthz(api: Api) -> None:
    """`/healthz` returns 200 while the process is running."""
    answer = api.client.get("/healthz", headers={"authorization": ""})
    assert (answer.status_code, answer.json()) == (200, {"status": "up"})


def test_ready(ticking: Api) -> None:
    """If all readiness checks pass, `/readyz` returns the list of checks."""
    answer = wait_until(lambda: _answered(ticking, HTTPStatus.OK), within=5)
    assert answer["status"] == "ready"
    checks = answer["checks"]
    assert checks.keys() == {"database", "migrations", "tick", "broker"}
    assert all(check["ok"] for check in checks.values())


@pytest.mark.parametrize(
    ("statement", "undo", "failing"),
    [
        ("UPDATE dispatcher_state SET last_tick_at = now() - interval '11 s'", "SELECT 1", "tick"),
        ("UPDATE dispatcher_state SET last_tick_at = NULL", "SELECT 1", "tick"),
        (
            "UPDATE alembic_version SET version_num = '0001'",
            "UPDATE alembic_version SET version_num = :newest",
            "migrations",
        ),
    ],
)
def test_not_ready(ticking: Api, statement: str, undo: str, failing: str) -> None:
    """If a readiness check fails, `/readyz` returns 503 and names that check."""
    newest = ticking.world.scalar("SELECT version_num FROM alembic_version")
    ticking.world.sql(statement)
    try:
        problem = wait_until(lambda: _refused_for(ticking, failing), within=5)
    finally:
        ticking.world.sql(undo, **({"newest": newest} if ":newest" in undo else {}))
    assert f"{failing} (" in problem["detail"]
    assert problem["checks"]["database"]["ok"] is True


def test_ready_on_a_newer_schema(ticking: Api) -> None:
    """If a newer version has migrated the schema, older processes stay ready."""
    newest = ticking.world.scalar("SELECT version_num FROM alembic_version")
    ticking.world.sql("UPDATE alembic_version SET version_num = '9999'")
    try:
        answer = wait_until(
            lambda: "9999" in str(_answered(ticking, HTTPStatus.OK)) and _answered(ticking, HTTPStatus.OK), within=5
        )
    finally:
        ticking.world.sql("UPDATE alembic_version SET version_num = :newest", newest=newest)
    assert "9999, newer than" in answer["checks"]["migrations"]["detail"]


def test_metrics(api: Api) -> None:
    """Every documented metric exists, and no metric is labelled with an id."""
    api.patch(api.create(), status="cancelled")
    cancelled = {"status": "cancelled", "code": "cancelled_by_api"}
    wait_until(lambda: _ended(api, cancelled) > 0)
    families = {family.name: family for family in text_string_to_metric_families(api.get("/metrics").text)}
    assert families.keys() >= NAMES
    labels = {name: {label for sample in families[name].samples for label in sample.labels} for name in NAMES}
    assert set().union(*labels.values()) == {"status", "code", "transport", "outcome", "le"} - (
        set() if families["followups_attempts"].samples else {"transport", "outcome"}
    )


def test_metrics_pass_the_lint_check(api: Api) -> None:
    """The metrics page passes the project's lint check and, if installed, `promtool check metrics`."""
    api.patch(api.create(), status="cancelled")
    text = api.get("/metrics").text
    assert flaws(text) == []
    if promtool := shutil.which("promtool"):
        command = [promtool, "check", "metrics"]
        ran = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_gauges(api: Api) -> None:
    """The gauges show the backlog in the database."""
    chat_id = api.world.chat()
    first = api.world.follow_up(chat_id, due=-HOUR)
    api.world.follow_up(chat_id, due=-HOUR / 2, waits_for=first)
    api.world.follow_up(due=-HOUR / 2, begun_at=text("now()"), lease_until=text("now()"))
    api.world.follow_up(due=HOUR)

    def gauges() -> dict[str, float]:
        families = text_string_to_metric_families(api.get("/metrics").text)
        return {sample.name: sample.value for family in families for sample in family.samples}

    def told() -> bool:
        found = gauges()
        return (
            found["followups_oldest_overdue_seconds"] >= HOUR.total_seconds()
            and found["followups_pending"] >= 4
            and found["followups_overdue"] >= 2
            and found["followups_in_flight"] >= 1
        )

    # The web process caches gauges for two seconds, and other tests use the same database.
    assert wait_until(told)
    api.world.sql("DELETE FROM follow_ups WHERE workspace_id = :id", id=api.world.workspace_id)


def test_many_scrapes_need_one_query(api: Api) -> None:
    """If many metrics requests arrive within one second, they cost only one query."""
    begun = time.monotonic()
    texts = {api.get("/metrics").text for _ in range(30)}
    assert len(texts) <= 2 + (time.monotonic() - begun) / KEPT


def test_docs(api: Api) -> None:
    """The web process serves the API documentation as a readable page."""
    answer = api.get("/docs")
    assert answer.status_code == 200
    assert "swagger-ui" in answer.text
    assert "openapi.json" in api.get("/docs/start.js").text


def test_transitions_are_counted_once(api: Api) -> None:
    """State transitions are counted by status and code, but a repeated request is not counted again."""
    before = _settled(api, HUMAN_TAKEOVER)
    chat_id = str(uuid4())
    api.message(chat_id, "agent")
    for _ in range(3):
        api.create(chat_id)
    api.message(chat_id, "operator")
    assert _settled(api, HUMAN_TAKEOVER) == before + 3
    api.message(chat_id, "operator")
    assert _settled(api, HUMAN_TAKEOVER) == before + 3


def test_naming_the_chat_message_is_no_transition(api: Api) -> None:
    """Adding a chat message id to a sent follow-up does not count as a second send."""
    sent = {"status": "sent", "code": ""}
    before, created = _settled(api, sent), api.create()
    api.patch(created, status="sent", finishedAt="2020-01-01T00:00:00Z")
    api.patch(created, status="sent", chatMessageId=str(uuid4()))
    assert _settled(api, sent) == before + 1


HUMAN_TAKEOVER = {"status": "cancelled", "code": "human_takeover"}


def _settled(api: Api, labels: dict[str, str]) -> float:
    """Wait until the cached metrics have expired, and return the current count."""
    time.sleep(KEPT)
    return _ended(api, labels)


def _ended(api: Api, labels: dict[str, str]) -> float:
    families = text_string_to_metric_families(api.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.labels == labels]
    return sum(sample.value for sample in samples if sample.name == "followups_transitions_total")
