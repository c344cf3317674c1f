"""The demo's script, its final check and its display."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import StringIO
from itertools import pairwise
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from followups.cli.demo import EventLines
from followups.cli.demo.picture import Picture, around_now
from followups.cli.demo.scenario import FAILURES, REPLY_AT, REPLYING, ScenarioStep, Scheduled, script
from followups.cli.demo.score import FollowUpState, lags, score, summary_lines, summary_panel
from followups.states import Status

START = datetime(2030, 1, 31, 9, tzinfo=UTC)
SCENARIO = script()


def ended(part: ScenarioStep) -> FollowUpState:
    """Return the state of a scenario's step after the step has ended as the script specifies."""
    ending = part.ending
    lag = 2.0 + part.due if ending.status == Status.SENT else None
    reason = f"{ending.code}: why" if ending.code else None
    return FollowUpState(_scheduled(part), ending.status, ending.attempts, reason, None, lag)


def pending(part: ScenarioStep) -> FollowUpState:
    """Return the state of a scenario step before its due time."""
    return FollowUpState(_scheduled(part), Status.PENDING, 0, None, None, None)


def _scheduled(part: ScenarioStep) -> Scheduled:
    return Scheduled(uuid4(), part, START + timedelta(seconds=part.due))


ALL_ENDED = [ended(part) for part in SCENARIO.parts]
RECEIPTS = {"accepted": 52, "duplicates": 0}


def test_the_script_has_at_least_50_follow_ups() -> None:
    """The demo's script sends at least 50 follow-ups at different times.

    Three follow-ups are retried, one is rejected and two are cancelled.
    """
    result = score(ALL_ENDED, RECEIPTS)
    assert result.ok
    assert (result.sent, result.failed, result.cancelled, result.retried) == (52, 1, 2, 3)
    assert len({part.due for part in SCENARIO.parts}) == len(SCENARIO.parts)
    assert 8 <= SCENARIO.parts[-1].due <= 12
    assert list(SCENARIO.parts) == sorted(SCENARIO.parts, key=lambda part: part.due)


def test_the_reply_precedes_the_cancelled_follow_ups() -> None:
    """In the demo, the user's reply comes after the first follow-up and well before the cancelled ones."""
    first, *cancelled = [part for part in SCENARIO.parts if part.chat == REPLYING]
    assert SCENARIO.replies == {REPLYING: REPLY_AT}
    assert first.due < REPLY_AT - 1
    assert all(part.due > REPLY_AT + 1 for part in cancelled)


def test_failures_delay_no_other_follow_up() -> None:
    """In the demo, each chat with failing deliveries has only one follow-up."""
    assert all(sum(part.chat == chat for part in SCENARIO.parts) == 1 for chat in FAILURES)


@pytest.mark.parametrize(
    ("number", "changed", "problem"),
    [
        (0, {"attempts": 2}, "Ada's of second 0 should be sent after 1 attempts, and is sent after 2"),
        (0, {"status": Status.PENDING, "lag": None}, "and is pending after 1"),
        (0, {"status": Status.FAILED, "reason": "too_late"}, "and is failed after 1 (too_late)"),
    ],
)
def test_an_unexpected_end_is_a_problem(number: int, changed: dict[str, object], problem: str) -> None:
    """If a follow-up does not end as scripted, the demo fails and names this follow-up."""
    standings = [*ALL_ENDED[:number], replace(ALL_ENDED[number], **changed), *ALL_ENDED[number + 1 :]]
    result = score(standings, RECEIPTS)
    assert not result.ok
    assert problem in result.problems[0]


@pytest.mark.parametrize("receipts", [{"accepted": 52, "duplicates": 1}, {"accepted": 51, "duplicates": 0}])
def test_the_receiver_s_count_decides(receipts: dict[str, object]) -> None:
    """The demo fails if the receiver has accepted a message twice or never."""
    assert not score(ALL_ENDED, receipts).ok


