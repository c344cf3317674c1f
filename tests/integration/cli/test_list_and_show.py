"""The commands `list` and `show`."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from followups.delivery.begin import begin
from followups.delivery.claim import claim
from followups.flow_control.breaker import BreakerStore, OutcomeReport, WorkspaceOutcomes
from followups.store import pauses
from followups.store.leases import key_of
from followups.store.pauses import PauseScope
from world import FAILED, FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest
    from sqlalchemy import Engine

    from followups.settings import Settings
    from world import World

    RunCommand = Callable[..., Any]

HOUR = timedelta(hours=1)


class TestList:
    """The command `followups list`."""

    def test_the_json_form_is_the_apis_without_the_message(self, run: RunCommand, world: World) -> None:
        """Each JSON entry of `list` has the API's fields, but its message is null without --message."""
        follow_up = world.follow_up(due=HOUR)
        [entry] = run("list", "--json").document
        assert list(entry) == FIELDS
        assert (entry["id"], entry["status"], entry["message"]) == (str(follow_up), "pending", None)
        assert run("list", "--json", "--message").document[0]["message"] == "Still there?"

    def test_filters_and_pages(self, run: RunCommand, world: World) -> None:
        """`list` filters by workspace, chat and state, limits the count, and shows the newest first."""
        chat = world.chat()
        first, second = world.follow_up(chat, HOUR), world.follow_up(chat, HOUR)
        failed = world.follow_up(**FAILED)

        def listed(*arguments: object) -> list[UUID]:
            return [UUID(entry["id"]) for entry in run("list", "--json", *arguments).document]

        assert listed() == [failed, second, first]
        assert listed("--chat", chat) == [second, first]
        assert listed("--status", "failed", "--status", "sent") == [failed]
        assert listed("--workspace", world.workspace_id) == [failed, second, first]
        assert listed("--trigger", uuid4()) == []
        assert listed("--limit", 1, "--page", 2) == [second]

    def test_a_pipe_gets_complete_rows_without_colour(self, run: RunCommand, world: World) -> None:
        """In a pipe, `list` prints one complete plain line per follow-up, and remarks on stderr."""
        chat = world.chat()
        follow_up = world.follow_up(chat, **FAILED)
        world.follow_up()
        ran = run("list", "--status", "failed")
        heading, row = ran.stdout.splitlines()
        assert heading.split() == ["ID", "STATUS", "DUE", "CHAT", "REASON"]
        assert [str(follow_up), "failed", str(chat)] == [row.split()[index] for index in (0, 1, 4)]
        assert "rejected: HTTP 403 no" in row
        assert "\x1b" not in ran.stdout
        assert "--page 2" in run("list", "--limit", 1).stderr

    def test_nothing_found_is_no_failure(self, run: RunCommand) -> None:
        """`list` reports an empty result on stderr and prints [] as JSON."""
        assert (run("list").code, run("list").stdout) == (0, "")
        assert run("list").stderr == "There is no such follow-up.\n"
        assert run("list", "--json").document == []
        assert run("list", "--workspace", "nobody").code == 2


