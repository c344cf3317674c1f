"""The console in a browser: accessibility, keyboard use, use without JavaScript, live updates."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from console.browser import BrowserWindow, browsing, needs_browser
from web import key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from playwright.sync_api import Browser

    from world import World

pytestmark = needs_browser

NAME_OF_FOCUSED = """() => {
    const focused = document.activeElement;
    return focused.getAttribute("aria-label") || focused.labels?.[0]?.innerText || focused.innerText || "";
}"""

HOUR = timedelta(hours=1)
NOW = text("now()")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start the browser for the tests of this file."""
    with browsing() as browser:
        yield browser


@pytest.fixture
def window(browser: Browser, console_url: str, own: World) -> Iterator[Callable[..., BrowserWindow]]:
    """Return a function that opens a browser window; errors in the window fail the test."""
    opened: list[BrowserWindow] = []

    def sit(**options: object) -> BrowserWindow:
        opened.append(BrowserWindow(browser, console_url, own.engine, **options))
        return opened[-1]

    yield sit
    for each in opened:
        each.context.close()
    assert [complaint for each in opened for complaint in each.complaints] == []


def failed(world: World, chat_id: UUID | None = None) -> UUID:
    """Insert a failed follow-up."""
    return world.follow_up(chat_id, due=-HOUR, status="failed", reason="rejected: HTTP 403 no", finished_at=NOW)


@pytest.mark.parametrize(
    "options",
    [{"color_scheme": "light"}, {"color_scheme": "dark", "viewport": {"width": 360, "height": 740}}],
    ids=["light", "dark-and-narrow"],
)
def test_every_page_is_accessible(options: dict[str, object], window: Callable[..., BrowserWindow], own: World) -> None:
    """Every page conforms to WCAG 2.2 AA and fits a narrow screen."""
    chat_id = own.chat(channel="whatsapp", external_id="5511987654321", last_user_message_at=NOW)
    pending = own.follow_up(chat_id, due=HOUR)
    key_id, _ = key_of(own)
    own.sql("INSERT INTO pauses (workspace_id) VALUES (:id)", id=own.workspace_id)
    sitting = window(**options)
    sitting.go("/login")
    found = {"/login": sitting.violations()}
    sitting.sign_in("admin", own.workspace_id)
    paths = (
        "/", "/follow-ups", "/follow-ups/new", f"/follow-ups/{pending}", f"/follow-ups/{failed(own, chat_id)}",
        f"/chats/{chat_id}", "/settings", f"/settings/keys/{key_id}", "/audit", "/bulk", "/follow-ups?state=x",
    )  # fmt: skip
    for path in paths[:-1]:
        page = sitting.go(path)
        found[path] = sitting.violations()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
    sitting.go("/follow-ups").get_by_role("button", name="Cancel all that match").click()
    found["preview"] = sitting.violations()
    sitting.page.get_by_role("button", name="Cancel these follow-ups").click()
    found["bulk"] = sitting.violations()
    other = window(**options)
    other.sign_in("operator")
    other.go("/system")
    found["/system"] = other.violations()
    assert {path: each for path, each in found.items() if each} == {}


def test_a_links_token_is_removed_from_the_url(window: Callable[..., BrowserWindow], own: World) -> None:
    """The sign-in page removes the token from the URL's fragment before any other request."""
    sitting = window()
    asked: list[str] = []
    sitting.page.on("request", lambda request: asked.append(request.url))
    page = sitting.sign_in("viewer", own.workspace_id)
    assert page.get_by_role("heading", level=1).inner_text() == "Overview"
    assert not any("token" in url for url in [page.url, *asked])
    page.go_back()
    assert "token" not in page.url


