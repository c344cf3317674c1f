"""The responses of every endpoint: their documentation, and how database rows become JSON.

The documentation contains a description, schema, headers and example for each response. The response models are only
documentation: they name the fields of the responses. The models validate nothing, because the tables' types and
constraints already ensure valid values.
"""

from __future__ import annotations

import json
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from fastapi.responses import Response
from pydantic_core import to_json

from followups.api import examples, problems
from followups.api.schemas import Chat, ChatMessage
from followups.errors import (
    AlreadyFinishedError,
    ChatNotFoundError,
    ConsoleOffError,
    DeliveryInProgressError,
    ExternalChatTakenError,
    FollowUpNotFoundError,
    FollowUpsError,
    IdempotencyKeyInUseError,
    IdempotencyKeyReusedError,
    NothingToFollowUpError,
    OutsideMessagingWindowError,
    QuotaExceededError,
    TooManyPendingError,
    TooManyRequestsError,
    UnauthorizedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from followups.api.schemas import ResponseModel


Responses = dict[int | str, dict[str, Any]]

_SECONDS = {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds to wait before another request."}
_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "retry-after": ("Retry-After", _SECONDS),
    "www-authenticate": ("WWW-Authenticate", {"schema": {"type": "string"}, "description": "How to authenticate."}),
}


def _problem(description: str, **told: problems.ProblemAnswer) -> dict[str, Any]:
    headers = dict(_HEADERS[name] for each in told.values() for name in each.headers if name in _HEADERS)
    content = {
        "schema": {"$ref": "#/components/schemas/Problem"},
        "examples": {name: {"value": json.loads(each.body())} for name, each in told.items()},
    }
    always = len({frozenset(each.headers) for each in told.values()}) == 1
    documented = {"headers": {name: {**header, "required": always} for name, header in headers.items()}}
    return {"description": description, **(documented if headers else {}), "content": {problems.MEDIA_TYPE: content}}


def _error(*errors: FollowUpsError) -> dict[str, Any]:
    told = {error.slug: problems.of_error(error) for error in errors}
    return _problem(" Or: ".join(str(error) for error in errors), **told)


def _json(description: str, example: object, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - parts of the document
    return {"description": description, "content": {"application/json": {"example": example}}, **more}


def _invalid(pointer: str, detail: str, *errors: FollowUpsError) -> dict[str, Any]:
    broken = problems.of_validation([{"type": "", "loc": ("body", pointer), "msg": detail}])
    others = {error.slug: problems.of_error(error) for error in errors}
    return _problem("The request is not valid.", **{"invalid-request": broken, **others})


_ANYWHERE: Responses = {
    401: _error(UnauthorizedError()),
    429: _error(TooManyRequestsError()),
    500: _problem("An internal error occurred.", internal=problems.INTERNAL),
    503: _problem("The database cannot be reached.", unavailable=problems.UNAVAILABLE),
}
_WITH_BODY: Responses = {
    408: _problem("The body did not arrive in time.", slow=problems.of_status(408)),
    413: _problem("The body is too large.", large=problems.of_status(413)),
    415: _problem("The body is compressed.", compressed=problems.of_status(415)),
}
_BAD_ID = _invalid("id", "should be a UUID, as in 123e4567-e89b-42d3-a456-426614174000")
_BAD_DATE = ("dueDate", "should carry an offset, as in 2030-01-31T09:00:00Z")

_LINK = {
    "schema": {"type": "string"},
    "required": False,
    "description": 'Links (RFC 8288) to the pages `rel="next"` and `rel="prev"`, if they exist.',
}
_LOCATION = {
    "schema": {"type": "string", "format": "uri-reference"},
    "required": True,
    "description": "The path of the new follow-up.",
}
_ID = {"id": "$response.body#/id"}
_LINKS = {
    "get": {"operationId": "getFollowUp", "parameters": _ID},
    "change": {"operationId": "changeFollowUp", "parameters": _ID},
}

LIST: Responses = {
    200: _json("A page of follow-ups.", [examples.FOLLOW_UP], headers={"Link": _LINK}),
    422: _invalid("pageNumber", "Input should be greater than or equal to 1"),
    **_ANYWHERE,
}
GET: Responses = {
    200: _json("The follow-up.", examples.FOLLOW_UP),
    404: _error(FollowUpNotFoundError()),
    422: _BAD_ID,
    **_ANYWHERE,
}
CREATE: Responses = {
    201: _json("The new follow-up.", examples.FOLLOW_UP, headers={"Location": _LOCATION}, links=_LINKS),
    404: _error(ChatNotFoundError()),
    409: _error(NothingToFollowUpError(), TooManyPendingError(), IdempotencyKeyInUseError()),
    422: _invalid(
        *_BAD_DATE,
        OutsideMessagingWindowError(field="due_date"),
        IdempotencyKeyReusedError(field="Idempotency-Key"),
        QuotaExceededError(),
    ),
    **_WITH_BODY,
    **_ANYWHERE,
}
CHANGE: Responses = {
    200: _json("The follow-up after the change.", examples.CANCELLED_FOLLOW_UP),
    404: _error(FollowUpNotFoundError()),
    409: _error(AlreadyFinishedError(), DeliveryInProgressError(), NothingToFollowUpError(), TooManyPendingError()),
    422: _invalid(*_BAD_DATE, OutsideMessagingWindowError(field="due_date")),
    **_WITH_BODY,
    **_ANYWHERE,
}
PUT_CHAT: Responses = {
    200: _json("The chat was updated.", examples.CHAT),
    201: _json("The chat was created.", examples.CHAT, model=Chat),
    409: _error(ExternalChatTakenError()),
    422: _invalid(
        "channel", "Input should be 'widget', 'waha', 'whatsapp', 'instagram', 'api' or 'matrix'", QuotaExceededError()
    ),
    **_WITH_BODY,
    **_ANYWHERE,
}
REMOVE_CHAT: Responses = {
    204: {"description": "The chat was removed."},
    404: _error(ChatNotFoundError()),
    422: _BAD_ID,
    **_ANYWHERE,
}
RECEIVE: Responses = {
    200: _json(
        "The message was already recorded; nothing changed.",
        examples.CHAT_MESSAGE | {"cancelledFollowUpIds": []},
        model=ChatMessage,
    ),
    201: _json("The message was recorded.", examples.CHAT_MESSAGE),
    404: _error(ChatNotFoundError()),
    422: _invalid("role", "Input should be 'user', 'agent' or 'operator'", QuotaExceededError()),
    **_WITH_BODY,
    **_ANYWHERE,
}
LINK: Responses = {
    201: _json("The link; it is shown only once.", examples.CONSOLE_LINK),
    404: _error(ChatNotFoundError(), ConsoleOffError()),
    422: _invalid("role", "Input should be 'viewer' or 'agent'"),
    **_WITH_BODY,
    **_ANYWHERE,
}
HEALTH: Responses = {200: _json("The process is up.", examples.HEALTH)}
READINESS: Responses = {
    200: _json("All checks pass.", examples.READINESS),
    503: _problem(
        "At least one check fails.",
        unready=problems.ProblemAnswer(
            503,
            "not-ready",
            "Not ready: tick (no tick for 42 s: start beat and a worker).",
            {"retry-after": "5"},
            {
                "checks": examples.READINESS["checks"]
                | {"tick": {"ok": False, "detail": "no tick for 42 s: start beat and a worker"}}
            },
        ),
    ),
}
METRICS: Responses = {
    200: {
        "description": "The metrics in Prometheus text format.",
        "content": {"text/plain": {"schema": {"type": "string"}, "example": examples.METRICS}},
    }
}


MEDIA_TYPE = "application/json"


def one(model: type[ResponseModel], row: object) -> bytes:
    """Return a row as JSON. The row must have the fields of the model as attributes."""
    names, values = _fields(model)
    return to_json(dict(zip(names, values(row), strict=True)))


def many(model: type[ResponseModel], rows: Iterable[object]) -> bytes:
    """Return rows as a JSON array."""
    names, values = _fields(model)
    return to_json([dict(zip(names, values(row), strict=True)) for row in rows])


@lru_cache(maxsize=8)  # more entries than the API has models
def _fields(model: type[ResponseModel]) -> tuple[tuple[str, ...], Callable[[object], tuple[Any, ...]]]:
    """Return a model's JSON field names, and a function that reads the fields from a row."""
    names = tuple(field.serialization_alias or name for name, field in model.model_fields.items())
    return names, attrgetter(*model.model_fields)


def answer(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return the HTTP response for a JSON body."""
    return Response(body, status, headers, MEDIA_TYPE)
