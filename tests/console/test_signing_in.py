"""Sign-in with a key or a link, the end of sessions, and the checks of each request."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from console.person import Person, heading, make_link, words
from followups.api import gate
from followups.console import access, application
from followups.settings import load_settings
from web import FOLLOW_UPS, Api, key_of, served

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx
    from starlette.types import Scope

    from followups.console.visit import Visit
    from followups.settings import Settings
    from world import World


def test_an_api_key_gives_an_agent_of_its_workspace_until_it_is_revoked(
    person: Callable[..., Person], own: World
) -> None:
    """A session started with an API key ends immediately when the key is revoked."""
    key_id, key = key_of(own)
    one = person()
    page = one.get("/login")
    assert heading(page) == "Sign in"
    assert ">API key<" in page.text
    answer = one.submit(page, "/login", secret=f" {key} ")
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/")
    shown = one.get("/")
    assert heading(shown) == "Overview"
    assert "agent" in shown.text
    own.sql("UPDATE api_keys SET revoked_at = now() WHERE id = :id", id=key_id)
    assert one.get("/").status_code == 303


def test_a_session_is_a_random_token_of_which_only_the_hash_is_stored(
    person: Callable[..., Person], own: World
) -> None:
    """The session cookie is HttpOnly and SameSite=Lax; over HTTPS, it is also Secure and has a prefix."""
    one = person()
    answer = one.post("/login", secret=make_link(own.engine, "agent", own.workspace_id))
    cookie = answer.headers["set-cookie"]
    token = cookie.partition("=")[2].partition(";")[0]
    assert cookie.startswith("followups=")
    assert len(token) == 43
    assert {"HttpOnly", "SameSite=lax", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    found = own.scalar(f"SELECT count(*) FROM console_sessions WHERE token_hash = '{token}'::bytea")  # noqa: S608 - a test
    assert found == 0


def test_a_link_works_once(person: Callable[..., Person], own: World) -> None:
    """Used links, expired links and unknown tokens are refused with the same response."""
    token = make_link(own.engine, "viewer", own.workspace_id)
    assert person().post("/login", secret=f"http://x/console/login#token={token}").status_code == 303
    expired = make_link(own.engine, "viewer", own.workspace_id)
    own.sql("UPDATE console_links SET expires_at = now() - interval '1 s' WHERE used_at IS NULL")
    for secret in (token, expired, "fcl_" + "A" * 43, "", "x" * 300, "fup_ü"):
        answer = person().post("/login", secret=secret)
        assert answer.status_code == 401
        assert "neither a valid API key" in words(answer)
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("column", ["expires_at", "seen_at"])
def test_a_session_has_a_maximum_age_and_idle_time(column: str, person: Callable[..., Person], own: World) -> None:
    """A session has a maximum age and a maximum idle time."""
    one = person("viewer", own)
    assert one.get("/").status_code == 200
    own.sql(
        f"UPDATE console_sessions SET {column} = now() - interval '9 hours' WHERE workspace_id = :id",  # noqa: S608 - a test
        id=own.workspace_id,
    )
    assert one.get("/").status_code == 303


def test_signing_out_ends_the_session_itself(person: Callable[..., Person], own: World) -> None:
    """After a person signs out, a copy of the session cookie is invalid."""
    one = person("viewer", own)
    kept = dict(one.client.cookies)
    assert one.post("/logout").status_code == 303
    one.client.cookies.update(kept)
    assert one.get("/").status_code == 303


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 303),
        ({}, 303),
    ],
)
def test_a_change_from_another_origin_is_refused(
    headers: dict[str, str], status: int, person: Callable[..., Person], own: World
) -> None:
    """If a change comes from another origin, the error names the setting to check."""
    one = person("viewer", own)
    if headers == {"origin": ""}:
        del one.client.headers["origin"]
        headers = {}
    answer = one.client.post("/console/logout", headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert "FOLLOWUPS_PUBLIC_URL" in words(answer)
        assert "evil" not in answer.text
        assert one.get("/").status_code == 200


def test_failed_attempts_are_limited(
    person: Callable[..., Person], own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After too many failed sign-ins, wrong secrets return 429, but a valid link still works."""
    monkeypatch.setattr(access, "MAX_BY_CLIENT", 2)
    limited = load_settings(**settings_of(person, own))
    with served(limited) as (host, port):
        one = Person(f"http://{host}:{port}", own.engine)
        for _ in range(2):
            assert one.post("/login", secret="x" * 40).status_code == 401
        refused = one.post("/login", secret="x" * 40)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert one.post("/login", secret=make_link(own.engine, "viewer", own.workspace_id)).status_code == 303
        one.client.close()


