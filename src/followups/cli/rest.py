"""A small client of the REST API: JSON over one kept-alive connection."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from followups.errors import FollowUpsError

TIMEOUT = 30.0
"""Seconds to wait for an answer."""

FIRST_ERROR = 400


class Rest:
    """A client of one host. Use it from one thread."""

    def __init__(self, address: str, key: str = "") -> None:
        """Take ``http://host:port`` and an API key if the host wants one; the first call connects."""
        self._connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=TIMEOUT)
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def close(self) -> None:
        """Close the connection; the next call opens it again."""
        self._connection.close()

    def call(self, method: str, path: str, document: object = None) -> Any:  # noqa: ANN401 - any JSON
        """Send a request and return the answer's JSON. Raises `FollowUpsError` for an error answer or no answer."""
        body = None if document is None else json.dumps(document)
        try:
            self._connection.request(method, path, body, self._headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            message = f"{method} {path} got no answer ({type(error).__name__})."
            raise FollowUpsError(message) from error
        if answer.status >= FIRST_ERROR:
            message = f"{method} {path} was answered with {answer.status}: {content.decode(errors='replace')[:300]}"
            raise FollowUpsError(message)
        return json.loads(content) if content else None
