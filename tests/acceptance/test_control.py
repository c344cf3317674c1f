"""Tests for pauses and sending hours, with real processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from celery import Celery
from sqlalchemy.orm import Session

from followups.sending_hours import SendingHours
from followups.store import sending_hours
from stack import wait_until

if TYPE_CHECKING:
    from uuid import UUID

    from stack import Stack

SECOND = timedelta(seconds=1)


def command(stack: Stack, *arguments: str) -> str:
    """Run a command on the stack; return its output."""
    argv = [sys.executable, "-m", "followups.cli", *arguments]
    ran = subprocess.run(argv, env=stack.environment(), capture_output=True, text=True, check=True, timeout=60)
    return ran.stdout


def test_no_attempt_begins_while_paused(stack: Stack) -> None:
    """During a pause, no attempt begins; after the pause, all follow-ups are sent in order.

    A pause uses up no attempt.
    """
    stack.start()
    others = type(stack.world)(stack.world.engine)
    chats = [stack.world.chat() for _ in range(20)]
    places = [(chat, n * SECOND / 20) for n in range(5) for chat in chats]
    ids = stack.world.follow_ups_at_once([(chat, ahead + SECOND) for chat, ahead in places])
    time.sleep(1.1)
    command(stack, "pause", "--workspace", str(stack.world.workspace_id))
    begun = set(stack.accepted()) | {str(one) for one in ids if stack.world.row(one).attempts}
    theirs = others.burst([SECOND * n / 10 for n in range(10)])
    stack.wait_until_done(*theirs)
    later = [stack.world.follow_up() for _ in range(5)]
    wait_until(lambda: stack.world.scalar("SELECT count(*) FROM follow_ups WHERE pause_id IS NOT NULL") >= 5)
    time.sleep(1)
    mine = set(map(str, [*ids, *later]))
    assert set(stack.accepted()) & mine <= begun
    command(stack, "resume", "--workspace", str(stack.world.workspace_id))
    stack.wait_until_done()
    accepted = stack.accepted(*ids)
    assert sorted(stack.accepted()) == sorted(mine | set(map(str, theirs)))
    assert {stack.world.row(one).attempts for one in [*ids, *later]} == {1}
    for chat in chats:
        in_order = [str(one) for one, (place, _) in zip(ids, places, strict=True) if place == chat]
        assert [one for one in accepted if one in in_order] == in_order


def test_a_worker_that_starts_during_a_pause(stack: Stack) -> None:
    """A worker that starts during a pause respects the pause."""
    stack.sandbox()
    stack.beat()
    command(stack, "pause", "--channel", "api")
    follow_up: UUID = stack.world.follow_up()
    kept = stack.world.follow_up(stack.world.chat(channel="matrix"))
    stack.worker()
    stack.wait_until_done(kept)
    wait_until(lambda: stack.world.row(follow_up).pause_id)
    assert stack.accepted() == [str(kept)]
    command(stack, "resume", "--channel", "api")
    stack.wait_until_done()
    assert stack.accepted() == [str(kept), str(follow_up)]


def test_held_until_sending_hours_begin(stack: Stack) -> None:
    """Nothing is sent before the sending hours begin. When the sending hours begin, each follow-up is sent once."""
    stack.start()
    now = stack.world.scalar("SELECT now()")
    opening = now + 5 * SECOND
    with Session(stack.world.engine) as session, session.begin():
        hours = SendingHours("UTC", opening.time(), (opening + timedelta(hours=1)).time())
        sending_hours.put(session, stack.world.workspace_id, hours)
    ids = stack.world.burst([SECOND * n / 10 for n in range(20)])
    wait_until(lambda: all(stack.world.row(one).held_until == opening for one in ids))
    stack.wait_until_done(*ids)
    assert sorted(stack.accepted()) == sorted(map(str, ids))
    assert all(datetime.fromisoformat(one["receivedAt"]) >= opening for one in stack.received())
    assert {stack.world.row(one).attempts for one in ids} == {1}


def test_old_rows_are_pruned_during_deliveries(stack: Stack) -> None:
    """On beat's schedule, a worker prunes old rows while follow-ups are sent on time."""
    stack.options["FOLLOWUPS_RETENTION"] = "P30D"
    stack.start()
    old = "now() - interval '31 days'"
    chat = stack.world.chat()
    stack.world.sql(
        "INSERT INTO follow_ups"  # noqa: S608 - a constant above
        "  (workspace_id, chat_id, message, due_date, trigger_chat_message_id, status, finished_at)"
        f" SELECT :w, :c, 'x', {old}, gen_random_uuid(), 'sent', {old} FROM generate_series(1, 5000)",
        w=stack.world.workspace_id,
        c=chat,
    )
    app = Celery(broker=stack.settings.broker_url.get_secret_value())
    app.conf.broker_transport_options = {"global_keyprefix": "followups:"}
    app.send_task("followups.remove_old", queue="dispatch")
    app.close()
    ids = stack.world.burst([SECOND * n / 20 for n in range(40)])
    stack.wait_until_done(*ids)
    wait_until(lambda: len(stack.world.rows()) == len(ids))
    assert {row.status for row in stack.world.rows()} == {"sent"}
    [line] = wait_until(lambda: stack.log_events("removed_old"))
    assert line["follow_ups"] == 5000


def test_beat_schedules_pruning_once_an_hour(stack: Stack) -> None:
    """Beat sends the ticks and an hourly pruning task to the dispatch queue."""
    code = (
        "import json; from followups.worker import app; schedule = app.conf.beat_schedule;"
        "entry = schedule['remove-old'];"
        "print(json.dumps([entry['task'], str(entry['schedule']), app.conf.task_routes[entry['task']]['queue']]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=stack.environment(), capture_output=True, text=True, check=True, timeout=60
    )
    task, schedule, queue = json.loads(ran.stdout)
    assert (task, queue) == ("followups.remove_old", "dispatch")
    assert schedule.startswith("<crontab: 17 * * * *")
