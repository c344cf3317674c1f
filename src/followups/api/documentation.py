"""The interactive documentation at ``/docs``: Swagger UI from a wheel, with a content security policy."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response

STATIC = Path(str(files("fastapi_offline"))) / "static"
CACHED = {"cache-control": "public, max-age=86400"}
"""Cache headers of the static files, which change only with a new version of the package."""

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
    """Return the script that starts Swagger UI, since the policy allows no inline scripts."""
    return Response(START, media_type="text/javascript", headers=CACHED)


@router.get("/docs/swagger-ui-bundle.js")
async def script() -> Response:
    """Return Swagger UI's script."""
    return FileResponse(STATIC / "swagger-ui-bundle.js", headers=CACHED)


@router.get("/docs/swagger-ui.css")
async def style() -> Response:
    """Return Swagger UI's style sheet."""
    return FileResponse(STATIC / "swagger-ui.css", headers=CACHED)
