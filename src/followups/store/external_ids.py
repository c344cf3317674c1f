"""External ids of chats, for a transport that requires exclusive external ids.

A request of such a transport names only the external id, not the workspace (`Settings.exclusive_external_ids`). If
chats of two workspaces had the same external id, each workspace could write into the other's chat. `take` therefore
refuses an external id that another workspace uses. Under any other transport, several workspaces may use the same
external id, and their chats keep it when the transport changes. `shared` therefore finds such chats before each
attempt, and nothing is sent into them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import text

from followups.errors import ExternalChatTakenError
from followups.statements import Rule, Statement

if TYPE_CHECKING:
    from collections.abc import Collection
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.statements import Steps

# If two transactions reserve the same external id, the second waits for the first. The second transaction then sees
# what the first has committed.
_LOCK_EXTERNAL_ID = Statement("SELECT pg_advisory_xact_lock(hashtextextended(:external_id, 0))")
_TAKEN = Statement("""
    SELECT id FROM chats
     WHERE external_id = :external_id AND workspace_id <> :workspace_id AND removed_at IS NULL LIMIT 1
""")


@Rule
def take(workspace_id: UUID, external_id: str) -> Steps[None]:
    """Reserve an external id for the workspace until the transaction ends.

    The caller then creates or updates the chat with this external id. Raises `ExternalChatTakenError` if another
    workspace has a chat with this external id, unless that chat was removed.
    """
    yield _LOCK_EXTERNAL_ID(external_id=external_id)
    if (yield _TAKEN(external_id=external_id, workspace_id=workspace_id)):
        raise ExternalChatTakenError


class OwnedId(NamedTuple):
    """An external id and the workspace of a chat that has it."""

    workspace_id: UUID
    external_id: str


# OFFSET 0 keeps PostgreSQL from turning EXISTS into a join. If the plan was made while the table was small, the join
# would read the whole index for each batch.
_SHARED = text("""
    SELECT own.workspace_id, own.external_id
      FROM unnest(CAST(:workspace_ids AS uuid[]), CAST(:external_ids AS text[])) AS own(workspace_id, external_id)
     WHERE EXISTS (SELECT FROM chats c
                    WHERE c.external_id = own.external_id AND c.workspace_id <> own.workspace_id
                      AND c.removed_at IS NULL OFFSET 0)
""")


def shared(connection: Connection, owned: Collection[OwnedId]) -> set[OwnedId]:
    """Return those external ids that a chat of another workspace also has, unless that chat was removed."""
    parameters = {
        "workspace_ids": [one.workspace_id for one in owned],
        "external_ids": [one.external_id for one in owned],
    }
    return {OwnedId(*row) for row in connection.execute(_SHARED, parameters)}


class SharingChat(NamedTuple):
    """A chat whose room is shared, and the name of the chat's workspace."""

    room: str
    chat_id: UUID
    workspace: str


# The innermost query reads only the index of external ids. It returns few of them, because most occur once. Only Matrix
# room ids start with "!". The transport rejects all other external ids, so they are not checked.
_SHARING = text("""
    WITH shared AS MATERIALIZED (
        SELECT repeated.external_id
          FROM (SELECT external_id FROM chats
                 WHERE external_id LIKE '!%'
                 GROUP BY external_id HAVING count(*) > 1) AS repeated
         WHERE (SELECT count(*)
                  FROM (SELECT DISTINCT c.workspace_id FROM chats c
                         WHERE c.external_id = repeated.external_id AND c.removed_at IS NULL LIMIT 2) AS owners) > 1
         ORDER BY repeated.external_id LIMIT :most
    )
    SELECT shared.external_id, chat.id, w.name
      FROM shared
     CROSS JOIN LATERAL (
         SELECT DISTINCT ON (c.workspace_id) c.workspace_id, c.id FROM chats c
          WHERE c.external_id = shared.external_id AND c.removed_at IS NULL
          ORDER BY c.workspace_id, c.id LIMIT :most
     ) chat
      JOIN workspaces w ON w.id = chat.workspace_id
     ORDER BY shared.external_id, w.name
""")


def sharing(connection: Connection, most: int) -> list[SharingChat]:
    """Return chats of different workspaces that share a Matrix room.

    The result has at most ``most`` rooms, and for each room one chat of each of at most ``most`` workspaces.
    """
    return [SharingChat(*row) for row in connection.execute(_SHARING, {"most": most})]
