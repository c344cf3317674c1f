"""Tests on PostgreSQL: the rules for follow-ups and chats in a Python caller's transaction."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from opentelemetry.sdk.trace import TracerProvider
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

import followups
from followups import scheduling
from followups.channels import Channel
from followups.errors import (
    AlreadyFinishedError,
    ChatNotFoundError,
    ConflictError,
    DeliveryInProgressError,
    FollowUpNotFoundError,
    InvalidRequestError,
    NothingToFollowUpError,
    OutsideMessagingWindowError,
    TooManyPendingError,
)
from followups.states import Status
from followups.store import chats
from followups.store.chats import Role
from followups.store.follow_ups import MOST_PENDING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from followups.models import Chat, FollowUp
    from world import World

DAY = timedelta(days=1)
NOW = text("now()")


def soon(days: float = 1) -> datetime:
    """Return the current time plus the given number of days."""
    return datetime.now(UTC) + days * DAY


@dataclass
class Caller:
    """A transaction in which a caller schedules follow-ups in one workspace."""

    session: Session
    world: World

    def schedule(self, chat_id: UUID, due: datetime | None = None, message: str = "?") -> FollowUp:
        """Schedule a follow-up; it is due tomorrow by default."""
        return followups.schedule(
            self.session,
            workspace_id=self.world.workspace_id,
            chat_id=chat_id,
            message=message,
            due_date=due or soon(),
        )

    def receive(self, chat_id: UUID, role: Role, at: datetime | None = None, message_id: UUID | None = None) -> Any:
        """Receive a chat message."""
        return chats.receive(
            self.session,
            self.world.workspace_id,
            message_id=message_id or uuid4(),
            chat_id=chat_id,
            role=role,
            created_at=at,
        )

    def put(self, chat_id: UUID, channel: Channel = Channel.API, external_id: str | None = None) -> tuple[Chat, bool]:
        """Create or update a chat."""
        return chats.put_chat(self.session, self.world.workspace_id, chat_id, channel, external_id)


@pytest.fixture
def caller(world: World) -> Iterator[Caller]:
    """Return a caller whose session has an open transaction."""
    with Session(world.engine, expire_on_commit=False) as session:
        yield Caller(session, world)


class TestSchedule:
    """A follow-up's row is the job; scheduling enqueues nothing else."""

    def test_row(self, caller: Caller) -> None:
        """A scheduled follow-up is pending and triggered by the chat's last message.

        The new row is visible only after the caller's commit.
        """
        chat_id, last = caller.world.chat(), uuid4()
        caller.receive(chat_id, Role.AGENT, message_id=last)
        created = caller.schedule(chat_id, message="Still there?")
        count = "SELECT count(*) FROM follow_ups"
        assert caller.world.scalar(count) == 0
        caller.session.commit()
        row = caller.world.row(created.id)
        assert (row.status, row.message, row.trigger_chat_message_id) == ("pending", "Still there?", last)
        assert (row.lease_token, row.attempts, row.begun_at, row.next_attempt_at) == (0, 0, None, None)

    def test_a_callers_trace(self, caller: Caller) -> None:
        """If a caller schedules a follow-up inside a trace, the follow-up stores the trace's context."""
        tracer = TracerProvider().get_tracer("a caller")
        with tracer.start_as_current_span("work") as span:
            traced = caller.schedule(caller.world.chat())
        context = span.get_span_context()
        assert traced.traceparent == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        assert caller.schedule(caller.world.chat()).traceparent is None

    def test_rollback(self, caller: Caller) -> None:
        """A rollback of the caller's transaction undoes everything."""
        created = caller.schedule(caller.world.chat()).id
        caller.session.rollback()
        assert caller.world.scalar("SELECT count(*) FROM follow_ups") == 0
        with pytest.raises(FollowUpNotFoundError):
            followups.cancel(caller.session, created, reason="x")

    @pytest.mark.parametrize(
        ("message", "due", "field"),
        [
            ("", soon(), "message"),
            ("x" * 65_537, soon(), "message"),
            ("a\x00", soon(), "message"),
            ("\ud800", soon(), "message"),
            ("x", datetime(2030, 1, 1), "due_date"),  # noqa: DTZ001 - a naive datetime is tested
        ],
    )
    def test_bad_field(self, caller: Caller, message: str, due: datetime, field: str) -> None:
        """An invalid text or time is rejected, and the error names the field."""
        with pytest.raises(InvalidRequestError) as caught:
            caller.schedule(caller.world.chat(), due, message)
        assert caught.value.field == field

    def test_chat(self, caller: Caller) -> None:
        """A follow-up is rejected if its chat is unknown, removed or empty, or belongs to another workspace.

        A follow-up is also rejected if its chat's last message is the user's.
        """
        from world import World  # noqa: PLC0415 - used only in this test

        removed, empty = (
            caller.world.chat(removed_at=NOW),
            caller.world.chat(last_message_id=None, last_message_role=None, last_message_at=None),
        )
        for chat_id in (uuid4(), removed, World(caller.world.engine).chat()):
            with pytest.raises(ChatNotFoundError):
                caller.schedule(chat_id)
        for chat_id in (empty, caller.world.chat(last_message_role="user")):
            with pytest.raises(NothingToFollowUpError):
                caller.schedule(chat_id)
        assert caller.schedule(caller.world.chat(last_message_role="operator"))

    @pytest.mark.parametrize("channel", list(Channel))
    def test_window(self, caller: Caller, channel: Channel) -> None:
        """On a windowed channel, a due date must be within 24 hours of the user's message."""
        windowed = channel in {Channel.WHATSAPP, Channel.INSTAGRAM}
        chat_id = caller.world.chat(channel=channel.value, last_user_message_at=text("now() - interval '23 hours'"))
        closed = caller.world.chat(channel=channel.value, last_user_message_at=text("now() - interval '25 hours'"))
        assert caller.schedule(chat_id, soon(0.04))
        assert caller.schedule(chat_id, soon(-30))
        for refusing, due in ((chat_id, soon(0.05)), (closed, soon(-30))):
            if windowed:
                with pytest.raises(OutsideMessagingWindowError):
                    caller.schedule(refusing, due)
            else:
                assert caller.schedule(refusing, due)


