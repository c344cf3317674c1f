"""The commands `migrate`, `workspace`, `api-key` and `openapi`."""

from __future__ import annotations

import json
import re
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url

from databases import OWNER, url_as
from followups.cli import connection, main
from followups.schema import downgrade, schema_versions

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from world import World

    RunCommand = Callable[..., Any]

NOBODY = "postgresql://me:secret@127.0.0.1:9/chats"  # the discard port, which refuses connections


class TestMigrate:
    """The command `followups migrate`."""

    def test_migrate_upgrades_to_the_newest_schema(
        self, run: RunCommand, database_url: str, engine: Engine, environment: pytest.MonkeyPatch
    ) -> None:
        """`migrate` upgrades to the newest schema and names it; running it again changes nothing."""
        downgrade(owner_url := url_as(database_url, OWNER), "base")
        environment.setenv("FOLLOWUPS_DATABASE_URL", owner_url)
        first = run("migrate")
        current, newest = schema_versions(engine)
        assert current == newest
        assert (first.code, first.stdout) == (0, f"The schema is {newest}; it was empty\n")
        again = run("migrate")
        assert (again.code, again.stdout) == (0, f"The schema is {newest}, unchanged\n")

    def test_a_role_without_the_right_to_migrate(self, run: RunCommand, database_url: str) -> None:
        """If the database role may not create tables, `migrate` fails and says which role to connect as."""
        downgrade(url_as(database_url, OWNER), "base")
        ran = run("migrate")
        assert ran.code == 1
        needed = "permission denied for schema public; connect as a role with this privilege (migrate and bench"
        assert needed in ran.stderr
        assert ran.stderr.count("\n") == 1

    def test_migrate_waits_for_an_unreachable_database(
        self,
        run: RunCommand,
        database_url: str,
        environment: pytest.MonkeyPatch,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        """If the database is unreachable, `migrate` reports that it is waiting."""
        socket = tmp_path_factory.mktemp("s") / "s"  # a short path, because a socket path is limited to 107 bytes
        url = make_url(database_url).set(query={"host": str(socket)})
        environment.setenv("FOLLOWUPS_DATABASE_URL", url.render_as_string(hide_password=False))
        appears = threading.Timer(0.5, socket.symlink_to, [make_url(database_url).query["host"]])
        appears.start()
        ran = run("migrate", "--wait", "20")
        appears.join()
        assert ran.code == 0
        assert "waiting up to 20 s" in ran.stderr

    def test_a_permanent_error_is_not_waited_for(
        self, run: RunCommand, database_url: str, environment: pytest.MonkeyPatch
    ) -> None:
        """If the server refuses connections for a permanent reason, `migrate` fails immediately."""
        url = make_url(database_url).set(database="nowhere")
        environment.setenv("FOLLOWUPS_DATABASE_URL", url.render_as_string(hide_password=False))
        ran = run("migrate")
        assert ran.code == 1
        assert 'database "nowhere" does not exist; start it, or correct FOLLOWUPS_DATABASE_URL' in ran.stderr
        assert "waiting" not in ran.stderr

    def test_a_database_that_stays_unreachable_is_an_error(
        self, run: RunCommand, environment: pytest.MonkeyPatch
    ) -> None:
        """If the database stays unreachable, `migrate` reports what it waits for and then fails."""
        environment.setenv("FOLLOWUPS_DATABASE_URL", NOBODY)
        ran = run("migrate", "--wait", "0.3")
        assert ran.code == 1
        assert ran.stderr == (
            "The database 'chats' at 127.0.0.1:9 cannot be reached (connection refused); waiting up to 0.3 s.\n"
            "followups: The database 'chats' at 127.0.0.1:9 cannot be reached: connection refused; start it, "
            "or correct FOLLOWUPS_DATABASE_URL.\n"
        )

    def test_a_newer_schema_is_left_alone(self, run: RunCommand, world: World) -> None:
        """If the schema is newer, `migrate` changes nothing and asks for a newer version of followups."""
        world.sql("UPDATE alembic_version SET version_num = '9999'")
        ran = run("migrate")
        assert ran.code == 1
        assert "9999, which this version does not know" in ran.stderr
        assert ran.stderr.count("\n") == 1

    def test_a_stale_lock_is_named(self, run: RunCommand, database_url: str) -> None:
        """If an abandoned lock blocks `migrate`, the wait is limited and the error names the lock's holder."""
        with psycopg.connect(database_url, application_name="left behind", autocommit=True) as connection:
            connection.execute("SELECT pg_advisory_lock(7381237527265899888)")
            pid = connection.info.backend_pid
            ran = run("migrate", "--wait", "0.5")
        assert ran.code == 1
        assert f"Another migration holds the lock: backend {pid} (left behind, idle for 0:00:0" in ran.stderr
        assert f"SELECT pg_terminate_backend({pid})" in ran.stderr
        assert ran.stderr.count("\n") == 1
        assert run("migrate").code == 0


class TestWorkspace:
    """The command `followups workspace`."""

    def test_creating_one_that_exists_changes_nothing(self, run: RunCommand) -> None:
        """If the workspace already exists, `workspace create` returns it unchanged."""
        created = run("workspace", "create", "acme", "--json").document
        assert created.keys() == {"id", "name", "createdAt"}
        assert run("workspace", "create", " acme ", "--json").document == created
        assert run("workspace", "list", "--json").document == [created | {"sendingHours": None}]

    def test_results_without_json(self, run: RunCommand) -> None:
        """Without --json, a result is a line, a list is a table, and remarks go to stderr."""
        assert run("workspace", "list").stderr.startswith("There is no workspace yet")
        created = run("workspace", "create", "acme")
        assert re.fullmatch(r"acme \([0-9a-f-]{36}\)\n", created.stdout)
        assert created.stderr == "Next: followups api-key create --workspace acme\n"
        assert "already exists" in run("workspace", "create", "acme").stdout
        headings = ["NAME", "ID", "CREATED", "SENDS"]
        assert run("workspace", "list").stdout.split()[:6] == [*headings, "acme", created.stdout[6:42]]

    def test_a_bad_name_is_wrong_usage(self, run: RunCommand) -> None:
        """An empty or overlong workspace name is a usage error."""
        for name in (" ", "x" * 201, "a\x00b"):
            ran = run("workspace", "create", name)
            assert (ran.code, ran.stdout) == (2, "")
            assert ran.stderr.startswith("followups: ")


class TestApiKey:
    """The command `followups api-key`."""

    def test_only_the_key_is_on_stdout(self, run: RunCommand) -> None:
        """`api-key create` prints nothing but the key on stdout, and each key is different."""
        run("workspace", "create", "acme")
        keys = [run("api-key", "create", "--workspace", "acme", "--name", "web").stdout for _ in range(2)]
        assert all(re.fullmatch(r"fup_[\w-]{49}\n", key) for key in keys)
        assert len(set(keys)) == 2
        document = run("api-key", "create", "--workspace", "acme", "--json").document
        assert re.fullmatch(r"fup_[\w-]{49}", document.pop("key"))
        assert document == run("api-key", "list", "--json").document[-1]

    def test_the_list_has_the_contract_s_fields_and_no_key(self, run: RunCommand) -> None:
        """`api-key list` shows each key's prefix, workspace and times, but never the complete key."""
        run("workspace", "create", "acme")
        key = run("api-key", "create", "--workspace", "acme", "--name", "web").stdout.strip()
        listed = run("api-key", "list", "--json")
        [entry] = listed.document
        assert list(entry) == ["id", "name", "prefix", "workspace", "createdAt", "lastUsedAt", "revokedAt"]
        assert (entry["name"], entry["workspace"], entry["prefix"]) == ("web", "acme", key[:12])
        assert (entry["lastUsedAt"], entry["revokedAt"]) == (None, None)
        assert key not in listed.stdout + run("api-key", "list").stdout

    def test_a_key_may_expire(self, run: RunCommand) -> None:
        """A key created with --expires is rejected after that time; without --expires, expiresAt is absent."""
        run("workspace", "create", "acme")
        ran = run("api-key", "create", "--workspace", "acme", "--expires", "90d")
        assert "The key expires at " in ran.stderr
        [entry] = run("api-key", "list", "--json").document
        created, expires = (datetime.fromisoformat(entry[name]) for name in ("createdAt", "expiresAt"))
        assert expires - created == timedelta(days=90)
        assert expires.strftime("%Y-%m-%d %H:%M:%SZ") in run("api-key", "list").stdout
        for wrong in ("soon", "0d", "101000d", "99999999999d"):
            assert run("api-key", "create", "--workspace", "acme", "--expires", wrong).code == 2

    def test_a_revoked_key_stays_revoked(self, run: RunCommand) -> None:
        """If an API key is already revoked, `api-key revoke` only prints the time of its revocation."""
        run("workspace", "create", "acme")
        run("api-key", "create", "--workspace", "acme")
        key_id = run("api-key", "list", "--json").document[0]["id"]
        first = run("api-key", "revoke", key_id)
        revoked = run("api-key", "list", "--json").document[0]["revokedAt"]
        assert first.code == 0
        assert revoked is not None
        assert run("api-key", "revoke", key_id).stdout == first.stdout
        assert run("api-key", "revoke", key_id, "--json").document["revokedAt"] == revoked
        assert run("api-key", "list", "--json").document[0]["revokedAt"] == revoked

    def test_an_unknown_name_is_an_error(self, run: RunCommand) -> None:
        """The usage error for an unknown workspace or key says how to list them."""
        ran = run("api-key", "create", "--workspace", "acme")
        assert (ran.code, ran.stdout) == (2, "")
        assert (
            ran.stderr == "followups: The workspace was not found; followups workspace list shows the existing ones.\n"
        )
        assert "followups api-key list shows" in run("api-key", "revoke", uuid4()).stderr


def test_the_openapi_document_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """`openapi` prints the OpenAPI document without requiring any settings."""
    assert main(["openapi"]) == 0
    shown, remarks = capsys.readouterr()
    assert json.loads(shown)["openapi"].startswith("3.1")
    assert not remarks


BERLIN = ("--time-zone", "Europe/Berlin", "--from", "08:00", "--to", "20:00")


class TestHours:
    """The command `followups workspace hours`."""

    @pytest.fixture(autouse=True)
    def _no_tick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Prevent the command from requesting a tick."""
        monkeypatch.setattr(connection, "ask_for_tick", lambda: None)

    def test_set_shown_and_cleared(self, run: RunCommand) -> None:
        """Sending hours can be set, listed and cleared; without options, the command shows them."""
        run("workspace", "create", "acme")
        assert run("workspace", "hours", "acme").stdout == "acme sends at every hour\n"
        ran = run("workspace", "hours", "acme", *BERLIN, "--days", "mon-fri")
        assert ran.stdout == "acme sends 08:00 to 20:00, mon-fri, Europe/Berlin\n"
        assert run("workspace", "hours", "acme").stdout == ran.stdout
        assert "08:00 to 20:00, mon-fri, Europe/Berlin" in run("workspace", "list").stdout
        document = {"timeZone": "Europe/Berlin", "from": "08:00", "to": "20:00"}
        [listed] = run("workspace", "list", "--json").document
        assert listed["sendingHours"] == document | {"days": ["mon", "tue", "wed", "thu", "fri"]}
        assert run("workspace", "hours", "acme", "--always", "--json").document["sendingHours"] is None
        assert "always" in run("workspace", "list").stdout

    def test_held_follow_ups_are_checked_again(self, run: RunCommand, world: World) -> None:
        """When sending hours change, follow-ups held by the old hours are checked again immediately."""
        name = str(world.workspace_id)
        later = datetime.now(UTC) + timedelta(hours=9)
        follow_up = world.follow_up(held_until=later, next_attempt_at=later)
        run("workspace", "hours", name, *BERLIN)
        row = world.row(follow_up)
        assert (row.held_until, row.next_attempt_at) == (None, None)

    @pytest.mark.parametrize(
        "options",
        [
            ("--time-zone", "Europe/Nowhere", "--from", "08:00", "--to", "20:00"),
            ("--time-zone", "Europe/Berlin", "--from", "8", "--to", "20:00"),
            ("--time-zone", "Europe/Berlin", "--from", "08:00", "--to", "24:30"),
            ("--time-zone", "Europe/Berlin", "--from", "08:00"),
            (*BERLIN, "--days", "montag"),
            (*BERLIN, "--always"),
            ("--days", "mon"),
        ],
    )
    def test_wrong_hours(self, run: RunCommand, options: tuple[str, ...]) -> None:
        """Sending hours with an invalid time zone, time or day are a usage error, and nothing is set."""
        run("workspace", "create", "acme")
        ran = run("workspace", "hours", "acme", *options)
        assert (ran.code, ran.stdout) == (2, "")
        assert ran.stderr.startswith("followups: ")
        assert ran.stderr.count("\n") == 1
        assert run("workspace", "hours", "acme").stdout == "acme sends at every hour\n"
        assert run("workspace", "hours", "nobody", *BERLIN).code == 2
