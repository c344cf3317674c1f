"""JSON responses, written directly from database rows.

The response models only serve as documentation: they name the fields of the responses. The models validate nothing,
because the types and constraints of the tables already ensure valid values.
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
    """Return a row as JSON. The row must have the fields of the model as attributes."""
    names, values = _fields(model)
    return to_json(dict(zip(names, values(row), strict=True)))


def many(model: type[ResponseModel], rows: Iterable[object]) -> bytes:
    """Return rows as a JSON array."""
    names, values = _fields(model)
    return to_json([dict(zip(names, values(row), strict=True)) for row in rows])


@lru_cache(maxsize=8)  # larger than the number of the API's models
def _fields(model: type[ResponseModel]) -> tuple[tuple[str, ...], Callable[[object], tuple[Any, ...]]]:
    """Return the JSON names of a model's fields, and a function that reads these fields from a row."""
    names = tuple(field.serialization_alias or name for name, field in model.model_fields.items())
    return names, attrgetter(*model.model_fields)


def answer(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return the HTTP response for a JSON body."""
    return Response(body, status, headers, MEDIA_TYPE)