class TestFullChat:
    """Tests that a chat cannot have more pending follow-ups than one reply can cancel."""

    def test_a_full_chat_accepts_no_more(self, caller: Caller) -> None:
        """A full chat accepts no new or moved follow-up until one of its follow-ups has ended."""
        full, created = caller.world.full_chat(), caller.schedule(caller.world.chat())
        with pytest.raises(TooManyPendingError):
            caller.schedule(full)
        with pytest.raises(TooManyPendingError):
            scheduling.amend(caller.session, created.id, {"chat_id": full})
        one = "SELECT id FROM follow_ups WHERE chat_id = :id LIMIT 1"
        caller.world.sql(f"DELETE FROM follow_ups WHERE id = ({one})", id=full)  # noqa: S608 - SQL from this file
        inside = caller.schedule(full)
        scheduling.amend(caller.session, inside.id, {"chat_id": full, "message": "!"})
        with pytest.raises(TooManyPendingError):
            caller.schedule(full)
        assert followups.cancel(caller.session, inside.id).status == "cancelled"
        assert scheduling.amend(caller.session, created.id, {"chat_id": full}).chat_id == full

    def test_a_reply_cancels_all(self, caller: Caller) -> None:
        """A reply in a full chat cancels all the chat's follow-ups."""
        assert len(caller.receive(caller.world.full_chat(), Role.USER).cancelled) == MOST_PENDING


def test_no_row_joins_two_workspaces(world: World) -> None:
    """PostgreSQL refuses to store a follow-up or message in another workspace's chat."""
    from world import World  # noqa: PLC0415 - used only in this test

    chat_id, stranger = world.chat(), World(world.engine)
    with pytest.raises(IntegrityError):
        stranger.follow_up(chat_id)
    with pytest.raises(IntegrityError):
        stranger.sql(
            "INSERT INTO chat_messages (workspace_id, id, chat_id, role) VALUES (:workspace, :chat, :chat, 'user')",
            workspace=stranger.workspace_id,
            chat=chat_id,
        )


