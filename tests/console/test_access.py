"""Tests of access rights: every route with every role, and with ids of another workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote
from uuid import uuid4

import pytest

from followups.console.access import ALLOWED, Permission
from followups.console.pages import ROUTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from console.person import Person
    from followups.console.pages import Route
    from world import World

GUARDED = [route for route in ROUTES if route.action is not Permission.PUBLIC]


def called(person: Person, route: Route, ids: dict[str, str]) -> int:
    """Call a route with the given ids in its path, and return the response's status."""
    path = route.path
    for name, value in ids.items():
        path = path.replace(f"{{{name}}}", value)
    return (person.get(path) if route.method == "GET" else person.post(path)).status_code


@pytest.mark.parametrize("role", list(ALLOWED))
def test_each_route_answers_403_without_its_permission(role: str, person: Callable[..., Person], own: World) -> None:
    """Every route responds with 403 to exactly the roles that lack its permission."""
    one = person(role, None if role == "operator" else own)
    for route in GUARDED:
        status = called(one, route, {"id": str(uuid4()), "state": "x"})
        assert (status == 403) == (route.action not in ALLOWED[role]), (role, route, status)
        assert status < 500, (role, route)


def test_without_a_session_nothing_is_shown_or_changed(person: Callable[..., Person]) -> None:
    """Without a session, pages redirect to the sign-in page, and changes return 401."""
    one = person()
    for route in GUARDED:
        assert called(one, route, {"id": str(uuid4())}) == (303 if route.method == "GET" else 401), route


def test_unknown_pages_redirect_to_the_sign_in_without_a_session(person: Callable[..., Person]) -> None:
    """A client without a session cannot find out which pages exist."""
    assert person().get("/nothing").status_code == 303
    assert person("operator").get("/nothing").status_code == 404
    assert person("operator").post("/", x="y").status_code == 405


FIELDS = (
    *(
        "do",
        "due",
        "due_zone",
        "fold",
        "message",
        "reason",
        "chat",
        "workspace",
        "token",
        "version",
        "tick",
        "expected",
    ),
    *("action_id", "state", "channel", "id", "due_from", "due_to", "name", "expires", "time_zone", "from", "to", "day"),
    *("per", "per_unit", "rate", "burst", "after", "target", "action", "next", "zone", "language", "secret"),
)
HOSTILE = (
    "\x00",
    "\ud800",
    "\u202e{0.__class__}%s",
    "9" * 400,
    "0001-01-01T00:00",
    "9999-12-31T23:59:59",
    "-1e309",
    "../..",
)


DOING = {"/bulk/preview": "cancel-all", "/bulk": "cancel-all", "/settings/hours": "save"}
"""The button to press in some forms; without it, the form's fields are not read."""


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_fields_are_refused_without_an_error(value: str, person: Callable[..., Person], own: World) -> None:
    """Given strange values, a route never responds with 500 to an admin or operator."""
    encoded = quote(value, errors="surrogatepass")
    body = "&".join(f"{name}={encoded}" for name in FIELDS)
    one_id = str(own.follow_up())
    for viewer in (person("admin", own), person("operator")):
        for route in ROUTES:
            if route.path == "/logout":
                continue
            path = "/console" + route.path.replace("{id}", one_id).replace("{name}", "x")
            if route.method == "GET":
                answer = viewer.client.get(f"{path}?{body}")
            else:
                headers = {"content-type": "application/x-www-form-urlencoded"}
                content = f"{body}&do={DOING.get(route.path, '')}"
                answer = viewer.client.post(path, content=content, headers=headers)
            assert answer.status_code < 500, (route, value, answer.text)
