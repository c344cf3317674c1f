"""The system page for operators: findings of the doctor, workers, beat, queues and the breaker."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from followups.operations.doctor import checks

if TYPE_CHECKING:
    from starlette.responses import Response

    from followups.console.visit import Visit
    from followups.operations.doctor.process_checks import Replies


def show(visit: Visit) -> Response:
    """Show doctor's findings.

    The workers are asked only on request, because waiting for their replies takes a second. The endpoint is not
    checked, because web often has no access to it. If the endpoint refuses every message, the check "attempts" fails.
    """
    services = visit.services
    asks = "workers" in visit.query
    run = partial(checks.run, services.settings, services.engine, _ask_workers if asks else None, connects=False)
    findings = services.results.get(("system", asks), lambda: list(run()))
    return visit.page("system.html", findings=findings, asked=asks, failed=sum(not each.ok for each in findings))


def _ask_workers() -> Replies:
    from followups.worker import celery_app  # noqa: PLC0415 - Celery, which reads the environment when imported

    return celery_app.ask_workers()
