"""Unusual requests at the limits of the API's rules, sent to a running web process."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from web import CHAT_MESSAGES, FOLLOW_UPS, in_days, is_problem

if TYPE_CHECKING:
    from web import Api

SURROGATE = b"\\ud800"


def test_lone_surrogates(api: Api) -> None:
    """A lone surrogate in a text is rejected with 422, even with an Idempotency-Key."""
    headers = {"content-type": "application/json"}
    body = b'{"channel": "api", "externalId": "a' + SURROGATE + b'"}'
    assert api.client.put(f"/api/v1/chats/{uuid4()}", content=body, headers=headers).status_code == 422
    body = b'{"message": "' + SURROGATE + f'", "chatId": "{api.chat()}", "dueDate": "{in_days(1)}"}}'.encode()
    for key in ({}, {"idempotency-key": str(uuid4())}):
        assert api.client.post(FOLLOW_UPS, content=body, headers=headers | key).status_code == 422


@pytest.mark.parametrize(
    "changes",
    [{}, {"status": "pending"}, {"chatId": str(uuid4())}, {"dueDate": in_days(2)}, {"chatMessageId": None}],
    ids=["nothing", "same", "unknown chat", "due date", "null"],
)
def test_in_flight(api: Api, changes: dict[str, str]) -> None:
    """Any change to a follow-up in flight is rejected with 409 and Retry-After."""
    before = api.create()
    api.world.put_in_flight(before["id"])
    answer = api.patch(before, **changes)
    is_problem(answer, 409, "delivery-in-progress")
    assert int(answer.headers["retry-after"]) >= 1


def test_in_flight_in_a_removed_chat(api: Api) -> None:
    """If a chat was removed, a request to change its follow-up in flight gets 409, not 404."""
    before = api.create()
    api.world.put_in_flight(before["id"])
    assert api.client.delete(f"/api/v1/chats/{before['chatId']}").status_code == 204
    is_problem(api.patch(before, dueDate=in_days(2)), 409, "delivery-in-progress")


def test_null_on_a_finished_follow_up(api: Api) -> None:
    """If a request clears a field of a finished follow-up, the request is rejected as a change."""
    before = api.create()
    api.patch(before, status="sent", chatMessageId=str(uuid4()))
    for name in ("chatMessageId", "finishedAt"):
        is_problem(api.patch(before, **{name: None}), 409, "already-finished")


def test_chat_message_id_can_be_cleared(api: Api) -> None:
    """While a follow-up is pending, its chat message id can be set and cleared."""
    before = api.create()
    api.patch(before, chatMessageId=str(uuid4()))
    assert api.patch(before, chatMessageId=None).json()["chatMessageId"] is None


def test_links_lead_to_pages(api: Api) -> None:
    """An empty page links to the previous page only if that page exists."""
    for _ in range(2):
        api.create()
    assert 'rel="prev"' in api.get(FOLLOW_UPS, pageNumber=3, pageSize=1).headers["link"]
    assert "link" not in api.get(FOLLOW_UPS, pageNumber=99, pageSize=1).headers


@pytest.mark.parametrize(
    "query", ["pageNumber=1_0", "pageNumber=1.0", "pageNumber=%2B1", "pageSize=1e1", "chatIds[]", "chatIds%5B%5D&x=1"]
)
def test_invalid_queries(api: Api, query: str) -> None:
    """A query with an invalid number or an empty filter is rejected with 422.

    A list request with an invalid filter never returns all follow-ups.
    """
    is_problem(api.client.get(f"{FOLLOW_UPS}?{query}"), 422, "invalid-request")


def test_a_known_message_of_a_removed_chat(api: Api) -> None:
    """A repeated chat message gets the first response again, even if the chat has been removed since."""
    message_id = str(uuid4())
    body = {"id": message_id, "chatId": str(uuid4()), "role": "agent"}
    assert [api.post(CHAT_MESSAGES, body).status_code for _ in range(2)] == [201, 200]
