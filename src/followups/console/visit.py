"""One request of the console, with all that its page needs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from markupsafe import Markup
from starlette.responses import HTMLResponse, RedirectResponse, Response

from followups.console import language
from followups.console.access import Permission, Viewer
from followups.console.assets import ASSETS, ENVIRONMENT
from followups.console.forms import Fields, uuid_or_none
from followups.console.zones import Zone
from followups.errors import NotFoundError
from followups.operations.wording import span

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.console.services import ConsoleServices


MENU = (
    ("/", "Overview", "see"),
    ("/follow-ups", "Follow-ups", "see"),
    ("/settings", "Workspace settings", "settings"),
    ("/audit", "Audit log", "audit"),
    ("/system", "System", "system"),
)
"""The pages of the menu: path, name, and the action that a viewer needs to be allowed."""


class ForbiddenError(Exception):
    """The role does not allow this."""


@dataclass(slots=True)
class Visit:
    """A request, whose session has been checked, and which the role allows."""

    services: ConsoleServices
    method: str
    path: str
    """The path under ``/console``."""
    parameters: Mapping[str, str]
    """The variable parts of the path."""
    query: Fields
    form: Fields
    headers: Mapping[str, str]
    cookies: Mapping[str, str]
    client: str
    scheme: str
    language: str
    viewer: Viewer | None = None
    workspace_zone: Zone | None = None
    """The zone of the workspace's sending hours, or None if it has none or the session sees all workspaces."""
    set_cookies: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    @property
    def person(self) -> Viewer:
        """The viewer of a page that needs one."""
        if self.viewer is None:
            raise ForbiddenError
        return self.viewer

    @property
    def zone(self) -> Zone:
        """The zone of the person: the chosen one, or the browser's, or the workspace's, or UTC."""
        chosen = self.cookies.get("followups_zone", "")
        if chosen and self.services.is_zone(chosen):
            return Zone(chosen)
        return self.workspace_zone or Zone()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Open a transaction, which is committed at the end."""
        with self.services.sessions() as session, session.begin():
            yield session

    def id(self, name: str = "id") -> UUID:
        """Return an id in the path; a value that is not a UUID counts as not found."""
        found = uuid_or_none(self.parameters[name])
        if found is None:
            raise NotFoundError
        return found

    def t(self, text: str, **values: object) -> str:
        """Return a text in the person's language."""
        return language.translate(self.language, text, **values)

    def url(self, path: str, **query: object) -> str:
        """Return the address of a page, under the path prefix."""
        named = {name: value for name, value in query.items() if value not in {None, ""}}
        return f"{self.services.base}{quote(path)}" + (f"?{urlencode(named, doseq=True)}" if named else "")

    def time(self, moment: datetime | None, beside: Zone | None = None) -> Markup:
        """Return a time in the zone of the person, with the workspace's beside it where the two differ."""
        if moment is None:
            return Markup("–")  # noqa: RUF001 - the dash of an empty cell
        exact = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        shown = Markup('<time datetime="{}">{}</time>').format(exact, self.zone.written(moment))
        other = beside or self.workspace_zone
        if other is None or moment.astimezone(other.info).utcoffset() == moment.astimezone(self.zone.info).utcoffset():
            return shown
        return shown + Markup(' <span class="beside">({} {})</span>').format(other.written(moment), other.name)

    def count(self, number: int | None, most: int = 10_000) -> str:
        """Return a number for people: exact up to ``most``, "more than" beyond, or that it took too long."""
        if number is None:
            return self.t("too many to count")
        return self.t("more than {number}", number=f"{most:,}") if number > most else f"{number:,}"

    def span(self, duration: timedelta) -> str:
        """Return a duration in words."""
        return span(duration)

    def menu(self) -> list[tuple[str, str, str]]:
        """Return the pages that the viewer may see: path, name, action."""
        return [entry for entry in MENU if self.may(entry[2])]

    def is_at(self, path: str) -> bool:
        """Return whether this is the page, or one below it."""
        return self.path == path or (path != "/" and self.path.startswith(f"{path}/"))

    def may(self, action: str) -> bool:
        """Return whether the viewer may do that."""
        return self.viewer is not None and self.viewer.may(Permission(action))

    def page(self, template: str, status: int = HTTPStatus.OK, **context: object) -> Response:
        """Return a page made of a template."""
        return HTMLResponse(self.rendered(template, **context), status)

    def rendered(self, template: str, **context: object) -> str:
        """Return the template rendered for this visit."""
        shared = {
            "visit": self,
            "t": self.t,
            "url": self.url,
            "when": self.time,
            "asset": lambda name: f"{self.services.base}/static/{ASSETS[name].name}",
            "languages": language.LANGUAGES,
        }
        return ENVIRONMENT.get_template(template).render(shared | context)

    def redirect(self, path: str, **query: object) -> Response:
        """Return an answer that has the browser get another page."""
        return RedirectResponse(self.url(path, **query), HTTPStatus.SEE_OTHER)

    def go(self, place: str) -> Response:
        """Return an answer that has the browser get a page by its path and query."""
        path, _, query = place.partition("?")
        return RedirectResponse(f"{self.services.base}{quote(path)}{'?' if query else ''}{query}", HTTPStatus.SEE_OTHER)

    def cookie(self, name: str, value: str, **options: Any) -> None:  # noqa: ANN401 - as Starlette's
        """Set a cookie with the answer."""
        self.set_cookies.append((name, value, options))
