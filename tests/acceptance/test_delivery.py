"""Tests of delivery, with a real worker, beat and broker."""

from __future__ import annotations

import base64
import json
import signal
import time
import zlib
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from celery import Celery
from sqlalchemy.orm import Session

import followups
from followups.delivery import hints
from followups.worker.broker import COMMAND_REFUSED, LONGEST_BODY
from stack import wait_until

if TYPE_CHECKING:
    from stack import Stack

SECOND = timedelta(seconds=1)


def test_each_at_its_due_date(running: Stack) -> None:
    """Each follow-up is sent once and on time, and ends as sent with the chat's message id."""
    ids = running.world.burst([timedelta(seconds=1 + n / 20) for n in range(40)])
    running.wait_until_done(*ids)
    rows = [running.world.row(one) for one in ids]
    assert {row.status for row in rows} == {"sent"}
    assert all(row.chat_message_id for row in rows)
    assert sorted(running.accepted(*ids)) == sorted(map(str, ids))
    due = {str(row.id): row.due_date for row in rows}
    requests = [one for one in running.received() if one["followUpId"] in due]
    # The chat and the database use this machine's clock.
    assert all(datetime.fromisoformat(one["receivedAt"]) >= due[one["followUpId"]] for one in requests)


def test_scheduled_in_a_callers_transaction(running: Stack) -> None:
    """A follow-up is sent after a commit, and does not exist after a rollback."""
    chat_id = running.world.chat()
    now = running.world.scalar("SELECT now()")
    with Session(running.world.engine) as session:
        kept = followups.schedule(
            session, workspace_id=running.world.workspace_id, chat_id=chat_id, message="Still there?", due_date=now
        )
        kept_id = kept.id
        session.commit()
        followups.schedule(
            session, workspace_id=running.world.workspace_id, chat_id=chat_id, message="Never mind", due_date=now
        )
        session.rollback()
    running.wait_until_done(kept_id)
    requests = [one for one in running.received() if one["chatId"] == str(chat_id)]
    assert [one["followUpId"] for one in requests] == [str(kept_id)]


def test_retry_reject_and_rate_limit(running: Stack) -> None:
    """A failure is retried, a rejection is final, and a 429 uses up no attempt."""
    failing, refusing, limiting = (running.world.chat() for _ in range(3))
    running.behave(failing, kind="fail", status=500, times=2)
    running.behave(refusing, kind="reject", status=403, body="not in this channel")
    running.behave(limiting, kind="rate_limit", retryAfter=1, times=1)
    retried, refused, limited = (running.world.follow_up(chat) for chat in (failing, refusing, limiting))
    running.wait_until_done(retried, refused, limited)
    assert running.attempts(retried) == [1, 2, 3]
    assert running.attempts(limited) == [1, 1]
    assert (running.world.row(retried).status, running.world.row(limited).status) == ("sent", "sent")
    assert running.world.row(refused).reason == "rejected: HTTP 403 not in this channel"
    assert [one[:2] for one in running.world.failures(retried)] == [(1, "retry"), (2, "retry")]


def test_dropped_answer(running: Stack) -> None:
    """If the response is lost, the message is sent again with the same key, and the chat accepts it once."""
    chat_id = running.world.chat()
    running.behave(chat_id, kind="drop", times=1)
    follow_up = running.world.follow_up(chat_id)
    running.wait_until_done(follow_up)
    assert running.world.row(follow_up).status == "sent"
    assert running.accepted(follow_up) == [str(follow_up)]
    assert len(running.attempts(follow_up)) == 2


def test_one_slow_chat(running: Stack) -> None:
    """A slow chat does not delay other chats."""
    slow = running.world.chat()
    running.behave(slow, kind="slow", delay=4)
    stuck = running.world.follow_up(slow)
    others = [running.world.follow_up() for _ in range(30)]
    wait_until(lambda: set(map(str, others)) <= set(running.accepted(*others)))
    running.wait_until_done(stuck, *others)
    accepted_at = running.world.row(stuck).accepted_at
    assert all(running.world.row(one).accepted_at < accepted_at for one in others)


