"""The workspace settings, the audit log and the system page."""

from __future__ import annotations

import re
from datetime import timedelta
from html import unescape
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text

from console.person import Person, heading, words
from followups.console.pages import settings
from web import FOLLOW_UPS, key_of, served

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx
    from sqlalchemy import Engine

    from followups.settings import Settings
    from world import World

HOUR = timedelta(hours=1)


def section(page: httpx.Response, name: str) -> str:
    """Return the text of a section of the settings page."""
    part = page.text.partition(f'id="{name}"')[2].partition("</section>")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", part).split())


def test_a_key_is_shown_once_and_revoked_after_a_confirmation(person: Callable[..., Person], own: World) -> None:
    """A new key is shown once, works, and can be revoked after a confirmation.

    Only a hash of the key is stored.
    """
    one = person("admin", own)
    page = one.get("/settings")
    assert heading(page) == "Workspace settings"
    made = one.submit(page, "/settings/keys", name="website", expires="90")
    found = re.search(r'<code class="key" id="new-key">(fup_[\w-]+)</code>', made.text)
    assert found
    key = found[1]
    assert key not in one.get("/settings").text
    assert one.client.get(FOLLOW_UPS, headers={"authorization": key}).status_code == 200
    listed = one.get("/settings")
    assert "website" in section(listed, "api-keys")
    assert "console, test admin" in section(listed, "api-keys")
    place = re.search(r'action="/console(/settings/keys/[\w-]+)"', listed.text)
    assert place
    asked = one.get(place[1])
    assert heading(asked) == "Revoke key"
    assert "The key was last used" in words(asked)
    assert one.client.get(FOLLOW_UPS, headers={"authorization": key}).status_code == 200
    assert one.submit(asked, f"{place[1]}/revoke").status_code == 303
    assert one.client.get(FOLLOW_UPS, headers={"authorization": key}).status_code == 401
    assert "revoked" in section(one.get("/settings"), "api-keys")
    actions = "SELECT string_agg(action, ' ' ORDER BY at) FROM audit_events WHERE way = 'console' AND workspace_id"
    assert own.scalar(f"{actions} = '{own.workspace_id}'") == "api_key.created api_key.revoked"


def test_another_workspaces_key_and_session_are_not_found(
    person: Callable[..., Person], own: World, foreign: World
) -> None:
    """A key or session that belongs to another workspace cannot be shown, revoked or ended."""
    key_id, _ = key_of(foreign)
    other = person("viewer", foreign)
    session_id = foreign.scalar(f"SELECT id FROM console_sessions WHERE workspace_id = '{foreign.workspace_id}'")  # noqa: S608 - a test
    one = person("admin", own)
    assert one.get(f"/settings/keys/{key_id}").status_code == 404
    assert one.post(f"/settings/keys/{key_id}/revoke").status_code == 404
    assert one.post(f"/settings/sessions/{session_id}/end").status_code == 404
    assert one.post("/settings/keys", name="x", workspace=str(foreign.workspace_id)).status_code == 200
    assert foreign.scalar(f"SELECT count(*) FROM api_keys WHERE workspace_id = '{foreign.workspace_id}'") == 1  # noqa: S608 - a test
    assert other.get("/").status_code == 200


def test_a_session_is_ended_by_an_admin(person: Callable[..., Person], own: World) -> None:
    """An admin can end another person's session with immediate effect."""
    other, one = person("viewer", own), person("admin", own)
    session_id = own.scalar(
        f"SELECT id FROM console_sessions WHERE role = 'viewer' AND workspace_id = '{own.workspace_id}'"  # noqa: S608 - a test
    )
    assert one.submit(one.get("/settings"), f"/settings/sessions/{session_id}/end").status_code == 303
    assert other.get("/").status_code == 303


