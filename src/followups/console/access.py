"""The authorization rules: what a session may do, by its role and its workspace. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID

    from followups.store.console_sessions import ValidSession


class Permission(StrEnum):
    """A permission that a console route requires."""

    PUBLIC = "public"
    """The permission of routes that need no session: sign-in and static files."""
    SEE = "see"
    CHANGE = "change"
    """The permission to schedule, change, cancel, send now and retry follow-ups."""
    SETTINGS = "settings"
    AUDIT = "audit"
    SYSTEM = "system"


_VIEWER = frozenset({Permission.SEE})
_AGENT = _VIEWER | {Permission.CHANGE}
_ADMIN = _AGENT | {Permission.SETTINGS, Permission.AUDIT}
_OPERATOR = _ADMIN | {Permission.SYSTEM}
ALLOWED = {"viewer": _VIEWER, "agent": _AGENT, "admin": _ADMIN, "operator": _OPERATOR}
"""The permissions of each role."""

WHOLE_WORKSPACE = frozenset({Permission.SETTINGS, Permission.AUDIT, Permission.SYSTEM})
"""Permissions that a session limited to one chat never has, regardless of its role."""


@dataclass(frozen=True, slots=True)
class Viewer:
    """A signed-in person with a valid session."""

    session: ValidSession

    def may(self, action: Permission) -> bool:
        """Return whether the viewer's role has the permission."""
        if action in WHOLE_WORKSPACE and self.session.chat_id is not None:
            return False
        return action is Permission.PUBLIC or action in ALLOWED[self.session.role]

    @property
    def workspace_id(self) -> UUID | None:
        """The workspace that the session is limited to, or None if it sees all workspaces."""
        return self.session.workspace_id

    @property
    def chat_id(self) -> UUID | None:
        """The chat that the session is limited to, or None if it may see all chats of its workspace."""
        return self.session.chat_id

    @property
    def sees_texts(self) -> bool:
        """Whether message texts are shown without a click, as they are only for members of the workspace."""
        return self.session.workspace_id is not None

    def sees(self, workspace_id: UUID, chat_id: UUID) -> bool:
        """Return whether this session may see a chat and everything in it."""
        return self.workspace_id in {None, workspace_id} and self.chat_id in {None, chat_id}