def test_order_in_a_chat(running: Stack) -> None:
    """A chat's follow-ups arrive in due-date order, even if the first is retried."""
    chat_id = running.world.chat()
    running.behave(chat_id, kind="fail", status=503, times=2)
    ids = [running.world.follow_up(chat_id, n * timedelta(milliseconds=1)) for n in range(8)]
    running.wait_until_done(*ids)
    assert running.accepted(*ids) == [str(one) for one in ids]


def test_cancelled_while_its_batch_waits(stack: Stack) -> None:
    """If a follow-up is cancelled while its batch waits in the queue, the follow-up is never sent."""
    stack.sandbox()
    stack.beat()
    worker = stack.worker()
    worker.signal(signal.SIGSTOP)
    dropped, kept = stack.world.follow_up(), stack.world.follow_up()
    time.sleep(0.3)  # ticks accumulate in the queue
    with Session(stack.world.engine) as session, session.begin():
        followups.cancel(session, dropped, reason="changed our mind")
    worker.signal(signal.SIGCONT)
    stack.wait_until_done()
    assert stack.accepted() == [str(kept)]
    assert stack.world.row(dropped).reason == "changed our mind"


BOMB = base64.b64encode(zlib.compress(b"[" + b" " * 1_000_000)).decode()
OTHERS: list[dict[str, Any]] = [
    {"headers": {"compression": "application/x-gzip"}},
    {"content-type": "application/data", "content-encoding": "zlib_codec"},
    {"content-type": "application/x-python-serialize"},
    {"content-encoding": "zlib_codec"},
    {"body_encoding": "none"},
    {"body": "x" * (LONGEST_BODY + 1)},
]
"""Properties of broker messages that a worker must refuse to decode."""


def message(**other: Any) -> str:
    """Return a message in kombu's format, with the given fields replaced."""
    delivery = {"exchange": "", "routing_key": "deliver"}
    properties = {"delivery_tag": "x", "delivery_info": delivery, "body_encoding": "base64"}
    if "body_encoding" in other:
        properties["body_encoding"] = other.pop("body_encoding")
    usual = {"body": BOMB, "content-type": "application/json", "content-encoding": "utf-8"}
    return json.dumps({**usual, "headers": {}, "properties": properties, **other})


def celery_app(stack: Stack) -> Celery:
    """Return another Celery app, which knows only the broker's URL and key prefix."""
    app = Celery(broker=stack.settings.broker_url.get_secret_value())
    app.conf.broker_transport_options = {"global_keyprefix": "followups:"}
    return app


def test_malformed_broker_messages(running: Stack) -> None:
    """A malformed or forged message in either queue is logged and dropped; the worker continues."""
    deep = "[" * 100_000
    foreign = ["not JSON", "[]", "null", '{"body": 1}', '{"body": "e30=", "headers": {}}', b"\x00\xff", "", deep]
    wrong_type = '{"body": {"__type__": "datetime", "__value__": "never"}}'
    foreign += [message(**other) for other in OTHERS]
    dropped = len(running.log_events("broker_message_dropped"))
    for entry in (*foreign, wrong_type):
        for queue in ("dispatch", "deliver"):
            running.broker().lpush(f"followups:{queue}", entry)
    wait_until(lambda: len(running.log_events("broker_message_dropped")) == dropped + 2 * (len(foreign) + 1))
    follow_up = running.world.follow_up()
    running.wait_until_done(follow_up)
    assert running.accepted(follow_up) == [str(follow_up)]


