"""The bodies of requests and responses. Names are camelCase in JSON and snake_case in Python."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import AliasGenerator, BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from followups.api import examples
from followups.api.fields import MAX_PAGE_SIZE, Digits, ExternalId, Id, LinkLife, Message, Reason, Time
from followups.channels import Channel
from followups.states import Status
from followups.store.chats import Role
from followups.store.console_sessions import LINK

MAX_FIELDS = 100
"""Maximum number of fields in a request body.

Fields are counted before they are validated, because each invalid field produces an error.
"""


def _optional_without_default(schema: dict[str, Any]) -> None:
    # A PATCH does not change absent fields, so the OpenAPI document must not show null as their default.
    for field in schema["properties"].values():
        field.pop("default", None)


class ResponseModel(BaseModel):
    """The base of every response model: all fields are present, under their JSON names."""

    model_config = ConfigDict(alias_generator=AliasGenerator(serialization_alias=to_camel))


class FollowUp(ResponseModel):
    """A message that is sent into a chat at its due date, unless something cancels it first."""

    model_config = ConfigDict(title="FollowUp", json_schema_extra={"examples": [examples.FOLLOW_UP]})

    id: UUID
    created_at: datetime
    updated_at: datetime
    chat_id: UUID
    chat_message_id: UUID | None = Field(
        description="The chat message that the transport created when the follow-up was sent."
    )
    due_date: datetime
    finished_at: datetime | None = Field(description="When the follow-up was sent, failed or was cancelled.")
    message: str
    reason: str | None = Field(
        description="Why the follow-up failed or was cancelled: `code`, `code: detail`, or the caller's own words."
    )
    status: Status
    trigger_chat_message_id: UUID = Field(description="The chat's last message when the follow-up was created.")


class Body(BaseModel):
    """The base class of every request body; it limits the number of fields."""

    @model_validator(mode="before")
    @classmethod
    def _bound_fields(cls, value: Any) -> Any:  # noqa: ANN401 - whatever JSON a client sent
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            message = f"should have at most {MAX_FIELDS} fields"
            raise ValueError(message)
        return value


class NewFollowUp(Body):
    """A follow-up to create. Unknown fields are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, json_schema_extra={"examples": [examples.NEW_FOLLOW_UP]})

    chat_id: Id
    due_date: Time = Field(description="A time with an offset. If it is in the past, the follow-up is due immediately.")
    message: Message


class FollowUpChanges(Body):
    """The fields of a follow-up to be changed; omitted fields keep their values.

    Unknown fields are refused, to catch misspelt names. Null has no effect if the field is already null.
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        json_schema_extra=_optional_without_default,
    )

    chat_id: Id = Field(None, description="Another chat, whose last message must not be from the user.")  # type: ignore[assignment]
    chat_message_id: Id | None = Field(
        None, description="If the follow-up has finished, it must be sent and must not have a `chatMessageId` yet."
    )
    due_date: Time = Field(None, description="Reschedules the follow-up.")  # type: ignore[assignment]
    finished_at: Time | None = Field(None, description="Allowed only with a final status; default: now.")
    message: Message = Field(None)  # type: ignore[assignment]
    reason: Reason | None = Field(
        None, description="Allowed only with the status failed or cancelled; stored as given."
    )
    status: Status = Field(None, description="A final status ends the follow-up.")  # type: ignore[assignment]
    trigger_chat_message_id: Id = Field(None)  # type: ignore[assignment]


_MANY = "One value, or several in a repeated parameter, with or without `[]` after its name. Default: no filter."


class FollowUpQuery(BaseModel):
    """The filters and the page of a follow-up list.

    Unknown parameters are refused, because ignoring them would return unfiltered results.
    """

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid")

    chat_ids: tuple[Id, ...] = Field((), description=_MANY)
    chat_message_ids: tuple[Id, ...] = Field((), description=_MANY)
    statuses: tuple[Status, ...] = Field((), description=_MANY)
    trigger_chat_message_ids: tuple[Id, ...] = Field((), description=_MANY)
    page_number: Digits = Field(1, ge=1, description="The number of the page, starting at 1.")
    page_size: Digits = Field(10, ge=1, le=MAX_PAGE_SIZE)


class ChatPut(Body):
    """A chat's channel and external id. Unknown fields are ignored.

    Without `externalId`, the chat has no external id.
    """

    model_config = ConfigDict(alias_generator=to_camel, json_schema_extra={"examples": [examples.CHAT_PUT]})

    channel: Channel
    external_id: ExternalId | None = Field(None, description="The id of the chat in the transport's own system.")


class Chat(ResponseModel):
    """A chat as it is stored."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.CHAT]})

    id: UUID
    channel: Channel
    external_id: str | None
    created_at: datetime
    updated_at: datetime


class NewChatMessage(Body):
    """A new message in a chat. Unknown fields are ignored; the message's text is not stored."""

    model_config = ConfigDict(alias_generator=to_camel, json_schema_extra={"examples": [examples.NEW_CHAT_MESSAGE]})

    id: Id
    chat_id: Id
    role: Role
    created_at: Time | None = Field(
        None, description="Default: now. A time in whole seconds counts as the end of that second."
    )


class ChatMessage(ResponseModel):
    """A recorded chat message and the follow-ups that it cancelled (none if it was already recorded)."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.CHAT_MESSAGE]})

    id: UUID
    chat_id: UUID
    role: Role
    created_at: datetime
    cancelled_follow_up_ids: tuple[UUID, ...]


class NewConsoleLink(Body):
    """A console link to create. Unknown fields are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, json_schema_extra={"examples": [examples.NEW_CONSOLE_LINK]})

    role: Literal["viewer", "agent"]
    chat_id: Id | None = Field(None, description="The only chat that the person sees; default: the whole workspace.")
    expires_in: LinkLife = Field(
        LINK, description="How long the link can be used: seconds or an ISO 8601 duration, from 10 seconds to 7 days."
    )


class ConsoleLink(ResponseModel):
    """A link that signs a person in once."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.CONSOLE_LINK]})

    url: str = Field(description="The link. The token is in its fragment, which browsers send to no server.")
    expires_at: datetime


class Check(BaseModel):
    """The result of one readiness check."""

    ok: bool
    detail: str


class Readiness(BaseModel):
    """The readiness response when all checks pass."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.READINESS]})

    status: str
    checks: dict[str, Check]


class Health(BaseModel):
    """The liveness response."""

    model_config = ConfigDict(json_schema_extra={"examples": [examples.HEALTH]})

    status: str
