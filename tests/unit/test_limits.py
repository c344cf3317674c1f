"""Tests of rate limits: the buckets of a follow-up, and the times at which workers request tokens."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
import typer

from followups.cli.options import default_burst, parse_rate
from followups.flow_control.limiter import Limits, loosened
from followups.store.rate_limits import Limit, Limitable
from followups.wording import rate_in_words

NOW = datetime(2030, 1, 31, 9, tzinfo=UTC)
ACME, OTHER = UUID(int=1), UUID(int=2)


def limit(number: int, workspace: UUID | None = None, channel: str | None = None, per: str = "all") -> Limit:
    """Return a rate limit."""
    return Limit(UUID(int=number), workspace, channel, per, 10.0, 5, None, NOW)


def limitable(workspace: UUID = ACME, chat: int = 7, channel: str = "waha") -> Limitable:
    """Return a follow-up's workspace, channel and chat."""
    return Limitable(UUID(int=99), False, workspace, UUID(int=chat), channel, NOW, None)  # noqa: FBT003 - the follow-up has not ended


def matching(limits: list[Limit], where: Limitable) -> set[int]:
    """Return the numbers of the limits that apply to the follow-up."""
    return {int(bucket.key.partition(":")[0], 16) for bucket in Limits(limits).request(where).buckets}


def test_all_that_match_apply() -> None:
    """A follow-up is subject to all limits that match its workspace and channel.

    Limits of other workspaces and of other channels do not apply to the follow-up.
    """
    limits = [
        limit(1),
        limit(2, per="workspace"),
        limit(3, ACME),
        limit(4, ACME, per="chat"),
        limit(5, channel="waha"),
        limit(6, ACME, "waha"),
        limit(7, OTHER),
        limit(8, ACME, "api"),
        limit(9, channel="api"),
    ]
    assert matching(limits, limitable()) == {1, 2, 3, 4, 5, 6}
    assert matching(limits, limitable(OTHER, channel="widget")) == {1, 2, 7}


@pytest.mark.parametrize(("per", "buckets"), [("all", 1), ("workspace", 2), ("chat", 3)])
def test_follow_ups_that_share_a_bucket(per: str, buckets: int) -> None:
    """Depending on its scope, a limit has one bucket in all, or one for each workspace or chat.

    Chats of two workspaces may have equal ids.
    """
    limits = Limits([limit(1, per=per)])
    places = [limitable(ACME, 7), limitable(ACME, 8), limitable(OTHER, 7), limitable(ACME, 7)]
    assert len({limits.request(one).buckets for one in places}) == buckets


def test_removed_and_raised_limits() -> None:
    """Only a removed or raised limit releases its deferred follow-ups."""
    before = [limit(1), limit(2, ACME), limit(3, channel="waha"), limit(4, OTHER), limit(5, ACME, "api")]
    after = [
        limit(1),
        replace(limit(2, ACME), rate=11.0),
        replace(limit(3, channel="waha"), burst=6),
        replace(limit(4, OTHER), rate=9.0, burst=4),
        limit(6, OTHER, "api"),
    ]
    assert loosened(before, after) == {(ACME, None), (None, "waha"), (ACME, "api")}
    assert loosened([], before) == loosened(before, before) == set()


def test_no_limits() -> None:
    """No token is requested if no rate limit is set."""
    assert not Limits([])
    assert Limits([]).request(limitable()).buckets == ()


@pytest.mark.parametrize("text", ["50/s", "20/min", "1000/h", "5/d", "90/min", "7/h", "1/d"])
def test_a_rate_is_shown_as_entered(text: str) -> None:
    """A rate limit's rate is displayed as it was entered."""
    assert rate_in_words(parse_rate(text)) == text


def test_rates_with_fractions() -> None:
    """A rate of 0.5/s equals 30/min; a rate of zero, or of more than a million per second, is rejected."""
    assert rate_in_words(parse_rate("0.5/s")) == "30/min"
    for text in ("0/s", "0.009/d", "0.0000000000001/d", "1000001/s", "5", "5/week", "-5/s", "5 / s", "\u0665/s"):
        with pytest.raises(typer.BadParameter):
            parse_rate(text)


def test_default_burst() -> None:
    """By default, the burst is one second's worth of messages, but at least one message."""
    assert [default_burst(rate) for rate in (50, 1.9, 0.001)] == [50, 1, 1]


def test_ended_follow_ups_take_no_token() -> None:
    """A follow-up that has ended, or would end instead of beginning, does not wait for a token."""
    soon = timedelta(microseconds=1)
    fields = (UUID(int=1), False, ACME, ACME, "waha", NOW)
    assert not Limitable(*fields, None).is_over
    assert not Limitable(*fields, soon).is_over
    assert Limitable(*fields, timedelta(0)).is_over
