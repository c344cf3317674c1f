"""Lists of follow-ups from a running web process: filters, order, pages and links."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

from web import FOLLOW_UPS, is_problem, pointers

if TYPE_CHECKING:
    from typing import Any

    from web import Api


def created_at_once(api: Api, count: int, **columns: Any) -> list[str]:
    """Insert follow-ups with the same `created_at`, and return their ids in list order."""
    chat_id = UUID(api.chat())
    ids = [api.world.follow_up(chat_id, **columns) for _ in range(count)]
    api.world.sql("UPDATE follow_ups SET created_at = now() WHERE id = ANY(:ids)", ids=ids)
    return [str(each) for each in sorted(ids)]


def test_newest_first_ties_by_id(api: Api) -> None:
    """A list shows the newest follow-ups first; those created simultaneously are ordered by id."""
    older = created_at_once(api, 3)
    newer = created_at_once(api, 3)
    assert api.ids() == newer + older


def test_empty(api: Api) -> None:
    """For a workspace without follow-ups, the list is an empty array without links."""
    answer = api.get(FOLLOW_UPS)
    assert (answer.status_code, answer.json(), "link" in answer.headers) == (200, [], False)


@pytest.mark.parametrize("brackets", ["", "[]", "%5B%5D", "%5b%5D"])
def test_filters(api: Api, brackets: str) -> None:
    """If a filter has several values, a row needs to match only one of them.

    Every listed follow-up matches all filters.
    """
    created = [api.patch(api.create(), chatMessageId=str(uuid4())).json() for _ in range(3)]
    first, second = created[:2]
    api.patch(second, status="cancelled")
    third = api.patch(created[2], status="failed").json()
    for name, field in (
        ("chatIds", "chatId"),
        ("chatMessageIds", "chatMessageId"),
        ("triggerChatMessageIds", "triggerChatMessageId"),
        ("statuses", "status"),
    ):
        one, many = f"{name}{brackets}={first[field]}", f"{name}{brackets}={third[field]}"
        assert [each["id"] for each in api.get(f"{FOLLOW_UPS}?{one}").json()] == [first["id"]]
        both = api.get(f"{FOLLOW_UPS}?{one}&{many}&{one}").json()
        assert [each["id"] for each in both] == [third["id"], first["id"]]
        assert api.get(f"{FOLLOW_UPS}?{one}&{many}&statuses=sent").json() == (both if name == "statuses" else [])
        assert api.ids(chatIds=first["chatId"], triggerChatMessageIds=second["triggerChatMessageId"]) == []


@pytest.mark.parametrize("filtered", [False, True])
def test_pages(api: Api, filtered: bool) -> None:  # noqa: FBT001 - a test parameter
    """The pagination links lead through all pages in both directions, and keep the filters."""
    ids = created_at_once(api, 7)
    chat_id = api.world.row(UUID(ids[0])).chat_id
    parameters: dict[str, Any] = {"chatIds[]": str(chat_id), "statuses": ["pending", "sent"]} if filtered else {}
    answer = api.get(FOLLOW_UPS, pageSize=3, **parameters)
    assert answer.links.keys() == {"next"}
    pages = [answer]
    while "next" in answer.links:
        answer = api.client.get(answer.url.join(answer.links["next"]["url"]))
        pages.append(answer)
    assert [each["id"] for page in pages for each in page.json()] == ids
    assert [len(page.json()) for page in pages] == [3, 3, 1]
    assert pages[-1].links.keys() == {"prev"}
    assert api.client.get(answer.url.join(answer.links["prev"]["url"])).json() == pages[1].json()


def test_page_size_by_default(api: Api) -> None:
    """A page has ten follow-ups by default; a full last page has no next link."""
    ids = created_at_once(api, 20)
    assert api.ids() == ids[:10]
    assert api.get(FOLLOW_UPS, pageNumber=2).links.keys() == {"prev"}


@pytest.mark.parametrize("page", [3, 10**9, 10**30])
def test_after_the_last_page(api: Api, page: int) -> None:
    """A page beyond the last page of a list is empty."""
    api.create()
    assert api.ids(pageNumber=page) == []


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("pageNumber=0", "#/pageNumber"),
        ("pageNumber=x", "#/pageNumber"),
        ("pageSize=0", "#/pageSize"),
        ("pageSize=101", "#/pageSize"),
        ("chatIds=", "#/chatIds/0"),
        ("chatIds[]=42", "#/chatIds/0"),
        ("chatMessageIds=%00", "#/chatMessageIds/0"),
        ("triggerChatMessageIds=null", "#/triggerChatMessageIds/0"),
        ("statuses=done", "#/statuses/0"),
        ("statuses=pending&statuses=Sent", "#/statuses/1"),
    ],
)
def test_bad_value(api: Api, query: str, pointer: str) -> None:
    """An invalid query value is rejected with 422, and the error points at it."""
    assert pointers(is_problem(api.get(f"{FOLLOW_UPS}?{query}"), 422, "invalid-request")) == [pointer]