def test_the_json_form_has_the_contract_s_fields() -> None:
    """The demo's JSON object has exactly the documented fields."""
    document = score(ALL_ENDED, RECEIPTS).document()
    assert list(document) == ["sent", "failed", "cancelled", "retried", "duplicates", "lagMs", "ok"]
    assert document["lagMs"] == lags(ALL_ENDED)


def test_lag_is_of_first_attempts_and_nearest_rank() -> None:
    """The demo's lag includes first attempts only; if there are none, the lag is null."""
    retried = [each for each in ALL_ENDED if each.retried]
    assert lags(retried) == {"p50": None, "p95": None, "p99": None}
    hundred = [replace(ALL_ENDED[0], lag=float(number)) for number in range(1, 101)]
    assert lags([*retried, *reversed(hundred)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


@given(st.floats(-3, 15), st.integers(1, 60))
def test_the_rows_are_around_now(second: float, count: int) -> None:
    """The demo lists as many follow-ups as fit, in due order; late unfinished ones have precedence."""
    now = START + timedelta(seconds=second)
    standings = [ended(part) if part.due < second - 1 else pending(part) for part in SCENARIO.parts]
    rows = around_now(standings, now, count)
    assert len(rows) == min(count, len(standings))
    assert all(a.scheduled.due <= b.scheduled.due for a, b in pairwise(rows))
    late = [each for each in standings if each.scheduled.due <= now and not each.ended]
    if not all(each.ended for each in standings):
        assert all(each in rows for each in late[:count])


def test_unusual_follow_ups_are_shown_at_the_end() -> None:
    """The demo's final list shows retried, rejected and cancelled follow-ups in preference to others."""
    rows = around_now(ALL_ENDED, START, 6)
    assert all(each.retried or each.status != Status.SENT for each in rows)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (200, 60), (60, 20)])
@pytest.mark.parametrize("second", [-2.0, 3.1, 20.0])
def test_the_picture_fits_the_terminal(width: int, height: int, second: float) -> None:
    """The demo's display always fits the terminal's width and height."""
    now = START + timedelta(seconds=second)
    standings = [ended(part) if part.due < second else pending(part) for part in SCENARIO.parts]
    trying = replace(standings[0], status=Status.PENDING, attempts=1, next_attempt_at=now + timedelta(seconds=1))
    screen = StringIO()
    console = Console(file=screen, width=width, height=height, force_terminal=True, color_system=None)
    console.print(Picture([trying, *standings[1:]], now, "http://x:1", width, height).render())
    lines = screen.getvalue().splitlines()
    assert len(lines) < height
    assert all(len(line) <= width for line in lines)
    assert "again in 1.0s" in screen.getvalue()


def test_a_pipe_gets_each_event_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal, the demo prints each change once as a plain line."""
    show = EventLines()
    before, after = [pending(part) for part in SCENARIO.parts], ALL_ENDED
    show(before, START, [])
    for _ in range(2):
        show([replace(after[0], scheduled=before[0].scheduled), *before[1:]], START, [])
    show(before[1:], START, ["Lena"])
    assert capsys.readouterr().out.splitlines() == [
        "Ada   due second  0.00  ● sent  lag 2.0 ms",
        "Lena  writes back",
    ]


def test_the_summary_shows_figures_and_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's summary shows every figure and the next command, or the problems."""
    Console(width=80).print(summary_panel(score(ALL_ENDED, RECEIPTS)))
    said = capsys.readouterr().out
    for word in ("52 sent", "3 retried", "1 failed", "2 cancelled", "0 duplicates", "p99 11.3", "followups up"):
        assert word in said
    failed = score([replace(ALL_ENDED[0], status=Status.PENDING), *ALL_ENDED[1:]], RECEIPTS)
    Console(width=80).print(summary_panel(failed))
    assert "Not as scripted" in capsys.readouterr().out
    assert "Not all as scripted." in summary_lines(failed)