def test_sending_hours_are_previewed_saved_and_cleared(person: Callable[..., Person], own: World) -> None:
    """A preview of sending hours saves nothing. After an error, the form keeps the user's input."""
    one = person("admin", own)
    fields = {"time_zone": "America/Sao_Paulo", "from": "08:00", "to": "18:00", "day": ["mon", "tue"]}
    seen = one.post("/settings/hours", do="preview", **fields)
    assert "Not saved yet" in words(seen)
    assert re.search(r"Monday 20\d\d-\d\d-\d\d 08:00 – Monday 20\d\d-\d\d-\d\d 18:00", words(seen))  # noqa: RUF001 - from, to
    assert "at every hour" in section(one.get("/settings"), "sending-hours")
    assert one.post("/settings/hours", do="save", **fields).status_code == 303
    assert "08:00 to 18:00, mon-tue, America/Sao_Paulo" in section(one.get("/settings"), "sending-hours")
    for wrong in ({"time_zone": "Mars/Base"}, {"from": "soon"}, {"day": []}):
        told = one.post("/settings/hours", do="save", **fields | wrong)
        assert told.status_code == 422
        assert str(wrong.get("time_zone", "18:00")) in told.text
    assert one.post("/settings/hours", do="always").status_code == 303
    assert "at every hour" in section(one.get("/settings"), "sending-hours")


def test_rate_limits_are_set_and_removed(person: Callable[..., Person], own: World) -> None:
    """Rate limits can be set for the workspace, for one of its channels, or for each of its chats."""
    one = person("admin", own)
    fields = {"channel": "whatsapp", "per": "chat", "rate": "20", "per_unit": "min", "burst": "5"}
    assert one.submit(one.get("/settings"), "/settings/limits", **fields).status_code == 303
    page = one.get("/settings")
    assert "20/min, 5 at once" in section(page, "rate-limits")
    assert "whatsapp, each chat" in section(page, "rate-limits")
    for wrong in (
        {"rate": "0"},
        {"rate": "nan"},
        {"rate": "x"},
        {"per": "workspace"},
        {"channel": "x"},
        {"burst": "0"},
    ):
        assert one.post("/settings/limits", **fields | wrong).status_code == 422
    assert one.submit(page, "/settings/limits/clear").status_code == 303
    assert "There is none." in section(one.get("/settings"), "rate-limits")


def test_a_workspace_is_paused_and_resumed(person: Callable[..., Person], own: World) -> None:
    """The console shows how many follow-ups a pause holds, and resuming releases them."""
    one = person("admin", own)
    assert one.submit(one.get("/settings"), "/settings/pauses", channel="").status_code == 303
    pause_id = own.scalar(f"SELECT id FROM pauses WHERE workspace_id = '{own.workspace_id}'")  # noqa: S608 - a test
    held = own.follow_up(due=-HOUR, pause_id=pause_id)
    page = one.get("/settings")
    assert "1 held" in section(page, "pauses")
    assert "1 held" in words(one.get("/"))
    assert one.submit(page, "/settings/pauses/resume").status_code == 303
    assert own.row(held).pause_id is None
    assert "Nothing is paused." in section(one.get("/settings"), "pauses")


def test_operators_choose_a_workspace_or_pause_a_channel_of_all(person: Callable[..., Person], own: World) -> None:
    """An operator can pause a channel in all workspaces; an admin cannot end this pause."""
    operator, admin = person("operator"), person("admin", own)
    everywhere = operator.get("/settings")
    assert "API keys" not in words(everywhere)
    assert operator.post("/settings/pauses").status_code == 422
    assert operator.post("/settings/keys", name="x").status_code == 422
    assert operator.get("/settings", workspace="nothing").status_code == 404
    assert operator.submit(everywhere, "/settings/pauses", channel="matrix").status_code == 303
    assert "all workspaces, matrix" in section(admin.get("/settings"), "pauses")
    admin.post("/settings/pauses/resume", channel="matrix")
    assert "all workspaces, matrix" in section(admin.get("/settings"), "pauses")
    assert operator.post("/settings/pauses/resume", channel="matrix").status_code == 303
    assert "matrix" not in section(admin.get("/settings"), "pauses").partition("Pause ")[0].partition("Channel")[0]
    chosen = operator.get("/settings", workspace=str(own.workspace_id))
    made = operator.submit(chosen, "/settings/keys", name="by an operator")
    assert "shown only once" in words(made)
    assert own.scalar(f"SELECT count(*) FROM api_keys WHERE workspace_id = '{own.workspace_id}'") == 1  # noqa: S608 - a test