class TestShow:
    """The command `followups show`."""

    def test_show_prints_everything_but_the_message(self, run: RunCommand, world: World) -> None:
        """The JSON of `show` contains the API's fields, an explanation and each failed attempt."""
        follow_up = world.follow_up(world.chat(channel="whatsapp", external_id="4917"), **FAILED, attempts=2)
        world.sql(
            "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail, status_code, duration)"
            " VALUES (:id, 1, 'retry', 'HTTP 500 down', 500, '20 ms'), (:id, 2, 'lost', 'lost', NULL, NULL)",
            id=follow_up,
        )
        shown = run("show", follow_up, "--json").document
        assert list(shown)[: len(FIELDS)] == FIELDS
        assert (shown["message"], shown["channel"], shown["externalChatId"]) == (None, "whatsapp", "4917")
        assert shown["explanation"].startswith("The transport refused the follow-up for good")
        first, second = shown["failedAttempts"]
        assert first.pop("at") <= second.pop("at")
        assert first == {
            "attempt": 1,
            "outcome": "retry",
            "detail": "HTTP 500 down",
            "statusCode": 500,
            "durationMs": 20.0,
        }
        assert (second["statusCode"], second["durationMs"]) == (None, None)
        assert run("show", follow_up, "--json", "--message").document["message"] == "Still there?"

    def test_show_names_the_open_breaker(self, run: RunCommand, world: World, settings: Settings) -> None:
        """`show` names the open breaker as the reason why a due follow-up waits.

        For a follow-up that is due later, `show` does not mention the breaker.
        """
        due, later = world.follow_up(due=-HOUR), world.follow_up(due=HOUR)

        async def fail() -> None:
            store = BreakerStore(settings, settings.transport)
            failed = tuple(uuid4() for _ in range(settings.breaker_failures))
            await store.report(
                OutcomeReport(
                    failed, runs=(WorkspaceOutcomes(key_of(world.workspace_id), len(failed), after_success=False),)
                ),
                0,
            )
            await store.close()

        assert run("show", due, "--json").document["breaker"] == "closed"
        asyncio.run(fail())
        shown = run("show", due, "--json").document
        assert shown["breaker"] == "open"
        assert shown["explanation"].startswith("The follow-up is due, and waits without using up attempts: for ")
        assert "will be sent in" in run("show", later, "--json").document["explanation"]

    def test_show_works_without_the_broker(
        self, run: RunCommand, world: World, environment: pytest.MonkeyPatch
    ) -> None:
        """If the broker is unreachable, `show` reports everything except the breaker's state."""
        environment.setenv("FOLLOWUPS_BROKER_URL", "redis://127.0.0.1:9/0")
        shown = run("show", world.follow_up(due=HOUR), "--json").document
        assert shown["breaker"] is None
        assert "will be sent in" in shown["explanation"]

    def test_show_prints_text(self, run: RunCommand, world: World) -> None:
        """`show` prints a follow-up's facts, explanation and failed attempts; --message adds the message."""
        follow_up = world.follow_up(
            status="sent",
            finished_at=datetime(2030, 1, 31, tzinfo=UTC),
            accepted_at=datetime(2030, 1, 31, tzinfo=UTC),
            due_date=datetime(2030, 1, 30, 23, 59, 59, 998_000, UTC),
            attempts=2,
        )
        world.sql(
            "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail, status_code, duration)"
            " VALUES (:id, 1, 'retry', 'HTTP 500 [down]', 500, '20 ms')",
            id=follow_up,
        )
        shown = run("show", follow_up).stdout
        assert re.search(r"^lag +2 ms *$", shown, re.MULTILINE)
        assert re.search(r"^attempts +2 of 8 *$", shown, re.MULTILINE)
        assert "The transport accepted the follow-up 2 ms after its due date, at attempt 2" in shown
        assert "HTTP 500 [down]" in shown
        assert "Still there?" not in shown
        assert "Still there?" in run("show", follow_up, "--message").stdout

    def test_an_unknown_id_is_an_error(self, run: RunCommand) -> None:
        """`show` with an unknown id is a usage error, and the error says how to list existing ids."""
        ran = run("show", uuid4())
        assert (ran.code, ran.stdout) == (2, "")
        assert ran.stderr == "followups: The follow-up was not found; followups list shows the existing ones.\n"

    def test_show_names_what_holds_a_follow_up(
        self, run: RunCommand, world: World, engine: Engine, settings: Settings
    ) -> None:
        """`show` says whether a delay is due to a pause, sending hours or an earlier follow-up."""
        name = str(world.workspace_id)
        chat = world.chat()
        first, second = world.follow_ups_at_once([(chat, -2 * HOUR), (chat, -HOUR)])
        with engine.begin() as connection:
            pauses.pause(connection, PauseScope(world.workspace_id, None))
        begin(engine, settings, claim(engine, settings).leases)
        shown = run("show", first, "--json").document
        assert shown["pausedBy"].keys() == {"workspace", "channel", "since"}
        assert f"followups resume --workspace {name} ends the pause." in shown["explanation"]
        waiting = run("show", second).stdout
        assert f"The follow-up waits for the earlier follow-up of its chat, {first}, to end" in waiting
        assert "About that follow-up: The follow-up fell due 2 h ago and is held" in waiting
        assert "when it is resumed" in run("show", first).stdout
        run("workspace", "hours", name, "--time-zone", "UTC", "--from", "09:00", "--to", "10:00")
        hours = {"timeZone": "UTC", "from": "09:00", "to": "10:00"}
        assert run("show", second, "--json").document["sendingHours"].items() >= hours.items()

    def test_show_names_the_retry(self, run: RunCommand, world: World) -> None:
        """For a failed follow-up, `show` names its retry; for a retry, `show` names the failed follow-up."""
        failed = world.follow_up(**FAILED)
        new = run("retry", failed, "--due", "+1h").stdout.strip()
        assert run("show", failed, "--json").document["retriedAs"] == new
        assert run("show", new, "--json").document["retryOf"] == str(failed)


def test_the_help_explains_unsent_follow_ups(run: RunCommand, world: World) -> None:
    """The top-level help shows how to find out why a follow-up was not sent.

    The help names two commands: one finds a follow-up, and the other explains it.
    """
    chat = world.chat()
    failed = world.follow_up(chat, **FAILED)
    shown = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "Why was a follow-up not sent? Find the follow-up with list, by its chat or state" in shown
    assert "then run show ID, which explains the reason." in shown
    assert str(failed) in run("list", "--chat", chat).stdout
    assert "The transport refused the follow-up for good" in run("show", failed).stdout
