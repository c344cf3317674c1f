"""One request to the console, with its form and everything that the page needs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode
from uuid import UUID

from markupsafe import Markup
from starlette.responses import HTMLResponse, RedirectResponse, Response

from followups.console import language
from followups.console.access import Permission, Viewer
from followups.console.assets import ASSETS, ENVIRONMENT
from followups.console.zones import Zone
from followups.errors import InvalidRequestError, NotFoundError
from followups.store import audit, workspaces
from followups.store.audit import Actor, Event, Way
from followups.wording import Sentence, span

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy.orm import Session

    from followups.console.services import ConsoleServices
    from followups.store.audit import Action


MAX_FIELDS = 300
"""Maximum number of fields in a form or query string: one check box for each row, and a dozen other fields."""


class Fields:
    """The fields of a form or query string, in their original order."""

    def __init__(self, encoded: str) -> None:
        """Parse the fields. Raises `InvalidRequestError` if there are too many fields or a field is not valid UTF-8."""
        try:
            pairs = parse_qsl(encoded, keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict")
        except (ValueError, UnicodeDecodeError):
            message = Sentence("A form must have at most {most} fields, in UTF-8.", most=MAX_FIELDS)
            raise InvalidRequestError(message) from None
        self._values: dict[str, list[str]] = {}
        for name, value in pairs:
            self._values.setdefault(name, []).append(value)

    def text(self, name: str, default: str = "") -> str:
        """Return the last value of a field, without surrounding white space."""
        return self.raw(name, default).strip()

    def raw(self, name: str, default: str = "") -> str:
        """Return a field's last value as typed, with line breaks as line feeds."""
        return self._values.get(name, [default])[-1].replace("\r\n", "\n")

    def every(self, name: str) -> list[str]:
        """Return all values of the field."""
        return self._values.get(name, [])

    def uuid(self, name: str) -> UUID | None:
        """Return a field's value as a UUID, or None if the value is missing or invalid."""
        return uuid_or_none(self.text(name))

    def __contains__(self, name: object) -> bool:
        """Return whether the form or query string contains the field."""
        return name in self._values


def uuid_or_none(text: str) -> UUID | None:
    """Return the text as a UUID, or None if it is not a UUID.

    >>> uuid_or_none("0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51"), uuid_or_none("x")
    (UUID('0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51'), None)
    """
    try:
        return UUID(text)
    except ValueError:
        return None


MOST_SUGGESTED = 200
"""The largest number of workspace names that a field suggests."""

MENU = (
    ("/", "Overview", "see"),
    ("/follow-ups", "Follow-ups", "see"),
    ("/settings", "Workspace settings", "settings"),
    ("/audit", "Audit log", "audit"),
    ("/system", "System", "system"),
)
"""The pages in the menu: path, name, and the permission needed to see the page."""


class ForbiddenError(Exception):
    """The visitor's role does not allow the action."""


