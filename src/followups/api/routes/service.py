"""Endpoints for operators, without an API key: liveness, readiness and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from followups.api import json_responses, response_docs
from followups.api.problems import ProblemAnswer
from followups.api.schemas import Health, Readiness

if TYPE_CHECKING:
    from followups.api.schemas import Check
    from followups.api.shares import SharedResult

router = APIRouter(tags=["Service"])


@router.get("/healthz", operation_id="health", response_model=Health, responses=response_docs.HEALTH)
async def health() -> Response:
    """Report that the process is running, without checking anything else."""
    return json_responses.answer(b'{"status":"up"}')


@router.get("/readyz", operation_id="readiness", response_model=Readiness, responses=response_docs.READINESS)
async def readiness(request: Request) -> Response:
    """Check the database, its migrations, the age of the last tick, and the broker."""
    result: SharedResult[dict[str, Check]] = request.app.state.readiness
    checks = await result.get()
    failing = [f"{name} ({check.detail})" for name, check in checks.items() if not check.ok]
    if not failing:
        return json_responses.answer(Readiness(status="ready", checks=checks).model_dump_json().encode())
    told = {name: check.model_dump() for name, check in checks.items()}
    detail = f"Not ready: {', '.join(failing)}."
    return ProblemAnswer(503, "not-ready", detail, {"retry-after": "5"}, {"checks": told}).response()


@router.get("/metrics", operation_id="metrics", response_class=PlainTextResponse, responses=response_docs.METRICS)
async def metrics(request: Request) -> Response:
    """Return the counters of all processes and the gauges of the backlog in Prometheus text format."""
    result: SharedResult[bytes] = request.app.state.metrics
    return Response(await result.get(), media_type=CONTENT_TYPE_LATEST)