def test_the_keyboard_alone_signs_in_lists_ticks_and_cancels(window: Callable[..., BrowserWindow], own: World) -> None:
    """No mouse is needed to sign in or to list, select and cancel follow-ups."""
    one_id = own.follow_up(due=HOUR)
    _, key = key_of(own)
    page = window().go("/login")

    def tab_to(name: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if name in page.evaluate(NAME_OF_FOCUSED):
                return
        pytest.fail(f"{name} cannot be reached")

    tab_to("API key")
    page.keyboard.type(key)
    page.keyboard.press("Enter")
    page.wait_for_url("**/console/")
    tab_to("Follow-ups")
    page.keyboard.press("Enter")
    page.wait_for_url("**/console/follow-ups")
    tab_to(f"Tick {one_id}")
    page.keyboard.press("Space")
    page.evaluate("document.querySelector('main').focus()")
    tab_to("Cancel ticked")
    page.keyboard.press("Enter")
    page.wait_for_url("**/console/bulk/preview")
    tab_to("Cancel these follow-ups")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/console/bulk/[\w-]+$"))
    assert page.get_by_role("heading", level=1).inner_text() == "Bulk action"


def test_everything_works_without_javascript(window: Callable[..., BrowserWindow], own: World) -> None:
    """Signing in with an API key, scheduling, changing and cancelling work without JavaScript."""
    chat_id = own.chat()
    _, key = key_of(own)
    page = window(java_script_enabled=False).go("/login")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("link", name="Follow-ups").first.click()
    page.get_by_role("link", name="New follow-up").click()
    page.get_by_label("Chat", exact=True).fill(str(chat_id))
    page.get_by_label("Message").fill("Hello")
    page.get_by_label("Due", exact=True).fill("2100-01-31T09:00:00")
    page.get_by_role("button", name="Schedule").click()
    page.get_by_label("Message").fill("Hello again")
    page.get_by_role("button", name="Save").click()
    page.get_by_role("button", name="Cancel follow-up").click()
    assert page.locator(".state").first.inner_text() == "cancelled"
    query = f"SELECT message FROM follow_ups WHERE workspace_id = '{own.workspace_id}'"  # noqa: S608 - a test
    assert own.scalar(query) == "Hello again"


def test_times_are_in_the_browsers_zone(window: Callable[..., BrowserWindow], own: World) -> None:
    """On the first visit, the console shows times in the browser's time zone."""
    one_id = own.follow_up(due_date=text("'2100-01-31T12:00:00Z'"))
    sitting = window()
    sitting.sign_in("agent", own.workspace_id)
    page = sitting.go(f"/follow-ups/{one_id}")
    assert page.get_by_label("Due", exact=True).input_value().startswith("2100-01-31T09:00")
    assert "Time in America/Sao_Paulo." in page.inner_text("main")


def test_an_open_page_updates_and_keeps_typed_text(window: Callable[..., BrowserWindow], own: World) -> None:
    """If a follow-up is sent while its page is open, the page shows this and keeps the typed text.

    Once the follow-up has been sent, its form can no longer be saved.
    """
    one_id = own.follow_up(due=HOUR)
    sitting = window()
    sitting.sign_in("agent", own.workspace_id)
    page = sitting.go(f"/follow-ups/{one_id}")
    page.get_by_text("Live", exact=True).wait_for()
    page.get_by_label("Message").fill("My own words")
    own.sql(
        "UPDATE follow_ups SET status = 'sent', finished_at = now(), accepted_at = now(), updated_at = now()"
        " WHERE id = :id",
        id=one_id,
    )
    page.locator(".state.sent").first.wait_for()
    assert page.get_by_label("Message").input_value() == "My own words"
    with page.expect_response(lambda answer: answer.request.method == "POST") as answered:
        page.get_by_role("button", name="Save").click()
    assert answered.value.status == 409
    assert "The follow-up has finished in the meantime" in page.inner_text("main")
    assert "My own words" in page.inner_text("main")
    sitting.complaints.clear()  # the browser reports the 409 response as an error


def test_the_rows_of_a_list_in_use_do_not_move(window: Callable[..., BrowserWindow], own: World) -> None:
    """The rows of a list do not move while the page is in use.

    While updates are paused, nothing on the page changes.
    """
    one_id = own.follow_up(due=HOUR)
    sitting = window()
    sitting.sign_in("agent", own.workspace_id)
    page = sitting.go("/follow-ups")
    page.get_by_text("Live", exact=True).wait_for()
    page.get_by_label(f"Tick {one_id}").check()
    own.follow_up(due=HOUR)
    own.follow_up(due=HOUR)
    offer = page.get_by_role("button", name="2 new. Show")
    offer.wait_for()
    assert page.get_by_label(f"Tick {one_id}").is_checked()
    assert page.locator("tbody tr").count() == 1
    offer.click()
    page.locator("tbody tr").nth(2).wait_for()
    page.get_by_role("button", name="Pause updates").click()
    assert page.get_by_text("Paused", exact=True).is_visible()


def test_an_open_page_shows_that_its_session_was_revoked(window: Callable[..., BrowserWindow], own: World) -> None:
    """If a console session is revoked, its open pages show a notice."""
    sitting = window()
    sitting.sign_in("agent", own.workspace_id)
    page = sitting.go("/follow-ups")
    page.get_by_text("Live", exact=True).wait_for()
    own.sql("UPDATE console_sessions SET ended_at = now() WHERE workspace_id = :id", id=own.workspace_id)
    own.follow_up(due=HOUR)
    page.get_by_text("You are signed out").wait_for()
    sitting.complaints.clear()


def test_a_lost_event_stream_shows_stale_content(window: Callable[..., BrowserWindow], own: World) -> None:
    """If the event stream breaks, the page shows how old its content is."""
    sitting = window()
    sitting.sign_in("agent", own.workspace_id)
    page = sitting.go("/follow-ups")
    page.get_by_text("Live", exact=True).wait_for()
    sitting.context.set_offline(True)
    page.get_by_text("No connection since").wait_for(timeout=60_000)
    sitting.context.set_offline(False)
    page.get_by_text("Live", exact=True).wait_for(timeout=60_000)
    sitting.complaints.clear()