@dataclass(slots=True)
class Visit:
    """A request to the console, together with its session."""

    services: ConsoleServices
    method: str
    path: str
    """The path of the request, without ``/console``."""
    parameters: Mapping[str, str]
    """The values of the variable segments of the path."""
    query: Fields
    form: Fields
    headers: Mapping[str, str]
    cookies: Mapping[str, str]
    client: str
    scheme: str
    language: str
    viewer: Viewer | None = None
    workspace_zone: Zone | None = None
    """The time zone of the workspace's sending hours.

    The time zone is None if there are no sending hours or the session covers all workspaces.
    """
    set_cookies: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    @property
    def person(self) -> Viewer:
        """The viewer. Raises `ForbiddenError` if the request has no session."""
        if self.viewer is None:
            raise ForbiddenError
        return self.viewer

    @property
    def actor(self) -> Actor:
        """The signed-in person, recorded in the audit log as the author of changes."""
        session = self.person.session
        return Actor(Way.CONSOLE, session.id, session.name)

    @property
    def zone(self) -> Zone:
        """The time zone in the person's cookie, or else the workspace's, or else UTC."""
        chosen = self.cookies.get("followups_zone", "")
        if chosen and self.services.is_zone(chosen):
            return Zone(chosen)
        return self.workspace_zone or Zone()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Open a database transaction, which is committed when the block ends."""
        with self.services.sessions() as session, session.begin():
            yield session

    def record(
        self, session: Session, action: Action, workspace_id: UUID | None, target_id: UUID, **details: object
    ) -> None:
        """Record the person's action in the audit log, in the same transaction as the change."""
        audit.record(session.connection(), Event(self.actor, action, workspace_id, target_id, details=details))

    def id(self, name: str = "id") -> UUID:
        """Return the id in the path. Raises `NotFoundError` if this id is not a UUID."""
        found = uuid_or_none(self.parameters[name])
        if found is None:
            raise NotFoundError
        return found

    def t(self, text: str, **values: object) -> str:
        """Return a message in the user's language."""
        return self.said(Sentence(text, **values))

    def said(self, sentence: Sentence) -> str:
        """Return a sentence in the person's language, with times in the person's time zone."""
        return sentence.said(partial(language.translate, self.language), self.zone.written)

    def url(self, path: str, **query: object) -> str:
        """Return the URL of a page, including the path prefix."""
        named = {name: value for name, value in query.items() if value not in {None, ""}}
        return f"{self.services.base}{quote(path)}" + (f"?{urlencode(named, doseq=True)}" if named else "")

    def time(self, moment: datetime | None, beside: Zone | None = None) -> Markup:
        """Return a time in the person's time zone, and in the workspace's time zone if that is different."""
        if moment is None:
            return Markup("–")  # noqa: RUF001 - the dash of an empty cell
        exact = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        shown = Markup('<time datetime="{}">{}</time>').format(exact, self.zone.written(moment))
        other = beside or self.workspace_zone
        if other is None or moment.astimezone(other.info).utcoffset() == moment.astimezone(self.zone.info).utcoffset():
            return shown
        return shown + Markup(' <span class="beside">({} {})</span>').format(other.written(moment), other.name)

    def count(self, number: int | None, most: int = 10_000) -> str:
        """Return a number for display. A number above ``most`` is shown as "more than" or "too many to count"."""
        if number is None:
            return self.t("too many to count")
        return self.t("more than {number}", number=f"{most:,}") if number > most else f"{number:,}"

    def span(self, duration: timedelta) -> str:
        """Return a duration in words."""
        return span(duration)

    def workspace_names(self) -> list[str]:
        """Return the first workspace names, as suggestions for people who see all workspaces."""

        def names() -> list[str]:
            with self.transaction() as session:
                return workspaces.first_names(session, MOST_SUGGESTED)

        found: list[str] = self.services.results.get("workspaces", names)
        return found

    def menu(self) -> list[tuple[str, str, str]]:
        """Return the menu entries that the viewer may see, each with path, name and permission."""
        return [entry for entry in MENU if self.may(entry[2])]

    def is_at(self, path: str) -> bool:
        """Return whether the request is for the given page or a page below it."""
        return self.path == path or (path != "/" and self.path.startswith(f"{path}/"))

    def may(self, action: str) -> bool:
        """Return whether the viewer has the permission."""
        return self.viewer is not None and self.viewer.may(Permission(action))

    def page(self, template: str, status: int = HTTPStatus.OK, **context: object) -> Response:
        """Return a page rendered from the template."""
        return HTMLResponse(self.rendered(template, **context), status)

    def rendered(self, template: str, **context: object) -> str:
        """Render the template for this request."""
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
        """Return a redirect to another page."""
        return RedirectResponse(self.url(path, **query), HTTPStatus.SEE_OTHER)

    def go(self, place: str) -> Response:
        """Return a redirect to the page with the given path and query string."""
        path, _, query = place.partition("?")
        return RedirectResponse(f"{self.services.base}{quote(path)}{'?' if query else ''}{query}", HTTPStatus.SEE_OTHER)

    def cookie(self, name: str, value: str, **options: Any) -> None:  # noqa: ANN401 - as Starlette's
        """Set a cookie in the response."""
        self.set_cookies.append((name, value, options))
