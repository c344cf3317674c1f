"""Creates the README's pictures of the console.

To create the pictures, run ``PYTHONPATH=tests uv run python tests/console/pictures.py``. The script uses embedded
servers, and a workspace that shows every feature of the console. The tests' browser takes the screenshots.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from sqlalchemy import text

from console.browser import BrowserWindow, browsing
from followups.database import make_engine
from followups.embedded import EmbeddedPostgres, EmbeddedValkey
from followups.schema import migrate
from followups.settings import load_settings
from web import served
from world import World

PICTURES = Path(__file__).parent.parent.parent / "deploy" / "pictures"
VIEWPORT = {"width": 1100, "height": 760}
HOUR = timedelta(hours=1)
NOW = text("now()")
TICK = """
    INSERT INTO dispatcher_state (id, last_tick_at) VALUES (1, now())
    ON CONFLICT (id) DO UPDATE SET last_tick_at = now()
"""


def fill(world: World) -> str:
    """Fill the workspace, and return the id of the follow-up for the picture."""
    world.sql("UPDATE workspaces SET name = 'acme' WHERE id = :id", id=world.workspace_id)
    world.sql(
        "INSERT INTO sending_hours (workspace_id, time_zone, opening, closing, days, open_from, open_until)"
        " VALUES (:id, 'America/Sao_Paulo', '08:00', '20:00', 31, now(), now() + interval '1 hour')",
        id=world.workspace_id,
    )
    for minute in range(55):
        at = text(f"now() - interval '{minute} minutes 20 seconds'")
        for _ in range((minute * 7) % 5 + 2):
            world.follow_up(status="sent", due_date=at, finished_at=at, accepted_at=at, attempts=1)
    shown = world.follow_up(
        world.chat(channel="whatsapp", external_id="5511987654321", last_user_message_at=NOW),
        due=5 * HOUR,
        message="Hello Ana, are you still interested in the blue one?",
    )
    for reason in ("rejected: HTTP 403 the user has blocked this account", "retries_exhausted: HTTP 503 away"):
        world.follow_up(due=-HOUR, status="failed", reason=reason, finished_at=NOW)
    world.follow_up(due=HOUR, status="cancelled", reason="user_replied", finished_at=NOW)
    world.sql(
        "INSERT INTO failed_attempts (follow_up_id, number, outcome, detail, status_code, duration)"
        " VALUES (:id, 1, 'retry', 'HTTP 503 away', 503, interval '120 ms')",
        id=shown,
    )
    world.sql(TICK)
    return str(shown)


def main() -> None:
    """Create the pictures."""
    with EmbeddedPostgres() as postgres, EmbeddedValkey() as valkey:
        migrate(postgres.url())
        settings = load_settings(
            database_url=postgres.url(), broker_url=valkey.url(), transport_url="http://127.0.0.1:9/"
        )
        engine = make_engine(postgres.url())
        world = World(engine)
        shown = fill(world)
        with served(settings) as (host, port), browsing() as browser:
            window = BrowserWindow(browser, f"http://{host}:{port}", engine, viewport=VIEWPORT)
            window.sign_in("admin", world.workspace_id)
            for name, path in (("overview", "/"), ("follow-up", f"/follow-ups/{shown}"), ("settings", "/settings")):
                window.go(path).screenshot(path=PICTURES / f"console-{name}.png", animations="disabled")
            window.context.close()
        engine.dispose()


if __name__ == "__main__":
    main()
