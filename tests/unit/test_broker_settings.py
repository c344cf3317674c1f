"""Celery's broker always comes from the settings, whatever other variables are set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

OURS = "redis://ours.example:6379/0"
ELSEWHERE = "redis://elsewhere.example:6380/9"

ASK = """
import json
from followups.worker.celery_app import app, dispatch_due
connections = app.connection(), app.connection_for_read(), app.connection_for_write()
with app.producer_pool.acquire(block=False) as producer:
    asked = [*(each.as_uri() for each in connections), producer.__connection__.as_uri()]
print(json.dumps({"uris": asked, "backend": type(app.backend).__name__, "eager": app.conf.task_always_eager}))
"""

VARIABLES = {
    "CELERY_BROKER_URL": ELSEWHERE,
    "CELERY_BROKER_READ_URL": ELSEWHERE,
    "CELERY_BROKER_WRITE_URL": ELSEWHERE,
    "CELERY_RESULT_BACKEND": ELSEWHERE,
    "CELERY_CONFIG_MODULE": "elsewhere",
    "CELERY_LOADER": "elsewhere:Loader",
    "BROKER_URL": ELSEWHERE,
    "RESULT_BACKEND": ELSEWHERE,
    "REDIS_URL": ELSEWHERE,
}


def test_no_other_variable_decides(tmp_path: Path) -> None:
    """Celery uses FOLLOWUPS_BROKER_URL and stores no results, even if other variables are set."""
    (tmp_path / "elsewhere.py").write_text("task_always_eager = True\n")
    environment = os.environ | {
        "FOLLOWUPS_BROKER_URL": OURS,
        "FOLLOWUPS_DATABASE_URL": "postgresql://nowhere.example/chats",
        "PYTHONPATH": str(tmp_path),
    }
    ran = subprocess.run(
        [sys.executable, "-c", ASK], env=environment | VARIABLES, capture_output=True, text=True, check=True
    )
    answer = json.loads(ran.stdout)
    assert {uri.rpartition("@")[2] for uri in answer["uris"]} == {"ours.example:6379/0"}
    assert (answer["backend"], answer["eager"]) == ("DisabledBackend", False)
