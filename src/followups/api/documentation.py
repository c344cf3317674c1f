"""The interactive documentation at ``/docs``: Swagger UI from a Python package, with a content security policy."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from followups.api import json_responses

if TYPE_CHECKING:
    from followups.api.shares import SharedResult

STATIC = Path(str(files("fastapi_offline"))) / "static"
CACHED = {"cache-control": "public, max-age=86400"}
"""Cache headers of static files, which change only when the package is updated."""

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
    return json_responses.answer(await result.get())


@lru_cache
def _content(name: str) -> bytes:
    """Return a static file, which is read once and then kept in memory."""
    return (STATIC / name).read_bytes()