def settings_of(_person: object, own: World) -> dict[str, str]:
    """Return settings for another server on the same database."""
    url = own.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    return {"database_url": url, "broker_url": "redis://127.0.0.1:9/0"}


def test_every_answer_has_the_security_headers(person: Callable[..., Person], own: World) -> None:
    """Responses allow no inline scripts, no other origins and no caching.

    Only static files, which have hashed names, are cached indefinitely.
    """
    one = person("operator")
    for path in ("/", "/login", "/nothing", "/static/nothing"):
        answer = one.get(path)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert not re.search(r"<script(?! type=\"module\" src=)|<style| style=| on\w+=", answer.text)
    sheet = re.search(r'href="(/console/static/console-\w{12}\.css)"', one.get("/").text)
    assert sheet
    kept = one.client.get(sheet[1])
    assert kept.status_code == 200
    assert "immutable" in kept.headers["cache-control"]
    assert kept.headers["content-type"].startswith("text/css")
    assert own.workspace_id


def test_the_api_never_reads_the_cookie(person: Callable[..., Person], own: World) -> None:
    """The API ignores the session cookie, and the console ignores an API key in a header."""
    one = person("agent", own)
    assert one.client.get("/api/v1/chat-message-follow-ups").status_code == 401
    _, key = key_of(own)
    assert person().client.get("/console/", headers={"authorization": key}).status_code == 303


def test_a_body_is_bounded(person: Callable[..., Person], own: World) -> None:
    """Without a session, bodies must be small; with a session, any message fits."""
    assert person().post("/login", secret="x" * 20_000).status_code == 413
    assert person("agent", own).post("/nothing", message="x" * 200_000).status_code == 404
    assert person("agent", own).post("/nothing", message="x" * 1_100_000).status_code == 413
    many = "&".join(f"a{n}=1" for n in range(400))
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert person("agent", own).client.post("/console/bulk/preview", content=many, headers=form).status_code == 422