def test_forged_hints(running: Stack) -> None:
    """Forged tasks in the correct format send nothing, do no harm and are logged."""
    later = running.world.follow_up(due=timedelta(hours=1))
    app = Celery(broker=running.settings.broker_url.get_secret_value())
    app.conf.broker_transport_options = {"global_keyprefix": "followups:"}
    many = [[str(later), 0, 0, 0]] * (hints.MOST + 1)
    foreign: list[list[object]] = [[], [None], ["x"], [many], [[[str(later), "1", 0, 0]]], [[["no id", 1, 0, 0]]]]
    forged: list[list[object]] = [*foreign, [[[str(later), 0, 0, 0]]]]
    with app.connection_for_write() as connection:
        for arguments in forged:
            app.send_task("followups.deliver", arguments, queue="deliver", connection=connection)
        app.send_task("followups.unknown", [], queue="deliver", connection=connection)
        app.send_task("followups.dispatch_due", ["unasked"], {"for": 1}, queue="dispatch", connection=connection)
    follow_up = running.world.follow_up()
    wait_until(lambda: running.world.row(follow_up).status == "sent")
    assert running.accepted(follow_up) == [str(follow_up)]
    wait_until(lambda: len(running.log_events("hint_dropped")) == len(foreign))
    assert running.world.row(later).attempts == 0


def test_remote_control_is_read_only(running: Stack) -> None:
    """Remote commands that stop or change a worker are refused, because any broker client can send them."""
    control = celery_app(running).control
    commands: dict[str, dict[str, object]] = {
        "shutdown": {},
        "cancel_consumer": {"queue": "deliver"},
        "add_consumer": {"queue": "others"},
        "rate_limit": {"task_name": "followups.deliver", "rate_limit": "1/h"},
        "disable_events": {},
        "pool_restart": {},
        "revoke": {"task_id": str(uuid4())},
        "hello": {"from_node": "x", "revoked": {str(uuid4()): 1}},
        "objgraph": {},
    }
    for command, arguments in commands.items():
        ((answer,),) = [
            each.values() for each in control.broadcast(command, arguments, reply=True, timeout=10, limit=1)
        ]
        assert answer == {"error": COMMAND_REFUSED}, command
    assert control.ping(timeout=10, limit=1)
    follow_up = running.world.follow_up()
    running.wait_until_done(follow_up)
    assert running.accepted(follow_up) == [str(follow_up)]


def test_remote_control_may_be_allowed(stack: Stack) -> None:
    """If REMOTE_CONTROL is true, `celery control shutdown` stops a worker."""
    stack.options["FOLLOWUPS_REMOTE_CONTROL"] = "true"
    worker = stack.worker()
    control = celery_app(stack).control
    # a ready worker may not yet listen for remote commands
    wait_until(lambda: control.ping(timeout=1))
    control.shutdown()
    wait_until(lambda: not worker.running)
    assert worker.exit_code == 0


def test_two_workers_and_two_beats(stack: Stack) -> None:
    """Two workers and two beats together deliver each follow-up once."""
    stack.options["FOLLOWUPS_BATCH_SIZE"] = "2"  # small batches, so that both workers receive hints
    stack.start()
    stack.worker("worker2")
    stack.beat("beat2")
    ids = stack.world.burst([timedelta(milliseconds=5 * n) for n in range(200)])
    stack.wait_until_done()
    assert sorted(one["followUpId"] for one in stack.received()) == sorted(map(str, ids))
    assert stack.log_events("attempt")
    assert stack.log_events("attempt", "worker2")


def test_stop_drains(stack: Stack) -> None:
    """On SIGTERM, a worker settles its calls in flight, releases its other leases and exits in time."""
    # The long lease ensures that a follow-up kept by the stopped worker would not be sent during this test. The long
    # timeout ensures that no response is late, even on a busy machine.
    stack.options |= {"FOLLOWUPS_LEASE": "120", "FOLLOWUPS_TRANSPORT_TIMEOUT": "20"}
    worker = stack.start()
    stack.behave(kind="slow", delay=0.5)
    ids = stack.world.burst([timedelta(0)] * 300)
    wait_until(lambda: len(stack.received()) > 50)
    worker.signal(signal.SIGTERM)
    wait_until(lambda: worker.exit_code is not None, within=10)
    assert worker.exit_code == 0
    assert stack.world.scalar("SELECT count(*) FROM follow_ups WHERE begun_at IS NOT NULL") == 0
    stack.behave(kind="accept")
    stack.worker("worker2")
    stack.wait_until_done()
    assert sorted(one["followUpId"] for one in stack.received()) == sorted(map(str, ids))