class TestAmend:
    """Tests of changes to follow-ups by the API and by operators, who see all workspaces."""

    def test_operator(self, caller: Caller) -> None:
        """An operator sees the follow-ups of all workspaces; a workspace sees only its own."""
        created = caller.schedule(caller.world.chat())
        assert scheduling.amend(caller.session, created.id, {"message": "new"}).message == "new"
        for changes in ({"message": "x"}, {"due_date": soon()}, {"status": Status.CANCELLED}):
            with pytest.raises(FollowUpNotFoundError):
                scheduling.amend(caller.session, created.id, changes, workspace_id=uuid4())

    def test_cancel(self, caller: Caller) -> None:
        """A cancel ends the follow-up with the caller's reason or the default code.

        A repeated cancel has no effect.
        """
        created = caller.schedule(caller.world.chat())
        cancelled = followups.cancel(caller.session, created.id, reason="called")
        assert (cancelled.status, cancelled.reason) == ("cancelled", "called")
        assert followups.cancel(caller.session, created.id, reason="called").finished_at == cancelled.finished_at
        assert scheduling.cancel(caller.session, created.id).reason == "called"
        with pytest.raises(AlreadyFinishedError):
            followups.cancel(caller.session, created.id, reason="other words")

    def test_reschedule_counts_lateness_anew(self, caller: Caller) -> None:
        """After a reschedule to a past date, lateness counts from the time of the reschedule."""
        chat_id = caller.world.chat()
        follow_up = caller.world.follow_up(chat_id, scheduled_at=text("now() - interval '9 days'"))
        scheduling.amend(caller.session, follow_up, {"due_date": soon(-3)})
        caller.session.commit()
        row = caller.world.row(follow_up)
        assert row.scheduled_at == row.updated_at
        assert row.created_at <= row.scheduled_at

    def test_a_lease_does_not_prevent_a_cancel(self, caller: Caller) -> None:
        """If a claimed follow-up is cancelled before it begins, its lease ends immediately."""
        follow_up = caller.world.follow_up(lease_token=3, lease_until=text("now() + interval '1 min'"))
        assert scheduling.cancel(caller.session, follow_up).status == "cancelled"
        caller.session.commit()
        assert caller.world.row(follow_up).lease_until is None

    def test_in_flight(self, caller: Caller) -> None:
        """A follow-up that has begun cannot be cancelled, even if its lease has expired."""
        follow_up = caller.world.follow_up(begun_at=NOW, lease_until=text("now() - interval '1 min'"))
        with pytest.raises(DeliveryInProgressError) as caught:
            scheduling.cancel(caller.session, follow_up)
        assert caught.value.retry_after > 0


class TestRetry:
    """Manual retries of failed follow-ups by an operator."""

    def test_a_retry_creates_a_new_follow_up(self, caller: Caller) -> None:
        """A retry creates a new follow-up and leaves the failed one unchanged."""
        chat_id = caller.world.chat()
        failed = caller.world.follow_up(chat_id, status="failed", reason="too_late", finished_at=NOW, message="Hey")
        before, due = caller.world.row(failed), soon(2)
        new, later = scheduling.retry(caller.session, failed), scheduling.retry(caller.session, failed, due_date=due)
        caller.session.commit()
        assert caller.world.row(failed) == before
        assert (new.message, new.status, new.chat_id) == ("Hey", "pending", chat_id)
        assert new.due_date <= datetime.now(UTC)
        assert later.due_date == due

    @pytest.mark.parametrize("status", ["pending", "sent", "cancelled"])
    def test_only_failed(self, caller: Caller, status: str) -> None:
        """Only failed follow-ups can be retried."""
        ends: dict[str, Any] = {} if status == "pending" else {"finished_at": NOW}
        reason = "user_replied" if status == "cancelled" else None
        with pytest.raises(ConflictError, match="Only a failed"):
            scheduling.retry(caller.session, caller.world.follow_up(status=status, reason=reason, **ends))
        with pytest.raises(FollowUpNotFoundError):
            scheduling.retry(caller.session, uuid4())


