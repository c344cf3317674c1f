"""The system page for operators: findings of the doctor, workers, beat, queues and the breaker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from followups.operations.doctor import Finding, broker_checks, connection_checks, database_checks, process_checks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.responses import Response

    from followups.console.services import ConsoleServices
    from followups.console.visit import Visit


def show(visit: Visit) -> Response:
    """Show doctor's findings.

    Workers are queried only on request, because waiting for their replies takes a second.
    """
    services = visit.services
    asks = "workers" in visit.query
    findings: list[Finding] = list(services.results.get(("system", asks), lambda: list(_findings(services, asks=asks))))
    return visit.page("system.html", findings=findings, asked=asks, failed=sum(not each.ok for each in findings))


def _findings(services: ConsoleServices, *, asks: bool) -> Iterator[Finding]:
    settings = services.settings
    yield connection_checks.timeouts(settings)
    yield from database_checks.databases(settings, services.engine)
    yield from database_checks.of_server(services.engine)
    yield from database_checks.of_database(settings, services.engine)
    yield from database_checks.of_tables(services.engine)
    yield from database_checks.of_rooms(settings, services.engine)
    reachable = True
    for finding in broker_checks.broker(settings):
        reachable = reachable and (finding.ok or finding.name != "broker")
        yield finding
    if reachable:
        yield from broker_checks.of_broker(settings)
    if asks:
        yield process_checks.workers(_ask_workers)
    yield process_checks.of_this_machine(settings)


def _ask_workers() -> process_checks.Replies:
    from followups.worker import celery_app  # noqa: PLC0415 - Celery, which reads the environment when imported

    return celery_app.ask_workers()
