"""Links to the pages before and after this one (RFC 8288), with every filter kept."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from followups.api.caller import AuthenticatedRoute

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fastapi import Request
    from fastapi.responses import Response

_BRACKETS = re.compile(
    rb"(^|&)(chatIds|chatMessageIds|statuses|triggerChatMessageIds)(?:\[\]|%5B%5D)(?:=|(?=&|$))", re.IGNORECASE
)
"""The filters' names with brackets; without ``=`` too, or a filter without a value would list everything."""


class ListRoute(AuthenticatedRoute):
    """A route whose parameters with many values may be written with ``[]`` after the name."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, which sees one spelling only."""
        handle = super().get_route_handler()

        async def without_brackets(request: Request) -> Response:
            request.scope["query_string"] = _BRACKETS.sub(rb"\1\2=", request.scope["query_string"])
            return await handle(request)

        return without_brackets


def link_header(request: Request, page_number: int, *, has_next: bool, has_previous: bool) -> dict[str, str]:
    """Return the `Link` header, if there is a page before this one or after it."""
    links = []
    if has_next:
        links.append(f'<{_url(request, page_number + 1)}>; rel="next"')
    if has_previous:
        links.append(f'<{_url(request, page_number - 1)}>; rel="prev"')
    return {"link": ", ".join(links)} if links else {}


def _url(request: Request, page_number: int) -> str:
    kept = [(name, value) for name, value in request.query_params.multi_items() if name != "pageNumber"]
    query = urlencode([*kept, ("pageNumber", page_number)])
    return str(request.url.replace(query=query, fragment=""))
