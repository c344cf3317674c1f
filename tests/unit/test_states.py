"""The states: allowed transitions, their reasons, and the stored values."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups import states
from followups.errors import FollowUpsError, TransitionError
from followups.states import (
    DEFAULT_CODES,
    FINAL,
    MAX_REASON_LENGTH,
    TRANSITIONS,
    Final,
    ReasonCode,
    Status,
    code_of,
    explain,
    finish,
)

ALL_TRIPLES = list(product(Status, Status, [None, *ReasonCode]))

CONTRACT: dict[Status, set[str | None]] = {
    Status.SENT: {None},
    Status.FAILED: {
        "rejected",
        "retries_exhausted",
        "window_closed",
        "too_late",
        "outcome_unknown",
        "worker_lost",
        "failed_by_api",
    },
    Status.CANCELLED: {"user_replied", "human_takeover", "chat_removed", "cancelled_by_api"},
}
"""The documented reason codes of each final state."""


def _allowed(current: Status, to: Status, code: ReasonCode | None) -> bool:
    return current is Status.PENDING and code in CONTRACT.get(to, set())


@pytest.mark.parametrize(("current", "to", "code"), ALL_TRIPLES)
def test_every_transition_is_in_the_contract_or_refused(current: Status, to: Status, code: ReasonCode | None) -> None:
    """All documented transitions are possible, and all others are rejected."""
    if _allowed(current, to, code):
        assert finish(to, code, current=current) == Final(to, code)
    else:
        with pytest.raises(TransitionError):
            finish(to, code, current=current)


@given(
    current=st.sampled_from(Status),
    to=st.sampled_from(Status),
    code=st.none() | st.sampled_from(ReasonCode),
    detail=st.text(max_size=40),
    words=st.text(max_size=40),
)
def test_no_transition_leaves_a_final_state(
    current: Status, to: Status, code: ReasonCode | None, detail: str, words: str
) -> None:
    """A final state never changes, and every final state except `sent` has a reason."""
    try:
        final = finish(to, code, detail, words=words, current=current)
    except FollowUpsError:
        return
    assert current is Status.PENDING
    assert final.status is to
    assert final.status in FINAL
    assert (final.reason is None) == (to is Status.SENT)
    assert final.reason != ""


def test_the_three_final_states_are_final() -> None:
    """The only transitions are from pending to sent, failed or cancelled."""
    assert frozenset({Status.SENT, Status.FAILED, Status.CANCELLED}) == FINAL
    assert set(TRANSITIONS) == set(Status)
    assert set(TRANSITIONS[Status.PENDING]) == FINAL


def test_each_code_explains_one_state() -> None:
    """Every reason code belongs to one final state, and a state's default code belongs to that state."""
    codes = [code for onward in TRANSITIONS.values() for group in onward.values() for code in group]
    assert sorted(codes) == sorted(ReasonCode)
    assert all(code in TRANSITIONS[Status.PENDING][status] for status, code in DEFAULT_CODES.items())


def test_the_documented_table_is_the_code() -> None:
    """The table of transitions in the module's docstring matches the code."""
    rows = re.findall(r"^(\w+) +(\w+) +(.+)$", (states.__doc__ or "").split("\n=======")[2], re.MULTILINE)
    documented = {
        (Status(current), Status(to)): frozenset(re.findall(r"\w+", codes)) - {"none"} for current, to, codes in rows
    }
    coded = {(current, to): codes for current, onward in TRANSITIONS.items() for to, codes in onward.items()}
    assert documented == coded


@given(code=st.sampled_from(ReasonCode), detail=st.text(st.characters(), max_size=3 * MAX_REASON_LENGTH))
def test_a_reason_begins_with_its_code(code: ReasonCode, detail: str) -> None:
    """Every reason begins with its code and a colon, and is short enough to be stored."""
    reason = explain(code, detail)
    assert code_of(reason) == code
    assert reason == code or reason.startswith(f"{code.value}: ")
    assert len(reason) <= MAX_REASON_LENGTH
    assert "\x00" not in reason
    reason.encode()


def test_unstorable_characters_are_replaced() -> None:
    """NUL characters and lone surrogates, which JSON can contain, are replaced before storing."""
    assert explain(ReasonCode.REJECTED, "a\x00b\ud800c") == "rejected: a\N{REPLACEMENT CHARACTER}b?c"


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (None, ""),
        ("too_late", "too_late"),
        ("rejected: HTTP 403: no", "rejected"),
        ("we spoke", "other"),
        ("", "other"),
    ],
)
def test_the_code_of_a_stored_reason(reason: str | None, code: str) -> None:
    """A missing reason has no code, and a caller's reason counts as 'other'."""
    assert code_of(reason) == code


def test_a_callers_reason_is_stored_unchanged() -> None:
    """A caller's reason is stored unchanged, without a code."""
    assert finish(Status.CANCELLED, words="the customer called") == Final(Status.CANCELLED, "the customer called")
