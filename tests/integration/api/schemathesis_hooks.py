"""Hooks for schemathesis that allow valid requests to be rejected because of the current state.

The OpenAPI document cannot express rules that depend on the current state. The check `valid_requests_are_accepted`
replaces schemathesis's check `positive_data_acceptance`. The replacement also accepts 422 responses that depend on the
current state. Other tests cover the 422 responses that depend on the state.
"""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

RULES = {"outside-messaging-window", "idempotency-key-reused"}
"""Problem types that the chat's state or an earlier request can cause."""

TOGETHER = {"#/reason", "#/finishedAt", "#/chatMessageId"}
"""PATCH fields that are valid only together, or only with certain stored values."""


@schemathesis.check
def valid_requests_are_accepted(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> bool | None:
    """Run Schemathesis's own check, unless one of our rules rejected the request."""
    if response.status_code == 422:
        problem = response.json()
        pointers = {error["pointer"] for error in problem["errors"]}
        if all("should lie in the years" in error["detail"] for error in problem["errors"]):
            return None  # RFC 3339 allows years that `datetime` cannot represent
        is_change = case.method.upper() == "PATCH" and pointers <= TOGETHER
        if is_change or problem["type"].rpartition("/")[2] in RULES:
            return None
    accepted: bool | None = positive_data_acceptance(ctx, response, case)
    return accepted
