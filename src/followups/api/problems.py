"""All errors as `application/problem+json` (RFC 9457), without SQL or stack traces."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from itertools import islice
from typing import TYPE_CHECKING, Any

from fastapi.responses import Response
from pydantic import BaseModel, Field
from pydantic.alias_generators import to_camel

from followups.database_errors import is_passing, is_read_only
from followups.errors import (
    ConflictError,
    DeliveryInProgressError,
    FollowUpsError,
    IdempotencyKeyInUseError,
    InvalidRequestError,
    NotFoundError,
    TooManyRequestsError,
    UnauthorizedError,
)
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

log = get_logger(__name__)

MEDIA_TYPE = "application/problem+json"

MAX_ERRORS = 20
"""Maximum number of errors reported for one request."""

MAX_POINTER_LENGTH = 200
"""Maximum length of an error pointer in characters. Clients may send field names of any length."""

RETRY_AFTER_OUTAGE = 5
"""Seconds after which a client should retry if the database is unreachable."""

STATUSES: dict[type[FollowUpsError], HTTPStatus] = {
    UnauthorizedError: HTTPStatus.UNAUTHORIZED,
    NotFoundError: HTTPStatus.NOT_FOUND,
    ConflictError: HTTPStatus.CONFLICT,
    InvalidRequestError: HTTPStatus.UNPROCESSABLE_ENTITY,
    TooManyRequestsError: HTTPStatus.TOO_MANY_REQUESTS,
}
"""The HTTP status for each error class and its subclasses."""


class FieldProblem(BaseModel):
    """One invalid field in an error response."""

    pointer: str = Field(description="JSON Pointer into the body as a URI fragment, or the parameter's name after #/")
    detail: str


class Problem(BaseModel):
    """The JSON body of an RFC 9457 error response."""

    type: str = Field(
        description="The last path segment identifies the kind of problem",
        json_schema_extra={"format": "uri-reference"},
    )
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] | None = Field(None, description="The invalid fields, with status 422")


@dataclass(frozen=True, slots=True)
class ProblemAnswer:
    """An RFC 9457 error response, including its headers."""

    status: int
    slug: str
    detail: str
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> bytes:
        """Return the JSON body of the error response."""
        document = {
            "type": f"/problems/{self.slug}",
            "title": self.slug.replace("-", " ").capitalize(),
            "status": self.status,
            "detail": self.detail,
            **self.extra,
        }
        # The JSON is ASCII-only, because a client's text may contain lone surrogates, which UTF-8 cannot encode.
        return json.dumps(document).encode()

    def response(self) -> Response:
        """Return the HTTP response."""
        return Response(self.body(), self.status, self.headers, MEDIA_TYPE)


def of_error(error: FollowUpsError) -> ProblemAnswer:
    """Return the error response for a `FollowUpsError`."""
    status = next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), None)
    if status is None:
        log.error("request_failed", exc_info=error)
        return INTERNAL
    headers: dict[str, str] = {}
    extra: dict[str, Any] = {}
    if isinstance(error, DeliveryInProgressError | TooManyRequestsError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, IdempotencyKeyInUseError):
        headers["retry-after"] = "1"
    if isinstance(error, UnauthorizedError):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, InvalidRequestError):
        extra["errors"] = [{"pointer": _pointer([_outside(error.field)]), "detail": str(error)}]
    return ProblemAnswer(status, error.slug, str(error), headers, extra)


def of_validation(errors: Iterable[Mapping[str, Any]]) -> ProblemAnswer:
    """Return the error response for an invalid request, given pydantic's list of errors."""
    first = islice(errors, MAX_ERRORS)
    told = [{"pointer": _pointer(_path(each)), "detail": each["msg"].removeprefix("Value error, ")} for each in first]
    detail = "The request is not valid: see errors."
    return ProblemAnswer(HTTPStatus.UNPROCESSABLE_ENTITY, InvalidRequestError.slug, detail, extra={"errors": told})


def of_status(status: int, detail: str = "", headers: Mapping[str, str] | None = None) -> ProblemAnswer:
    """Return the error response for an HTTP status."""
    phrase = HTTPStatus(status).phrase
    return ProblemAnswer(status, phrase.lower().replace(" ", "-"), detail or f"{phrase}.", headers or {})


def of_exception(error: Exception) -> ProblemAnswer:
    """Log an unexpected error or a database outage, and return the response for it."""
    if is_passing(error):
        log.warning("database_unreachable", step="request", error=type(error).__name__)
        return READ_ONLY if is_read_only(error) else UNAVAILABLE
    # The error's message is not logged, because it may quote a follow-up's text. The location of the error is enough to
    # find the cause.
    log.error("request_failed", error=type(error).__name__, at=_places(error))
    return INTERNAL


def _places(error: BaseException) -> list[str]:
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return places[-8:]


def _path(error: Mapping[str, Any]) -> list[str]:
    # The location's first element names the part of the request (body, query, path, header). For malformed JSON, the
    # second element is a byte position instead of a field name.
    return [] if error["type"] == "json_invalid" else [str(part) for part in error["loc"][1:]]


def _outside(name: str) -> str:
    return to_camel(name) if "_" in name else name


def _pointer(path: list[str]) -> str:
    pointer = "#" + "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in path if part)
    return pointer[:MAX_POINTER_LENGTH]


INTERNAL = ProblemAnswer(
    HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "An internal error occurred and has been logged."
)
UNAVAILABLE = ProblemAnswer(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "unavailable",
    "The database cannot be reached at this moment; try again shortly.",
    {"retry-after": str(RETRY_AFTER_OUTAGE)},
)
READ_ONLY = replace(UNAVAILABLE, detail="The database accepts no changes at this moment; try again shortly.")
