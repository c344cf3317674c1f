"""A person who uses the console through an HTTP client and page parsers, without a browser."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta
from html import unescape
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import httpx
from sqlalchemy.orm import Session

from followups.store import console_sessions
from followups.store.console_sessions import Grant

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Engine

PREFIX = "/console"


class Form(HTMLParser):
    """A parser of a page's forms: their actions, fields and buttons."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.forms: list[dict[str, Any]] = []
        self._option: str | None = None
        self._area: str | None = None
        self._select: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "form":
            self.forms.append({"action": given.get("action", ""), "method": given.get("method", "get"), "fields": {}})
            return
        if not self.forms:
            return
        fields, name = self.forms[-1]["fields"], given.get("name")
        if tag == "input" and name:
            if given.get("type") in {"checkbox", "radio"} and "checked" not in given:
                return
            fields[name] = given.get("value") or ""
        elif tag == "textarea" and name:
            self._area = name
            fields[name] = ""
        elif tag == "select" and name:
            self._select = name
        elif tag == "option" and self._select and ("selected" in given or self._select not in fields):
            fields[self._select] = given.get("value") or ""

    def handle_data(self, data: str) -> None:
        if self._area:
            self.forms[-1]["fields"][self._area] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "textarea":
            # Browsers ignore a line break directly after `<textarea>`.
            fields = self.forms[-1]["fields"]
            fields[self._area] = fields[self._area].removeprefix("\n")
            self._area = None
        if tag == "select":
            self._select = None


@dataclass
class Person:
    """A signed-in person whose browser runs no scripts."""

    url: str
    engine: Engine
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=20, verify=False, headers={"origin": self.url})  # noqa: S501 - no TLS

    def signed_in(self, role: str, workspace_id: UUID | None = None, chat_id: UUID | None = None) -> Person:
        """Sign in with a new link for this role."""
        token = make_link(self.engine, role, workspace_id, chat_id)
        answer = self.post("/login", secret=token)
        assert answer.status_code == 303, answer.text
        return self

    def get(self, path: str, **query: Any) -> httpx.Response:
        """Send a GET request for a page."""
        return self.client.get(f"{PREFIX}{path}", params=query or None)

    def post(self, path: str, **fields: Any) -> httpx.Response:
        """Send a form by POST."""
        return self.client.post(f"{PREFIX}{path}", data=fields)

    def submit(self, page: httpx.Response, action: str, **fields: Any) -> httpx.Response:
        """Fill in and submit the page's form with this action."""
        found = next(form for form in Form(page.text).forms if form["action"] == f"{PREFIX}{action}")
        return self.client.request(found["method"].upper(), found["action"], data=found["fields"] | fields)


def make_link(
    engine: Engine, role: str, workspace_id: UUID | None = None, chat_id: UUID | None = None, seconds: int = 60
) -> str:
    """Create a sign-in link and return its token."""
    grant = Grant(role, workspace_id, f"test {role}", chat_id)
    with Session(engine) as session, session.begin():
        return console_sessions.make_link(session, grant, timedelta(seconds=seconds))[0]


def words(answer: httpx.Response) -> str:
    """Return the visible text of a page's main part."""
    main = answer.text.partition("<main")[2].partition("</main>")[0]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", f"<main{main}")).split())


def heading(answer: httpx.Response) -> str:
    """Return the page's heading."""
    found = re.findall(r"<h1[^>]*>(.*?)</h1>", answer.text, re.DOTALL)
    assert len(found) == 1, answer.text
    return unescape(found[0]).strip()
