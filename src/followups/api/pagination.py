"""Links to the previous and next page (RFC 8288), which keep every filter."""

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
"""Filter names with brackets.

Such a name counts even without ``=``, because a filter without a value would otherwise list everything.
"""


class ListRoute(AuthenticatedRoute):
    """A route whose multi-value parameters may be written with ``[]`` after the name."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that receives each parameter under one spelling."""
        handle = super().get_route_handler()

        async def without_brackets(request: Request) -> Response:
            request.scope["query_string"] = _BRACKETS.sub(rb"\1\2=", request.scope["query_string"])
            return await handle(request)

        return without_brackets


def link_header(query: FollowUpQuery, *, has_next: bool, has_previous: bool) -> dict[str, str]:
    """Return the `Link` header, or None if there is neither a previous nor a next page.

    The links are relative and are built from the validated query. If they contained a host or scheme sent by a client
    or a proxy, they could lead a client, with its API key, to another server.
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
