"""Tests of pages with long messages, which are sent in pieces, and of stored message texts."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from followups.store import listing
from web import FOLLOW_UPS, in_days

if TYPE_CHECKING:
    from web import Api

LONG = "\N{GRINNING FACE}" * 65_536
"""The length in bytes of the longest allowed message."""


def test_a_page_of_long_messages_is_complete(api: Api) -> None:
    """If a list page is sent in pieces, its follow-ups are the same as in single responses, in order.

    A list page that is sent in pieces still links to the next page.
    """
    chat = api.chat()
    texts = ["short", LONG, "x" * 60_000, "", "y", "z" * 65_536, "\u0001" * 1000, LONG[:-1], "last"]
    created = [api.create(chat, text=text or "?") for text in texts]
    answer = api.get(FOLLOW_UPS, chatIds=chat, pageSize=8)
    assert answer.headers["transfer-encoding"] == "chunked"
    assert answer.json() == [api.read(one) for one in reversed(created)][:8]
    assert answer.links["next"]["url"] == f"?chatIds={chat}&pageNumber=2&pageSize=8"
    (last,) = api.get(FOLLOW_UPS, chatIds=chat, pageSize=8, pageNumber=2).json()
    assert last == created[0]
    assert api.client.head(FOLLOW_UPS, params={"pageSize": 8}).status_code == 200
    assert sum(len(text.encode()) for text in texts) > 2 * listing.PIECE


def test_no_message_is_stored_for_a_repeated_request(api: Api) -> None:
    """The response that is stored for an idempotency key does not contain the message.

    A repeated request still gets the complete first response.
    """
    body = {"chatId": api.chat(), "dueDate": in_days(1), "message": 'sëcret "words"\n\u2028'}
    key = {"idempotency-key": str(uuid4())}
    first = api.post(FOLLOW_UPS, body, **key)
    assert first.status_code == 201
    assert first.json()["message"] == body["message"]
    kept = api.world.scalar(
        f"SELECT string_agg(convert_from(body, 'UTF8'), '') FROM idempotency_keys"  # noqa: S608 - the test's own id
        f" WHERE workspace_id = '{api.world.workspace_id}'"
    )
    assert first.json()["id"] in kept
    assert "words" not in kept
    assert api.patch(first.json(), message="another").status_code == 200
    again = api.post(FOLLOW_UPS, body, **key)
    assert (again.status_code, again.content, again.headers["location"]) == (
        201,
        first.content,
        first.headers["location"],
    )
