"""JSON responses, written from rows.

The models document the responses, and name the fields. They check nothing, since each row comes from a table whose
types and constraints already ensure it.
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from fastapi.responses import Response
from pydantic_core import to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from followups.api.schemas import ResponseModel

MEDIA_TYPE = "application/json"


def one(model: type[ResponseModel], row: object) -> bytes:
    """Return the JSON of a row, which has the model's fields as attributes."""
    names, values = _fields(model)
    return to_json(dict(zip(names, values(row), strict=True)))


def many(model: type[ResponseModel], rows: Iterable[object]) -> bytes:
    """Return the JSON array of rows."""
    names, values = _fields(model)
    return to_json([dict(zip(names, values(row), strict=True)) for row in rows])


@lru_cache(maxsize=8)  # more than there are models
def _fields(model: type[ResponseModel]) -> tuple[tuple[str, ...], Callable[[object], tuple[Any, ...]]]:
    """Return the JSON names of a model's fields, and a function that reads their values from a row."""
    names = tuple(field.serialization_alias or name for name, field in model.model_fields.items())
    return names, attrgetter(*model.model_fields)


def answer(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response."""
    return Response(body, status, headers, MEDIA_TYPE)