def test_the_audit_log_is_filtered_and_paged(person: Callable[..., Person], own: World, foreign: World) -> None:
    """The audit log shows who did what and when, can be filtered by action, and has pages."""
    name = f"key {uuid4()}"
    person("admin", own).post("/settings/keys", name=name)
    person("admin", foreign).post("/settings/pauses")
    page = person("admin", own).get("/audit")
    assert heading(page) == "Audit log"
    assert "api_key.created" in page.text.partition("<tbody>")[2]
    assert "pause.begun" not in page.text.partition("<tbody>")[2]
    assert "test admin" in words(page)
    only = person("operator").get("/audit", action="pause.begun", workspace=str(foreign.workspace_id))
    assert only.text.count("<tr>") == 2
    assert person("admin", own).get("/audit", action="x").status_code == 422
    own.sql(
        "INSERT INTO audit_events (way, actor, workspace_id, action)"
        " SELECT 'command', 'root', :id, 'pause.begun' FROM generate_series(1, 60)",
        id=own.workspace_id,
    )
    one = person("admin", own)
    first = one.get("/audit", action="pause.begun")
    older = re.search(r'href="/console(/audit\?[^"]*)" rel="next"', first.text)
    assert older
    assert [page.text.count("pause.begun<") for page in (first, one.get(older[1].replace("&amp;", "&")))] == [51, 11]


@pytest.mark.parametrize("path", ["/system"])
def test_the_system_page_shows_the_doctors_findings(path: str, person: Callable[..., Person], own: World) -> None:
    """Only operators see the system page."""
    page = person("operator").get(path)
    assert heading(page) == "System"
    said = words(page)
    for name in ("migrations", "tick", "breaker", "queues"):
        assert name in said
    assert person("admin", own).get(path).status_code == 403


def test_the_system_page_shows_shared_rooms(
    console_settings: Settings, console_engine: Engine, own: World, foreign: World
) -> None:
    """Under the transport ``matrix``, the system page names the rooms that several workspaces share."""
    room = f"!<b>{uuid4()}"
    chats = [each.chat(external_id=room) for each in (own, foreign)]
    with served(console_settings.model_copy(update={"transport": "matrix"})) as (host, port):
        operator = Person(f"http://{host}:{port}", console_engine).signed_in("operator", None)
        page = operator.get("/system")
        operator.client.close()
    said = unescape(words(page))
    assert f"{room} (chat " in said
    assert all(str(chat) in said for chat in chats)
    assert "followups chat delete ID --workspace NAME" in said
    assert room not in page.text


def test_the_release_of_held_follow_ups_is_bounded(
    person: Callable[..., Person], own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If releasing held follow-ups takes too long, the page says that saving again releases more."""
    monkeypatch.setattr(settings, "RELEASE_LIMIT", timedelta(0))
    one_id = own.follow_up(
        held_until=text("now() + interval '1 day'"), next_attempt_at=text("now() + interval '1 day'")
    )
    one = person("admin", own)
    fields = {"time_zone": "UTC", "from": "00:00", "to": "00:00", "day": ["mon"], "do": "save"}
    answer = one.post("/settings/hours", **fields)
    assert "save again to release more" in words(answer)
    assert own.row(one_id).held_until is None  # the first batch
    monkeypatch.undo()
    assert one.post("/settings/hours", **fields).status_code == 303