class TestChats:
    """Stored chats and their messages."""

    def test_put(self, caller: Caller) -> None:
        """A chat is created once and then updated; a removed chat can be created again."""
        chat_id = uuid4()
        assert caller.put(chat_id, external_id="x")[1]
        caller.receive(chat_id, Role.USER)
        chat, new = caller.put(chat_id, Channel.WHATSAPP)
        assert (new, chat.channel, chat.external_id, chat.last_message_role) == (False, "whatsapp", None, "user")
        chats.remove_chat(caller.session, caller.world.workspace_id, chat_id)
        chat, new = caller.put(chat_id)
        assert (new, chat.removed_at, chat.last_message_id, chat.last_user_message_at) == (True, None, None, None)

    def test_last_message(self, caller: Caller) -> None:
        """The newest message becomes the chat's last; the user's newest message opens the messaging window.

        A message older than the chat's last one changes neither the last message nor the messaging window.
        """
        chat_id = uuid4()
        user = caller.receive(chat_id, Role.USER, soon(-3))
        agent = caller.receive(chat_id, Role.AGENT, soon(-1))
        caller.receive(chat_id, Role.USER, soon(-4))
        chat = chats.lock_chat(caller.session, caller.world.workspace_id, chat_id)
        assert (chat.last_message_id, chat.last_user_message_at) == (agent.id, user.created_at)

    def test_same_timestamp(self, caller: Caller) -> None:
        """If two messages have the same timestamp, the one that arrived later counts as the last."""
        chat_id, at = uuid4(), soon(-1)
        caller.receive(chat_id, Role.USER, at)
        agent = caller.receive(chat_id, Role.AGENT, at)
        assert chats.lock_chat(caller.session, caller.world.workspace_id, chat_id).last_message_id == agent.id

    @pytest.mark.parametrize(
        ("ours", "reply", "cancels"),
        [
            (0.3, 0.0, True),  # the reply's time is in whole seconds, so it seems older than the agent's message
            (0.0, 0.0, True),
            (0.0, 0.5, True),  # the timestamp of the agent's message is in whole seconds
            (0.999999, 0.0, True),
            (0.3, -1.0, False),
            (0.0, -1.0, False),
            (0.3, 0.2, False),
        ],
    )
    def test_reply_within_the_second_of_our_message(
        self, caller: Caller, ours: float, reply: float, *, cancels: bool
    ) -> None:
        """If a reply's time has no fraction of a second, the reply counts as written at that second's end."""
        chat_id, second = uuid4(), soon(-1).replace(microsecond=0)
        caller.receive(chat_id, Role.AGENT, second + timedelta(seconds=ours))
        created = caller.schedule(chat_id)
        received = caller.receive(chat_id, Role.USER, second + timedelta(seconds=reply))
        assert received.cancelled == ((created.id,) if cancels else ())
        assert received.created_at == second + timedelta(seconds=reply)

    @pytest.mark.parametrize("answer", [0.0, 1.0, 1.4])
    def test_answer_within_the_second_of_the_user_s_message(self, caller: Caller, answer: float) -> None:
        """If an agent answers in the same second as the user's message, a follow-up can be scheduled."""
        chat_id, second = uuid4(), soon(-1).replace(microsecond=0)
        caller.receive(chat_id, Role.USER, second)
        caller.receive(chat_id, Role.AGENT, second + timedelta(seconds=answer))
        assert caller.schedule(chat_id)

    def test_immediate_answer(self, caller: Caller) -> None:
        """If an agent answers immediately, the answer is dated after the user's message."""
        chat_id = uuid4()
        now = caller.session.execute(text("SELECT now()")).scalar_one()
        caller.receive(chat_id, Role.USER, now.replace(microsecond=0))
        caller.session.commit()
        caller.receive(chat_id, Role.AGENT)
        assert caller.schedule(chat_id)

    def test_late_message_opens_the_window(self, caller: Caller) -> None:
        """A user's message that arrives after the agent's answer cancels no follow-up.

        The messaging window opens at the time stated in the user's message.
        """
        chat_id = caller.world.chat(channel="whatsapp", last_message_at=text("now() - interval '1 hour'"))
        with pytest.raises(OutsideMessagingWindowError):
            caller.schedule(chat_id, soon(0.5))
        late = soon(-0.4)
        assert caller.receive(chat_id, Role.USER, late).cancelled == ()
        created = caller.schedule(chat_id, soon(0.5))
        with pytest.raises(OutsideMessagingWindowError):
            caller.schedule(chat_id, late + DAY)
        for other, role in ((soon(-0.5), Role.USER), (soon(-0.1), Role.AGENT), (soon(-0.3), Role.OPERATOR)):
            assert caller.receive(chat_id, role, other).cancelled == ()
        chat = chats.lock_chat(caller.session, caller.world.workspace_id, chat_id)
        assert (chat.last_user_message_at, created.status) == (late, "pending")

    def test_known_message_of_a_removed_chat(self, caller: Caller) -> None:
        """Recording a known message again has no effect, even if its chat has been removed.

        A new message to a removed chat raises `ChatNotFoundError`.
        """
        chat_id = uuid4()
        first = caller.receive(chat_id, Role.AGENT)
        chats.remove_chat(caller.session, caller.world.workspace_id, chat_id)
        assert not caller.receive(chat_id, Role.USER, message_id=first.id).new
        with pytest.raises(ChatNotFoundError):
            caller.receive(chat_id, Role.USER)

    def test_reply_cancels_waiting_and_claimed_follow_ups(self, caller: Caller) -> None:
        """A reply cancels every pending follow-up of the chat, including claimed and waiting ones.

        Finished follow-ups are unchanged.
        """
        chat_id = caller.world.chat()
        leased = caller.world.follow_up(chat_id, lease_token=1, lease_until=text("now() + interval '1 min'"))
        waiting = caller.world.follow_up(chat_id, due=DAY, waits_for=leased)
        sent = caller.world.follow_up(chat_id, status="sent", finished_at=NOW)
        before = caller.world.row(sent)
        assert set(caller.receive(chat_id, Role.USER).cancelled) == {leased, waiting}
        caller.session.commit()
        for follow_up in (leased, waiting):
            row = caller.world.row(follow_up)
            assert (row.status, row.reason, row.lease_until, row.waits_for) == ("cancelled", "user_replied", None, None)
        assert caller.world.row(sent) == before
