"""The behaviours of the sandbox, and its reply for each behaviour."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Kind = Literal["accept", "fail", "reject", "slow", "drop", "rate_limit"]
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]

DEFAULT_STATUS: dict[Kind, int] = {
    "accept": 200,
    "slow": 200,
    "drop": 200,
    "fail": 500,
    "reject": 403,
    "rate_limit": 429,
}
OUTCOMES: dict[Kind, str] = {
    "accept": "accepted",
    "slow": "accepted",
    "drop": "dropped",
    "fail": "failed",
    "reject": "rejected",
    "rate_limit": "rate_limited",
}
"""The outcome of each behaviour, as shown in the list of requests."""

DEFAULT_SLOWNESS = 5.0
"""Default number of seconds before a ``slow`` chat answers."""


@dataclass(frozen=True, slots=True)
class Reply:
    """How the sandbox answers a call: after ``delay`` seconds, or by dropping the connection."""

    status: int
    body: str
    delay: float = 0.0
    retry_after: float | None = None
    dropped: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """Additional headers, besides those that every HTTP response has."""
        return {} if self.retry_after is None else {"retry-after": f"{self.retry_after:g}"}


class WireModel(BaseModel):
    """A JSON object of the API: camelCase, immutable."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, populate_by_name=True)


class Incoming(WireModel):
    """The body of a delivery in the format of the transport ``http`` (deploy/ENDPOINT.md)."""

    follow_up_id: Annotated[str, Field(min_length=1, max_length=255)]
    chat_id: Annotated[str, Field(min_length=1, max_length=255)]
    external_chat_id: str | None = None
    trigger_chat_message_id: str | None = None
    message: str
    due_date: AwareDatetime
    attempt: Annotated[int, Field(ge=1)]


class Behaviour(WireModel):
    """The behaviour of a chat: how it answers requests.

    Statuses are HTTP status codes, and times are in seconds. With ``drop``, the message is accepted but the connection
    is closed; with ``slow``, it is accepted but answered late. ``fail``, ``reject`` and ``rate_limit`` do not accept
    the message.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Kind = "accept"
    status: Annotated[int, Field(ge=200, le=599)] | None = None
    """HTTP status of the answer. The default is 200; for fail it is 500, for reject 403 and for rate_limit 429."""
    times: Annotated[int, Field(ge=1)] | None = None
    """Number of requests to which the behaviour applies. None means that the behaviour applies until it is changed."""
    delay: Seconds | None = None
    """Seconds before the response: by default 5 for ``slow``, and 0 for all other behaviours."""
    retry_after: Seconds | None = None
    """Seconds in the Retry-After header; the default is 1 for ``rate_limit``, and no header otherwise."""
    body: Annotated[str, Field(max_length=1_000_000)] | None = None
    """The response body that replaces the default body."""

    @property
    def accepts(self) -> bool:
        """Whether a message is added to the chat under this behaviour."""
        return self.kind in {"accept", "slow", "drop"}

    def reply(self, document: dict[str, str]) -> Reply:
        """Return the answer to one request.

        The response body is ``document`` unless the behaviour specifies another body.
        """
        delay = DEFAULT_SLOWNESS if self.delay is None and self.kind == "slow" else self.delay
        retry_after = 1.0 if self.retry_after is None and self.kind == "rate_limit" else self.retry_after
        return Reply(
            status=self.status or DEFAULT_STATUS[self.kind],
            body=json.dumps(document) if self.body is None else self.body,
            delay=delay or 0.0,
            retry_after=retry_after,
            dropped=self.kind == "drop",
        )
