"""The OpenAPI 3.1 document, and the interactive documentation at ``/docs``.

FastAPI generates the document; this module adds the error responses and security schemes. The documentation page is
Swagger UI from a Python package; it has a content security policy.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response

from followups.api import responses
from followups.api.problems import Problem

if TYPE_CHECKING:
    from fastapi import FastAPI

    from followups.api.request_limits import SharedResult


TITLE = "Chat follow-ups"
DESCRIPTION = """\
Messages that are sent into chats at their due date, unless something cancels them first.

Times are RFC 3339 in UTC, ids UUIDs, errors `application/problem+json` (RFC 9457).
Every response has an `x-request-id`: the request's, if it has one. The logs contain this id too.
"""

SECURITY_SCHEMES = {
    "apiKey": {
        "type": "apiKey",
        "in": "header",
        "name": "authorization",
        "description": "The API key alone, without a scheme.",
    },
    "bearer": {"type": "http", "scheme": "bearer", "description": "The API key as a bearer token."},
}
SECURITY: list[dict[str, list[str]]] = [{name: []} for name in SECURITY_SCHEMES]

TAGS = [
    {"name": "Chat Message Follow Ups", "description": "Follow-ups of the workspace that the API key belongs to."},
    {"name": "Chats", "description": "What the chat platform reports about its chats."},
    {"name": "Service", "description": "Endpoints for operators; they require no key."},
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


STATIC = Path(str(files("fastapi_offline"))) / "static"
CACHED = {"cache-control": "public, max-age=86400"}
"""Cache headers of static files, which change only with a new version of the package."""

# Swagger UI sets inline styles and loads icons from data URLs.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# The URLs are relative, so that the page works under any path prefix.
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Chat follow-ups: API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
<div id="documentation"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</html>
"""
START = """SwaggerUIBundle({url: "openapi.json", dom_id: "#documentation", deepLinking: true, validatorUrl: null});
"""

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def page() -> Response:
    """Return the page of the interactive documentation."""
    return HTMLResponse(PAGE, headers={"content-security-policy": POLICY, "referrer-policy": "no-referrer"})


@router.get("/docs/start.js")
async def start() -> Response:
    """Return the script that starts Swagger UI. The content security policy forbids inline scripts."""
    return Response(START, media_type="text/javascript", headers=CACHED)


@router.get("/docs/swagger-ui-bundle.js")
async def script() -> Response:
    """Return Swagger UI's script."""
    return Response(_content("swagger-ui-bundle.js"), media_type="text/javascript", headers=CACHED)


@router.get("/docs/swagger-ui.css")
async def style() -> Response:
    """Return Swagger UI's style sheet."""
    return Response(_content("swagger-ui.css"), media_type="text/css", headers=CACHED)


@router.get("/openapi.json")
async def document(request: Request) -> Response:
    """Return the OpenAPI document."""
    result: SharedResult[bytes] = request.app.state.document
    return responses.answer(await result.get())


@lru_cache
def _content(name: str) -> bytes:
    """Return a static file, which is read once and then kept in memory."""
    return (STATIC / name).read_bytes()
