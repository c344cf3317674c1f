"""Endpoints that list, get, create and change follow-ups."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

from anyio import CancelScope
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic_core import to_json

from followups import scheduling
from followups.api import problems, responses
from followups.api.authentication import AuthenticatedRoute, Caller, Work
from followups.api.fields import Id, IdempotencyKey  # noqa: TC001 - FastAPI reads the annotations
from followups.api.pagination import link_header
from followups.api.schemas import FollowUp, FollowUpChanges, FollowUpQuery, NewFollowUp
from followups.errors import (
    AlreadyFinishedError,
    ChatNotFoundError,
    FollowUpNotFoundError,
    InvalidRequestError,
    NothingToFollowUpError,
    QuotaExceededError,
)
from followups.states import FINAL
from followups.store import follow_ups, idempotency, listing
from followups.store.audit import Actor, Way

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
    from typing import Any
    from uuid import UUID

    from followups.api.pagination import PageStarts
    from followups.models import FollowUp as StoredFollowUp
    from followups.statements import Steps

PATH = "/api/v1/chat-message-follow-ups"

_BRACKETS = re.compile(
    rb"(^|&)(chatIds|chatMessageIds|statuses|triggerChatMessageIds)(?:\[\]|%5B%5D)(?:=|(?=&|$))", re.IGNORECASE
)
"""The pattern of filter names that contain brackets.

A filter name with brackets matches even without ``=``, because the filter would otherwise be ignored and all rows
listed.
"""


class ListRoute(AuthenticatedRoute):
    """A route whose multi-value parameters may have ``[]`` after their names."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that removes the brackets from parameter names."""
        handle = super().get_route_handler()

        async def without_brackets(request: Request) -> Response:
            request.scope["query_string"] = _BRACKETS.sub(rb"\1\2=", request.scope["query_string"])
            return await handle(request)

        return without_brackets


lists = APIRouter(prefix=PATH, tags=["Chat Message Follow Ups"], route_class=ListRoute)
router = APIRouter(prefix=PATH, tags=["Chat Message Follow Ups"], route_class=AuthenticatedRoute)


@lists.get("", operation_id="listFollowUps", response_model=list[FollowUp], responses=responses.LIST)
async def list_follow_ups(query: Annotated[FollowUpQuery, Query()], request: Request) -> Response:
    """List follow-ups, newest first."""
    wanted = listing.ListFilter(query.chat_ids, query.chat_message_ids, query.statuses, query.trigger_chat_message_ids)
    caller = Caller(request)
    starts = caller.starts
    rows, has_next, has_previous = await caller.read(lambda work: _list(starts, work.workspace_id, wanted, query))
    links = link_header(query, has_next=has_next, has_previous=has_previous)
    if all(row.message is not None for row in rows):
        return responses.answer(responses.many(FollowUp, rows), 200, links)
    return StreamingResponse(_in_pieces(caller, rows), 200, links, responses.MEDIA_TYPE)


async def _in_pieces(caller: Caller, rows: Sequence[Any]) -> AsyncIterator[bytes]:
    """Yield the JSON array of a page in pieces.

    Messages are read from the database only as fast as the client receives them.
    """
    before = b"["
    for piece in _pieces(rows):
        missing = [row.id for row in piece if row.message is None]
        if missing:
            with CancelScope(shield=True):  # the connection must be released even if the client has disconnected
                texts = await caller.read_more(partial(_messages, missing))
            piece = [row._replace(message=texts[row.id]) for row in piece if row.id in texts]  # noqa: PLW2901
        for row in piece:
            yield before + responses.one(FollowUp, row)
            before = b","
    yield b"]" if before == b"," else b"[]"


def _messages(ids: Sequence[UUID], work: Work) -> Steps[dict[UUID, str]]:
    return listing.messages.steps(work.workspace_id, ids)


