"""Links to the previous and the next page (RFC 8288), which contain all filters."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from followups.api.authentication import AuthenticatedRoute

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fastapi import Request
    from fastapi.responses import Response

    from followups.api.schemas import FollowUpQuery

_BRACKETS = re.compile(
    rb"(^|&)(chatIds|chatMessageIds|statuses|triggerChatMessageIds)(?:\[\]|%5B%5D)(?:=|(?=&|$))", re.IGNORECASE
)
"""Pattern of filter names with brackets.

A filter name with brackets matches even without ``=``, because the filter would otherwise be ignored and all rows
listed.
"""


class ListRoute(AuthenticatedRoute):
    """A route whose multi-value parameters may have ``[]`` after their names."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that renames each parameter to the spelling without brackets."""
        handle = super().get_route_handler()

        async def without_brackets(request: Request) -> Response:
            request.scope["query_string"] = _BRACKETS.sub(rb"\1\2=", request.scope["query_string"])
            return await handle(request)

        return without_brackets


def link_header(query: FollowUpQuery, *, has_next: bool, has_previous: bool) -> dict[str, str]:
    """Return the `Link` header, or None if there is neither a previous nor a next page.

    The links are relative and are built from the validated query. If a link contained a host or scheme that a client or
    a proxy had sent, it could lead a client to send its API key to another server.
    """
    links = []
    if has_next:
        links.append(f'<{_reference(query, query.page_number + 1)}>; rel="next"')
    if has_previous:
        links.append(f'<{_reference(query, query.page_number - 1)}>; rel="prev"')
    return {"link": ", ".join(links)} if links else {}


def _reference(query: FollowUpQuery, page_number: int) -> str:
    fields = query.model_copy(update={"page_number": page_number}).model_dump(
        mode="json", by_alias=True, exclude_unset=True
    )
    return "?" + urlencode({**fields, "pageNumber": page_number}, doseq=True)
