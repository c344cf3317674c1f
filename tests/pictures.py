"""Makes the README's pictures from a real run: `PYTHONPATH=tests uv run python tests/pictures.py`.

The program starts the embedded system and runs the demo. After the demo, several thousand follow-ups fall due within
two minutes. The program shows these follow-ups as `followups stats --watch` does. The terminal output that rich draws
is saved as deploy/pictures/*.svg.
"""

from __future__ import annotations

import io
import os
import re
import time
from datetime import UTC, datetime, timedelta
from math import pi, sin
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from sqlalchemy.orm import Session

from followups import schedule
from followups.cli import stats
from followups.cli.demo import perform, plan_of
from followups.cli.demo.picture import Picture
from followups.cli.demo.scenario import RestClient
from followups.cli.demo.score import summary_panel
from followups.cli.stats import DASHBOARD_SECONDS, measure_by_second
from followups.database import make_engine
from followups.embedded.stop_signals import StopSignals
from followups.embedded.system import running

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Engine

    from followups.cli.demo.score import FollowUpState
    from followups.embedded.system import Stack

PICTURES = Path(__file__).parents[1] / "deploy" / "pictures"
DEMO, DASHBOARD = (80, 27), (96, 27)
"""Columns and lines of the drawn terminals."""

CHATS = 150
SECONDS = 120
"""Seconds during which follow-ups fall due; the screenshot is taken halfway through."""
MEAN, WAVE, PERIOD = 20, 14, 24.0
"""Follow-ups per second form a sine wave: its mean, its amplitude, and its period in seconds."""
LEAD = 15.0
"""Seconds before the first due date, in which all follow-ups are created."""
FAILING, REFUSED, REPLYING = 12, 2, 12
"""How many chats fail twice, how many refuse messages, and in how many the user replies."""


def console(size: tuple[int, int]) -> Console:
    """Return a terminal that records its output."""
    kind = {"force_terminal": True, "color_system": "truecolor", "highlight": False}
    return Console(record=True, file=io.StringIO(), width=size[0], height=size[1], **kind)


def keep(drawn: Console, title: str, name: str) -> None:
    """Save the recorded output as an SVG that loads no font from another host."""
    code_format = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / name).write_text(drawn.export_svg(title=title, code_format=code_format, unique_id=Path(name).stem))


def draw_demo(stack: Stack) -> None:
    """Run the demo, and draw its final screen as a terminal would."""
    last: list[Sequence[FollowUpState] | datetime] = []
    score = perform(stack, lambda standings, now, _: last.__setitem__(slice(None), [standings, now]))
    drawn = console(DEMO)
    drawn.print(Picture(*last, stack.sandbox, *DEMO).render())
    drawn.print(summary_panel(score))
    keep(drawn, "followups demo", "demo.svg")


def due_moments(start: datetime) -> list[datetime]:
    """Return due times whose density rises and falls in waves."""
    moments, at = [], 0.0
    while at < SECONDS:
        moments.append(start + timedelta(seconds=at))
        at += 1 / (MEAN + WAVE * sin(2 * pi * at / PERIOD))
    return moments


def load(stack: Stack, engine: Engine) -> list[UUID]:
    """Create the chats and schedule all follow-ups; return the chats whose users will reply."""
    workspace_id, key = stack.create_key("pictures", "pictures")
    api, sandbox = RestClient(stack.api, key), RestClient(stack.sandbox)
    chats = [uuid4() for _ in range(CHATS)]
    for chat in chats:
        api.call("POST", "/api/v1/chat-messages", {"id": str(uuid4()), "chatId": str(chat), "role": "agent"})
    behaviours = [{"kind": "fail", "times": 2}] * FAILING + [{"kind": "reject"}] * REFUSED
    for chat, behaviour in zip(chats, behaviours, strict=False):
        sandbox.call("PUT", f"/sandbox/chats/{chat}/behaviour", behaviour)
    with Session(engine) as session, session.begin():
        for number, due in enumerate(due_moments(datetime.now(UTC) + timedelta(seconds=LEAD))):
            chat = chats[number % CHATS]
            schedule(session, workspace_id=workspace_id, chat_id=chat, message="Are you still there?", due_date=due)
    for rest in (api, sandbox):
        rest.close()
    return chats[-REPLYING:]


def photograph_dashboard(stack: Stack) -> None:
    """Refresh the dashboard for a minute under load, and draw its last state."""
    engine = make_engine(stack.settings.database_url.get_secret_value(), pool_size=1)
    replying = load(stack, engine)
    workers, attempts = stats.Workers(), stats.Attempts()
    workers.start()
    api = RestClient(stack.api, stack.create_key("pictures", "replies")[1])
    for _ in range(round((LEAD + DASHBOARD_SECONDS) / 2)):
        look = measure_by_second(engine, timedelta(minutes=5))
        attempts.see(look.attempts, time.monotonic())
        if replying:
            api.call(
                "POST", "/api/v1/chat-messages", {"id": str(uuid4()), "chatId": str(replying.pop()), "role": "user"}
            )
        stack.check()
        time.sleep(2)
    workers.stop()
    api.close()
    engine.dispose()
    drawn = console(DASHBOARD)
    drawn.print(stats.dashboard(look, attempts, workers))
    keep(drawn, "followups stats --watch", "dashboard.svg")


def main() -> None:
    """Make all pictures."""
    with StopSignals() as signals, running(plan_of(signals)) as stack:
        os.environ |= stack.settings.environment()  # the dashboard queries the workers and reads the settings
        draw_demo(stack)
        photograph_dashboard(stack)


if __name__ == "__main__":
    main()