def _pieces(rows: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield groups of rows whose messages together have at most `listing.PIECE` bytes."""
    piece: list[Any] = []
    size = 0
    for row in rows:
        if piece and (size + row.message_size > listing.PIECE or (row.message is None) != (piece[0].message is None)):
            yield piece
            piece, size = [], 0
        piece.append(row)
        size += row.message_size
    yield piece


def _list(
    starts: PageStarts, workspace_id: UUID, wanted: listing.ListFilter, query: FollowUpQuery
) -> Steps[tuple[Sequence[Any], bool, bool]]:
    """Return a page of follow-ups, and whether there is a next and a previous page."""
    size, this = query.page_size, (workspace_id, wanted)
    offset = (query.page_number - 1) * size
    near = starts.nearest(this, offset)
    rows = yield from listing.pieces_from.steps(workspace_id, wanted, offset, size + 1, near)
    if not rows and offset:
        before = yield from listing.rows_from.steps(workspace_id, wanted, offset - size, 1)
        return rows, False, bool(before)
    for place in {0, size} & set(range(len(rows))):
        starts.remember(this, listing.Start(offset + place, rows[place].created_at, rows[place].id))
    return rows[:size], len(rows) > size, offset > 0


@router.post("", operation_id="createFollowUp", status_code=201, response_model=FollowUp, responses=responses.CREATE)
async def create_follow_up(
    body: NewFollowUp,
    request: Request,
    idempotency_key: Annotated[IdempotencyKey | None, Header(alias="Idempotency-Key")] = None,
) -> Response:
    """Create a follow-up. It is sent into the chat at its due date unless something cancels it first.

    With an `Idempotency-Key`, a repeated request gets the first request's response and creates nothing.
    """
    if idempotency_key is None:
        caller = Caller(request)
        return _response(await caller.change(lambda work: _create(work, body), lambda work: _create_alone(work, body)))
    return _response(await Caller(request).change(lambda work: _create_once(work, body, idempotency_key)))


def _create_once(work: Work, body: NewFollowUp, idempotency_key: str) -> Steps[idempotency.StoredResponse]:
    request_hash = idempotency.hash_of(body.model_dump_json().encode())
    answer = yield from idempotency.recall.steps(work.workspace_id, idempotency_key, request_hash)
    if answer is None:
        try:
            answer = yield from _create(work, body)
        # the 429 is not stored, because the workspace may soon be below its quota
        except QuotaExceededError:
            raise
        except (ChatNotFoundError, NothingToFollowUpError, InvalidRequestError) as error:
            # Error responses are stored too. A repeated request then gets the same response even if the chat has
            # changed.
            answer = idempotency.StoredResponse(problems.of_error(error).status, None, problems.of_error(error).body())
        stored = _with_message(answer, "")
        yield from idempotency.remember.steps(work.workspace_id, idempotency_key, request_hash, stored)
    return _with_message(answer, body.message)


def _with_message(answer: idempotency.StoredResponse, message: str) -> idempotency.StoredResponse:
    """Return the stored response to a create request, with the message added again.

    Responses are stored without the message. After a follow-up is deleted, no copy of its text remains. When a request
    is repeated, the message is put back into the stored response.
    """
    if not answer.location:
        return answer
    return replace(answer, body=to_json(json.loads(answer.body) | {"message": message}))


def _create(work: Work, body: NewFollowUp) -> Steps[idempotency.StoredResponse]:
    created = yield from scheduling.scheduling(
        work.workspace_id, body.chat_id, body.message, body.due_date, work.key_id
    )
    return _created(work, created)


def _create_alone(work: Work, body: NewFollowUp) -> Steps[idempotency.StoredResponse | None]:
    created = yield from scheduling.scheduling_alone(
        work.workspace_id, body.chat_id, body.message, body.due_date, work.key_id
    )
    if created is None:
        return None
    work.now = created.created_at
    return _created(work, created)


def _created(work: Work, created: StoredFollowUp) -> idempotency.StoredResponse:
    work.report(created)
    return idempotency.StoredResponse(201, f"{PATH}/{created.id}", responses.one(FollowUp, created))


def _response(answer: idempotency.StoredResponse) -> Response:
    media_type = responses.MEDIA_TYPE if answer.location else problems.MEDIA_TYPE
    headers = {"location": answer.location} if answer.location else None
    return Response(answer.body, answer.status, headers, media_type)


@router.get("/{id}", operation_id="getFollowUp", response_model=FollowUp, responses=responses.GET)
async def get_follow_up(id: Id, request: Request) -> Response:  # noqa: A002 - the parameter's name in the document
    """Return one follow-up."""
    found = await Caller(request).read(lambda work: follow_ups.find.steps(id, work.workspace_id))
    if found is None:
        raise FollowUpNotFoundError
    return responses.answer(responses.one(FollowUp, found))


@router.patch("/{id}", operation_id="changeFollowUp", response_model=FollowUp, responses=responses.CHANGE)
async def change_follow_up(
    id: Id,  # noqa: A002 - the parameter's name in the document
    body: FollowUpChanges,
    request: Request,
) -> Response:
    """Change fields of a follow-up, reschedule it, or end it with a final status."""
    given = {name: getattr(body, name) for name in body.model_fields_set}
    changed = await Caller(request).change(lambda work: _change(work, id, given))
    return responses.answer(responses.one(FollowUp, changed))


def _change(work: Work, follow_up_id: UUID, given: Mapping[str, Any]) -> Steps[object]:
    changes = yield from _without_nulls(work.workspace_id, follow_up_id, given)
    changed = yield from scheduling.amending(follow_up_id, changes, work.workspace_id, Actor(Way.API, work.key_id))
    work.report(changed, changes.get("finished_at"))
    return changed


def _without_nulls(workspace_id: UUID, follow_up_id: UUID, given: Mapping[str, Any]) -> Steps[dict[str, Any]]:
    """Return the changes without nulls for fields that are null already.

    Only chatMessageId can be set to null.
    """
    nulls = {name for name, value in given.items() if value is None}
    if given.get("status") in FINAL:
        # next to a final status, a null means that the client gives no value
        nulls -= {"reason", "finished_at"}
    kept = {name: value for name, value in given.items() if value is not None}
    if not nulls:
        return kept
    found = yield from follow_ups.find.steps(follow_up_id, workspace_id)
    if found is None:
        raise FollowUpNotFoundError
    taken_away = sorted(name for name in nulls if getattr(found, name) is not None)
    if taken_away and found.status in FINAL:
        raise AlreadyFinishedError
    for name in taken_away:
        if name != "chat_message_id":
            message = f"The {name.replace('_', ' ')} has a value, which cannot be removed."
            raise InvalidRequestError(message, field=name)
    return kept | dict.fromkeys(taken_away)