def test_a_form_is_parsed_after_origin_session_and_role(
    person: Callable[..., Person], own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a session, a form of more than 1 KiB is not parsed.

    With a session, a form with a message of 65,536 four-byte characters is accepted.
    """
    parsed: list[bytes] = []
    real = application._parse  # noqa: SLF001 - what the test is about

    def spy(visit: Visit, scope: Scope, body: bytes) -> None:
        parsed.append(body)
        real(visit, scope, body)

    agent, viewer, stranger = person("agent", own), person("viewer", own), person()
    monkeypatch.setattr(application, "_parse", spy)
    assert stranger.post("/login", secret="x" * 1020).status_code == 413
    assert stranger.post("/follow-ups/new", message="x").status_code == 401
    assert viewer.post("/follow-ups/new", message="x").status_code == 403
    evil = {"origin": "https://evil.example"}
    assert agent.client.post("/console/follow-ups/new", data={"a": "b"}, headers=evil).status_code == 403
    assert parsed == []
    fields = {"chat": str(own.chat()), "message": "\U0001f642" * 65_536, "due": "2100-01-31T09:00", "do": "schedule"}
    assert agent.post("/follow-ups/new", **fields).status_code == 303


def test_console_and_api_have_separate_slots(
    person: Callable[..., Person], own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Console and API have separate slots: each serves requests while the other has none free."""
    one = person("agent", own)
    with monkeypatch.context() as patch:
        patch.setattr(gate, "MAX_CONSOLE_WAITING", 0)
        refused = one.get("/")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert one.client.get("/healthz").status_code == 200
    monkeypatch.setattr(gate, "MAX_WAITING", 0)
    assert one.client.get(FOLLOW_UPS, headers={"authorization": key_of(own)[1]}).status_code == 503
    for _ in range(40):  # each request releases its slot
        assert one.get("/").status_code == 200


def test_an_invalid_referer_is_ignored(person: Callable[..., Person]) -> None:
    """An invalid Referer is ignored, and the client is redirected to the sign-in page."""
    assert person().client.post("/console/bulk", headers={"referer": "http://["}).status_code == 401


@pytest.mark.parametrize("query", ["state=%ff", "&".join(f"a{n}=1" for n in range(400))])
def test_a_bad_query_is_refused(query: str, person: Callable[..., Person], own: World) -> None:
    """An invalid query string is refused; it is not treated as an empty filter."""
    assert person("agent", own).client.get(f"/console/follow-ups?{query}").status_code == 422


def test_a_head_of_the_stream_ends(person: Callable[..., Person], own: World) -> None:
    """A HEAD request for the event stream ends immediately."""
    assert person("agent", own).client.head("/console/stream", timeout=3).status_code < 500


@pytest.fixture(scope="module")
def behind_proxy(console_settings: Settings) -> object:
    """Serve the console with settings for an HTTPS proxy, a path prefix and a header that names people."""
    settings = console_settings.model_copy(
        update={
            "public_url": "https://chat.example/tools",
            "console_proxy_header": "x-forwarded-email",
            "console_proxy_addresses": "127.0.0.1/32",
            "console_proxy_role": "viewer",
        }
    )
    with served(settings) as (host, port):
        yield f"http://{host}:{port}"


def test_behind_a_proxy_addresses_have_the_prefix_and_the_cookie_is_secure(behind_proxy: str, own: World) -> None:
    """FOLLOWUPS_PUBLIC_URL determines links, cookies and origin checks."""
    one = Person(behind_proxy, own.engine)
    page = one.get("/login")
    assert 'action="/tools/console/login"' in page.text
    assert "/tools/console/static/console-" in page.text
    token = make_link(own.engine, "viewer", own.workspace_id)
    refused = one.post("/login", secret=token)
    assert refused.status_code == 403
    assert "https://chat.example" in words(refused)
    answer = one.client.post("/console/login", data={"secret": token}, headers={"origin": "https://chat.example"})
    assert answer.headers["location"] == "/tools/console/"
    assert answer.headers["set-cookie"].startswith("__Host-followups=")
    assert "Secure" in answer.headers["set-cookie"].split("; ")
    one.client.close()


def test_a_proxy_signs_people_in_by_a_header(behind_proxy: str, own: World) -> None:
    """When the proxy's header names another person, the previous person's session ends.

    The settings determine the role of a person signed in by the proxy.
    """
    one = Person(behind_proxy, own.engine)
    ann = one.client.get("/console/", headers={"x-forwarded-email": "ann@chat.example"})
    assert heading(ann) == "Overview"
    assert "ann@chat.example" in ann.text
    cookie = {"cookie": ann.headers["set-cookie"].partition(";")[0]}
    one.client.cookies.clear()
    assert one.client.get("/console/", headers=cookie | {"x-forwarded-email": "ann@chat.example"}).status_code == 200
    ben = one.client.get("/console/", headers=cookie | {"x-forwarded-email": "ben@chat.example"})
    assert "ben@chat.example" in ben.text
    assert "ann@chat.example" not in ben.text
    assert one.client.get("/console/", headers=cookie).status_code == 303
    # the session's role now differs from the configured role
    own.sql("UPDATE console_sessions SET role = 'operator' WHERE way = 'proxy'")
    lowered = one.client.get("/console/", headers={"cookie": _cookie_of(ben), "x-forwarded-email": "ben@chat.example"})
    assert "· viewer ·" in lowered.text
    one.client.close()


def _cookie_of(answer: httpx.Response) -> str:
    return answer.headers["set-cookie"].partition(";")[0]


def test_the_header_is_accepted_only_from_the_proxy(console_settings: Settings, own: World) -> None:
    """The proxy's header is ignored in requests that do not come from the proxy's address."""
    update = {
        "console_proxy_header": "x-forwarded-email",
        "console_proxy_addresses": "10.0.0.7",
        "console_proxy_role": "operator",
    }
    with served(console_settings.model_copy(update=update)) as (host, port):
        one = Person(f"http://{host}:{port}", own.engine)
        headers = {"x-forwarded-email": "ann@chat.example", "x-forwarded-for": "10.0.0.7"}
        assert one.client.get("/console/", headers=headers).status_code == 303
        one.client.close()


def test_a_disabled_console_answers_404(console_settings: Settings) -> None:
    """With FOLLOWUPS_CONSOLE=false, the console's paths return 404."""
    with served(console_settings.model_copy(update={"console": False})) as (host, port):
        one = Person(f"http://{host}:{port}", None)  # type: ignore[arg-type] # nothing is asked of the database
        assert one.get("/").status_code == 404
        assert one.client.get("/console").status_code == 404
        one.client.close()


def test_the_language_follows_the_browser_and_the_choice(person: Callable[..., Person], own: World) -> None:
    """The page uses the browser's language until the person chooses another one.

    After the person has chosen a language, the console shows the same page again.
    """
    one = person("viewer", own)
    one.client.headers["accept-language"] = "pt-BR,pt;q=0.9,en;q=0.8"
    page = one.get("/")
    assert '<html lang="pt-BR"' in page.text
    assert heading(page) == "Visão geral"
    back = one.post("/preferences", language="en", zone="America/Sao_Paulo", next="/")
    assert back.headers["location"] == "/console/"
    page = one.get("/")
    assert heading(page) == "Overview"
    assert "America/Sao_Paulo" in page.text
    assert one.post("/preferences", next="https://evil.example/").headers["location"] == "/console/"
    assert uuid4()


def test_the_api_creates_sign_in_links(console_url: str, person: Callable[..., Person], own: World) -> None:
    """A sign-in link from the API leads to the key's workspace, with the requested role.

    The session ends when the key is revoked.
    """
    api = Api(console_url, own)
    answer = api.post("/api/v1/console-links", {"role": "viewer", "expiresIn": "PT10M"})
    assert answer.status_code == 201, answer.text
    link = answer.json()
    assert link.keys() == {"url", "expiresAt"}
    assert link["url"].startswith(f"{console_url}/console/login#token=fcl_")
    one = person()
    assert one.post("/login", secret=link["url"]).status_code == 303
    assert str(own.workspace_id) in one.get("/").text
    own.sql("UPDATE api_keys SET revoked_at = now() WHERE id = :id", id=api.key_id)
    assert one.get("/").status_code == 303
    api.client.close()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"role": "admin"}, 422),
        ({"role": "operator"}, 422),
        ({}, 422),
        ({"role": "agent", "expiresIn": 1}, 422),
        ({"role": "agent", "expiresIn": "P8D"}, 422),
        ({"role": "agent", "chatId": str(uuid4())}, 404),
        ({"role": "agent", "expiresIn": 600}, 201),
        ({"role": "agent", "expiresIn": "600"}, 201),
    ],
)
def test_a_link_of_the_api_is_limited(body: dict[str, object], status: int, console_url: str, own: World) -> None:
    """A link always expires; it can be limited to one chat of the workspace."""
    api = Api(console_url, own)
    answer = api.post("/api/v1/console-links", body)
    assert answer.status_code == status, answer.text
    api.client.close()


def test_the_command_prints_only_the_link_on_stdout(
    console_settings: Settings, person: Callable[..., Person], own: World
) -> None:
    """The command prints a link for an operator; with --workspace, it prints a link for an admin.

    If the command line is invalid, no link is created.
    """

    def link(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "followups.cli", "console", "link", *arguments]
        environment = os.environ | console_settings.environment()
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)

    for arguments, role in (([], "operator"), (["--workspace", str(own.workspace_id)], "admin")):
        printed = link(*arguments)
        assert (printed.returncode, printed.stdout.count("\n")) == (0, 1)
        one = person()
        assert one.post("/login", secret=printed.stdout.strip()).status_code == 303
        assert f"· {role} ·" in one.get("/").text
    assert link("--role", "operator", "--workspace", str(own.workspace_id)).returncode == 2
    assert link("--workspace", "nothing").returncode == 2
    assert link("--expires", "30d").returncode == 2
    made = own.scalar("SELECT count(*) FROM audit_events WHERE action = 'console_link.created' AND way = 'command'")
    assert made >= 2
