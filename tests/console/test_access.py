"""Authorization: every route in every role, and with the ids of another workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING
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
    """Call a route with these ids in its path, and return the response's status."""
    path = route.path
    for name, value in ids.items():
        path = path.replace(f"{{{name}}}", value)
    return (person.get(path) if route.method == "GET" else person.post(path)).status_code


@pytest.mark.parametrize("role", list(ALLOWED))
def test_each_role_gets_what_it_may_and_403_for_the_rest(role: str, person: Callable[..., Person], own: World) -> None:
    """Every route responds with 403 to roles that lack its permission, and to no other role."""
    one = person(role, None if role == "operator" else own)
    for route in GUARDED:
        status = called(one, route, {"id": str(uuid4()), "state": "x"})
        assert (status == 403) == (route.action not in ALLOWED[role]), (role, route, status)
        assert status < 500, (role, route)


def test_without_a_session_nothing_is_shown_or_changed(person: Callable[..., Person]) -> None:
    """Without a session, pages redirect to the sign-in page, and requests that change something get a 401."""
    one = person()
    for route in GUARDED:
        assert called(one, route, {"id": str(uuid4())}) == (303 if route.method == "GET" else 401), route


def test_what_does_not_exist_leads_strangers_to_the_sign_in(person: Callable[..., Person]) -> None:
    """A client without a session does not learn which pages exist."""
    assert person().get("/nothing").status_code == 303
    assert person("operator").get("/nothing").status_code == 404
    assert person("operator").post("/", x="y").status_code == 405
