"""Workspaces and their API keys on PostgreSQL."""

from __future__ import annotations

from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import event, func, text, update
from sqlalchemy.orm import Session

from followups.errors import ApiKeyNotFoundError, InvalidRequestError, WorkspaceNotFoundError
from followups.models import ApiKey
from followups.store import api_keys, workspaces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """Return a session that is never committed."""
    with Session(engine) as session:
        yield session


class TestWorkspaces:
    """Workspaces and their names."""

    def test_created_once(self, session: Session) -> None:
        """If a workspace with this name exists, it stays unchanged; spaces around names are ignored."""
        first, new = workspaces.create(session, " Acme ")
        again, new_again = workspaces.create(session, "Acme")
        assert (first.name, first.id, new, new_again) == ("Acme", again.id, True, False)
        assert workspaces.find(session, "Acme ").id == first.id
        assert [each.name for each in workspaces.everything(session)] == ["Acme"]

    @pytest.mark.parametrize("name", ["", " ", "x" * 201, "a\x00b", "a\nb", "\ud800"])
    def test_bad_name(self, session: Session, name: str) -> None:
        """The name of a workspace has 1 to 200 printable characters."""
        with pytest.raises(InvalidRequestError) as caught:
            workspaces.create(session, name)
        assert caught.value.field == "name"

    @pytest.mark.parametrize("name", ["Acme", "", "a\x00b", "\ud800"])
    def test_not_found(self, session: Session, name: str) -> None:
        """The look-up of an unknown workspace name raises an error, even if the name is invalid."""
        with pytest.raises(WorkspaceNotFoundError):
            workspaces.find(session, name)


class TestApiKeys:
    """API keys are shown once and stored as a hash."""

    def test_created_key(self, session: Session) -> None:
        """An API key is recognisable and has 256 random bits; only hash and prefix are stored."""
        workspace, _ = workspaces.create(session, "Acme")
        row, key = api_keys.create(session, workspace.id, "laptop")
        other = api_keys.create(session, workspace.id)[1]
        assert key != other
        assert key.startswith("fup_")
        assert len(key) == len("fup_") + 43 + 6
        assert (row.prefix, row.key_hash, row.name) == (key[:12], sha256(key.encode()).digest(), "laptop")
        stored = session.execute(text("SELECT k::text FROM api_keys k")).scalars().all()
        assert not any(key[12:] in each for each in stored)
        listed = [(each.name, name) for each, name in api_keys.everything(session)]
        assert sorted(listed) == [("", "Acme"), ("laptop", "Acme")]

    def test_bad_name(self, session: Session) -> None:
        """An API key name that the database cannot store is rejected."""
        workspace, _ = workspaces.create(session, "Acme")
        with pytest.raises(InvalidRequestError):
            api_keys.create(session, workspace.id, "a\x00")

    def test_authenticate(self, session: Session) -> None:
        """An API key identifies its workspace; any other string identifies no workspace."""
        workspace, _ = workspaces.create(session, "Acme")
        row, key = api_keys.create(session, workspace.id)
        found = api_keys.authenticate(session, key)
        assert found is not None
        assert (found.key_id, found.workspace_id) == (row.id, workspace.id)
        for wrong in ("", "fup_", key[:-1], f"{key}x", key.upper(), f"fup_{'A' * 43}", f"fup_{'é' * 43}", "\x00" * 47):
            assert api_keys.authenticate(session, wrong) is None

    def test_a_mistyped_key_needs_no_query(self, session: Session, engine: Engine) -> None:
        """A mistyped key is recognised by its checksum without a query; keys without a checksum stay valid."""
        workspace, _ = workspaces.create(session, "Acme")
        row, key = api_keys.create(session, workspace.id)
        statements: list[str] = []
        event.listen(engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
        for place in range(len(key)):
            mistyped = key[:place] + ("B" if key[place] == "A" else "A") + key[place + 1 :]
            assert api_keys.authenticate(session, mistyped) is None
        assert statements == []
        old = f"fup_{'A' * 43}"
        session.execute(update(ApiKey).values(key_hash=sha256(old.encode()).digest()))
        found = api_keys.authenticate(session, old)
        assert found is not None
        assert found.key_id == row.id

    def test_expiry(self, session: Session) -> None:
        """An expired API key is rejected; a new key's lifetime must be positive and limited."""
        workspace, _ = workspaces.create(session, "Acme")
        row, key = api_keys.create(session, workspace.id, expires=timedelta(days=90))
        assert row.expires_at == row.created_at + timedelta(days=90)
        assert api_keys.authenticate(session, key) is not None
        session.execute(update(ApiKey).values(expires_at=func.now()))
        assert api_keys.authenticate(session, key) is None
        for wrong in (timedelta(0), timedelta(days=-1), timedelta(days=36_501)):
            with pytest.raises(InvalidRequestError) as caught:
                api_keys.create(session, workspace.id, expires=wrong)
            assert caught.value.field == "expires"

    def test_revoke(self, session: Session) -> None:
        """A revoked API key is rejected; revoking it again has no effect."""
        workspace, _ = workspaces.create(session, "Acme")
        row, key = api_keys.create(session, workspace.id)
        revoked_at = api_keys.revoke(session, row.id).revoked_at
        assert revoked_at is not None
        assert api_keys.revoke(session, row.id).revoked_at == revoked_at
        assert api_keys.authenticate(session, key) is None
        with pytest.raises(ApiKeyNotFoundError):
            api_keys.revoke(session, uuid4())

    def test_use_is_recorded_once_a_minute(self, session: Session, engine: Engine) -> None:
        """A key's use is recorded at most once a minute; recordings do not wait for each other."""
        workspace, _ = workspaces.create(session, "Acme")
        row, _ = api_keys.create(session, workspace.id)
        session.commit()
        assert api_keys.record_use(session, row.id)
        with Session(engine) as other:
            assert not api_keys.record_use(other, row.id)
        session.commit()
        assert not api_keys.record_use(session, row.id)
        session.execute(text("UPDATE api_keys SET last_used_at = now() - interval '61 s'"))
        assert api_keys.record_use(session, row.id)
