"""``followups limit``: rate limits for deliveries, and quotas for workspaces."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from sqlalchemy.orm import Session

from followups.cli import connection
from followups.cli.documents import limit_document, quota_document
from followups.cli.entry import examples
from followups.cli.options import MOST, OneChannel, Workspace, default_burst, parse_quota, parse_rate, workspace_id_of
from followups.cli.output import Json, print_json, print_line, print_table
from followups.operations import administration
from followups.operations.explain import limited
from followups.store import quotas, rate_limits
from followups.store.audit import Way, user_of_process
from followups.store.quotas import Kind
from followups.store.rate_limits import LimitScope
from followups.wording import rate_in_words, readable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from followups.channels import Channel
    from followups.store.rate_limits import Limit

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    epilog=examples("followups limit set 50/s --workspace acme", "followups limit list"),
)


class Each(StrEnum):
    """Whether each workspace or each chat has its own token bucket."""

    WORKSPACE = "workspace"
    CHAT = "chat"


Rate = Annotated[
    float,
    typer.Argument(
        parser=parse_rate, metavar="RATE", show_default=False, help="The limit, as in 50/s, 20/min or 1000/h."
    ),
]
Apart = Annotated[
    Each | None,
    typer.Option(
        "--each", help="A separate limit for each chat or workspace, instead of one limit for all.", show_default=False
    ),
]
Burst = Annotated[
    int | None,
    typer.Option(
        "--burst", min=1, max=MOST, help="How many follow-ups may be sent at once.", show_default="one second's worth"
    ),
]


@app.callback()
def group() -> None:
    """Limit the follow-ups sent per second: from a workspace, on a channel, into each chat, or in total.

    All matching limits apply. Follow-ups that exceed a limit wait, and the earliest due are sent first. Waiting uses up
    no attempt, and a waiting follow-up can be cancelled or rescheduled. A follow-up that waits longer than
    FOLLOWUPS_MAX_LATENESS or its messaging window fails as too_late or window_closed.
    """


@app.command(
    "set",
    epilog=examples(
        "followups limit set 50/s --workspace acme",
        "followups limit set 20/min --workspace acme --channel whatsapp --burst 5",
        "followups limit set 1000/h --each workspace",
        "followups limit set 1/min --each chat",
    ),
)
def set_(
    rate: Rate,
    *,
    workspace: Workspace = None,
    channel: OneChannel = None,
    each: Apart = None,
    burst: Burst = None,
    json: Json = False,
) -> None:
    """Set a rate limit, or change the limit with the same options. Workers apply the new limit within seconds."""
    at_once = burst or default_burst(rate)
    with connection.engine() as engine:
        with Session(engine) as session, session.begin():
            scope = _scope(session, workspace, channel, each)
            administration.set_limit(session, connection.actor(), scope, rate, at_once)
        with engine.connect() as opened:
            standing = rate_limits.standing(opened)
    if json:
        print_json([limit_document(limit) for limit in standing])
    else:
        print_line(f"{_named(workspace, channel, each)}: {rate_in_words(rate)}, {at_once:,} at once.")


@app.command(
    epilog=examples("followups limit clear --workspace acme", "followups limit clear --each chat --channel whatsapp")
)
def clear(*, workspace: Workspace = None, channel: OneChannel = None, each: Apart = None, json: Json = False) -> None:
    """Remove the limit with exactly these options. Follow-ups that the limit deferred are sent within seconds."""
    with connection.engine() as engine:
        with Session(engine) as session, session.begin():
            was_set = administration.clear_limit(session, connection.actor(), _scope(session, workspace, channel, each))
        with engine.connect() as opened:
            standing = rate_limits.standing(opened)
    if json:
        print_json({"cleared": was_set, "limits": [limit_document(limit) for limit in standing]})
    else:
        print_line(f"{_named(workspace, channel, each)}: {'no limit any more' if was_set else 'there was no limit'}.")


@app.command("list", epilog=examples("followups limit list", "followups limit list --json"))
def list_(*, json: Json = False) -> None:
    """List the rate limits, starting with the widest scope."""
    with connection.session() as session:
        standing = rate_limits.standing(session.connection())
    if json:
        print_json([limit_document(limit) for limit in standing])
        return
    print_table(
        ("WORKSPACE", "CHANNEL", "EACH", "RATE", "BURST", "SINCE"), _rows(standing), empty="There are no rate limits."
    )


PendingQuota = Annotated[
    int | None,
    typer.Option("--pending", parser=parse_quota, metavar="N", show_default=False, help="The maximum number, or none."),
]
ChatQuota = Annotated[
    int | None,
    typer.Option("--chats", parser=parse_quota, metavar="N", show_default=False, help="The maximum number, or none."),
]


@app.command(
    epilog=examples(
        "followups limit quota --workspace acme --pending 100000 --chats 20000",
        "followups limit quota --workspace acme --chats none",
        "followups limit quota --json",
    )
)
def quota(
    *, workspace: Workspace = None, pending: PendingQuota = None, chats: ChatQuota = None, json: Json = False
) -> None:
    """Show or set the quotas: how many pending follow-ups and chats a workspace may have.

    A request that would exceed a quota is refused with 422, and `followups.schedule` raises QuotaExceededError.
    Lowering a quota deletes nothing that already exists. By default there are no quotas.
    """
    with connection.session() as session:
        workspace_id = workspace_id_of(session, workspace)
        for kind, most in ((Kind.PENDING, pending), (Kind.CHATS, chats)):
            if most is None:
                continue
            if workspace_id is None:
                message = "is needed to set a quota."
                raise typer.BadParameter(message, param_hint="--workspace")
            administration.set_quota(session, user_of_process(Way.COMMAND), workspace_id, kind, most)
        found = quotas.standing(session.connection(), workspace_id)
    if json:
        print_json([quota_document(each) for each in found])
        return
    rows = [(each.workspace, quotas.NAMES[each.kind], f"{each.most:,}", f"{each.used:,}") for each in found]
    print_table(("WORKSPACE", "OF", "AT MOST", "NOW"), rows, empty="There is no quota.")


def _scope(session: Session, workspace: str | None, channel: Channel | None, each: Each | None) -> LimitScope:
    if workspace is not None and each is Each.WORKSPACE:
        message = "--each workspace cannot be combined with --workspace, which selects one workspace."
        raise typer.BadParameter(message)
    return LimitScope(workspace_id_of(session, workspace), channel and channel.value, each.value if each else "all")


def _rows(standing: Sequence[Limit]) -> Iterator[tuple[str, ...]]:
    for limit in standing:
        each = "-" if limit.per == "all" else limit.per
        place = (limit.workspace or "all", limit.channel or "all", each)
        yield (*place, rate_in_words(limit.rate), f"{limit.burst:,}", readable(limit.since))


def _named(workspace: str | None, channel: str | None, each: Each | None) -> str:
    named = str(limited(workspace, channel, each.value if each else "all"))
    return f"{named[0].upper()}{named[1:]}"
