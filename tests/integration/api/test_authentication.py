"""Tests of API keys and of the isolation between workspaces."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import pytest
from sqlalchemy.orm import Session

from followups.store import api_keys
from web import CHAT_MESSAGES, CHATS, FOLLOW_UPS, in_days, is_problem, key_of

if TYPE_CHECKING:
    from typing import Any

    from web import Api


def requests_of(document: dict[str, Any], mine: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """For each endpoint that requires an API key, return a valid request (method, path, options).

    ``mine`` contains the ids that the requests use.
    """
    bodies: dict[str, dict[str, Any]] = {
        "createFollowUp": {"chatId": mine["chatId"], "dueDate": in_days(1), "message": "?"},
        "changeFollowUp": {"message": "changed"},
        "createConsoleLink": {"role": "agent", "chatId": mine["chatId"]},
        "putChat": {"channel": "widget", "externalId": "stolen"},
        "receiveChatMessage": {"id": str(uuid4()), "chatId": mine["chatId"], "role": "user"},
    }
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if operation["security"]:
                body = bodies.get(operation["operationId"])
                place = path.replace("{id}", mine["id"]).replace("{chatId}", mine["chatId"])
                found.append((method, place, {"json": body} if body else {}))
    assert len(found) == 8
    return found


@pytest.fixture
def document(web_url: str) -> dict[str, Any]:
    """Return the running process's OpenAPI document."""
    found: dict[str, Any] = httpx.get(f"{web_url}/openapi.json", verify=False).json()  # noqa: S501 - the server has no TLS
    return found


def test_every_endpoint_requires_a_key(api: Api, document: dict[str, Any]) -> None:
    """Without a valid API key, every endpoint answers 401 and changes nothing.

    The API key may be missing, malformed, unknown, expired or revoked.
    """
    mine = api.create()
    revoked_id, revoked = key_of(api.world)
    with Session(api.world.engine) as session, session.begin():
        api_keys.revoke(session, revoked_id)
    expired_id, expired = key_of(api.world)
    api.world.sql("UPDATE api_keys SET expires_at = now() WHERE id = :id", id=expired_id)
    unknown = f"fup_{'A' * 43}"
    keys = ["", "x", "Bearer", unknown, f"Bearer {unknown}", revoked, expired, f"Basic {api.key}", f"{api.key}x"]
    for method, path, options in requests_of(document, mine):
        for key in keys:
            answer = api.client.request(method, path, headers={"authorization": key}, **options)
            is_problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
    assert api.read(mine) == mine


def test_an_error_without_a_key_reveals_nothing(api: Api) -> None:
    """An invalid request without a key gets 401 without details, not 422."""
    for path in (FOLLOW_UPS, CHAT_MESSAGES):
        for content in (b"{", b"\xff", b"{}"):
            answer = api.client.post(path, content=content, headers={"authorization": "x"})
            is_problem(answer, 401, "unauthorized")
    is_problem(api.client.get(f"{FOLLOW_UPS}/abc", headers={"authorization": ""}), 401, "unauthorized")


@pytest.mark.parametrize("form", ["{}", "Bearer {}", "bearer {}", "BEARER  {}"])
def test_forms(api: Api, form: str) -> None:
    """An API key is accepted either by itself or as a bearer token."""
    assert api.client.get(FOLLOW_UPS, headers={"authorization": form.format(api.key)}).status_code == 200


def test_revoked_at_once(api: Api) -> None:
    """After an API key is revoked, its next request is rejected, even if earlier requests succeeded."""
    assert api.get(FOLLOW_UPS).status_code == 200
    with Session(api.world.engine) as session, session.begin():
        api_keys.revoke(session, api.key_id)
    is_problem(api.get(FOLLOW_UPS), 401, "unauthorized")


def test_expired_at_once(api: Api) -> None:
    """Once an API key has expired, every request with the key is rejected."""
    assert api.get(FOLLOW_UPS).status_code == 200
    api.world.sql("UPDATE api_keys SET expires_at = now() WHERE id = :id", id=api.key_id)
    is_problem(api.get(FOLLOW_UPS), 401, "unauthorized")


def test_last_use(api: Api) -> None:
    """The last use of an API key is recorded at most once a minute."""

    def last_used() -> object:
        return api.world.scalar(f"SELECT last_used_at FROM api_keys WHERE id = '{api.key_id}'")  # noqa: S608 - the test's own id

    assert last_used() is None
    api.get(FOLLOW_UPS)
    recorded = last_used()
    assert recorded is not None
    api.get(FOLLOW_UPS)
    assert last_used() == recorded


def test_another_workspace(api: Api, other: Api, document: dict[str, Any]) -> None:
    """With another workspace's API key, every endpoint treats the ids as unknown and changes nothing."""
    mine = api.create()
    unknown = {"id": str(uuid4()), "chatId": str(uuid4())}
    about_mine, about_nothing = requests_of(document, mine), requests_of(document, unknown)
    for (method, path, options), (_, nowhere, same) in zip(about_mine, about_nothing, strict=True):
        answer = other.client.request(method, path, **options)
        expected = other.client.request(method, nowhere, **same)
        assert answer.status_code == expected.status_code, (method, path)
        if answer.is_error:
            assert answer.json() == expected.json()
        assert mine["message"] not in answer.text
        assert mine["id"] not in answer.text
        for each in (mine, unknown):  # a request of the other workspace may have created a chat with this id
            other.client.delete(f"{CHATS}/{each['chatId']}")
    assert api.read(mine) == mine


def test_filters_of_another_workspace(api: Api, other: Api) -> None:
    """With any filter, a list contains only follow-ups of the caller's workspace."""
    mine = api.patch(api.create(), status="sent", chatMessageId=str(uuid4())).json()
    for name, field in (
        ("chatIds", "chatId"),
        ("chatMessageIds", "chatMessageId"),
        ("triggerChatMessageIds", "triggerChatMessageId"),
        ("statuses", "status"),
    ):
        assert api.ids(**{name: mine[field]}) == [mine["id"]]
        assert other.ids(**{name: mine[field]}) == []


def test_same_ids_in_two_workspaces(api: Api, other: Api) -> None:
    """Two workspaces may use the same chat and message ids without affecting each other.

    A reply in one workspace cancels no follow-up of another workspace.
    """
    chat_id, message_id = str(uuid4()), str(uuid4())
    for each in (api, other):
        answer = each.post(CHAT_MESSAGES, {"id": message_id, "chatId": chat_id, "role": "agent"})
        assert answer.status_code == 201
    mine, theirs = api.create(chat_id), other.create(chat_id)
    assert other.message(chat_id, "user").json()["cancelledFollowUpIds"] == [theirs["id"]]
    assert api.read(mine) == mine


def test_chat_of_another_workspace(api: Api, other: Api) -> None:
    """A follow-up cannot move into another workspace's chat."""
    is_problem(other.patch(other.create(), chatId=api.chat()), 404, "not-found")
