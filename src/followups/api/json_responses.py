"""JSON responses, serialised where the request is served.

FastAPI would validate a returned model a second time, in another turn of the thread pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.responses import Response

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from followups.api.schemas import Answer

MEDIA_TYPE = "application/json"


def one(model: type[Answer], row: object) -> bytes:
    """Return the JSON of a row."""
    return model.model_validate(row).model_dump_json().encode()


def many(model: type[Answer], rows: Iterable[object]) -> bytes:
    """Return the JSON array of rows."""
    return b"[" + b",".join(one(model, row) for row in rows) + b"]"


def answer(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response."""
    return Response(body, status, headers, MEDIA_TYPE)
