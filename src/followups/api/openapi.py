"""The OpenAPI 3.1 document: FastAPI's own, with this API's error responses and security schemes."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi.openapi.utils import get_openapi

from followups.api.problems import Problem

if TYPE_CHECKING:
    from fastapi import FastAPI

TITLE = "Chat follow-ups"
DESCRIPTION = """\
Messages that are sent into chats at their due date, unless something cancels them first.

Times are RFC 3339 in UTC, ids UUIDs, errors `application/problem+json` (RFC 9457).
Every answer has an `x-request-id`, the request's own if it has one; the logs name it.
"""

SECURITY_SCHEMES = {
    "apiKey": {"type": "apiKey", "in": "header", "name": "authorization", "description": "The API key, raw."},
    "bearer": {"type": "http", "scheme": "bearer", "description": "The API key as a bearer token."},
}
SECURITY: list[dict[str, list[str]]] = [{name: []} for name in SECURITY_SCHEMES]

TAGS = [
    {"name": "Chat Message Follow Ups", "description": "Follow-ups of the workspace that the API key belongs to."},
    {"name": "Chats", "description": "What the chat platform tells about its chats."},
    {"name": "Service", "description": "For operators; without a key."},
]


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document for the application's routes."""
    document = get_openapi(
        title=TITLE,
        version=version("chat-followups"),
        openapi_version="3.1.0",
        description=DESCRIPTION,
        routes=app.routes,
        tags=TAGS,
    )
    components = document.setdefault("components", {})
    components["securitySchemes"] = SECURITY_SCHEMES
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    components.setdefault("schemas", {}).update(problem.pop("$defs"), Problem=problem)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["security"] = SECURITY if path.startswith("/api/") else []
    return document
