"""Celery's log lines in the project's format, with the id of the task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import signals
from structlog.contextvars import bind_contextvars, clear_contextvars

from followups.telemetry.logs import configure_logging
from followups.worker import flower

if TYPE_CHECKING:
    from followups.settings import Settings


def install(settings: Settings) -> None:
    """Connect to Celery's signals to apply the log settings in worker, beat and Flower."""

    def configure(**_: object) -> None:
        configure_logging(settings.log_format, settings.log_level)

    # A worker configures logging twice. The early configuration formats warnings that are issued before Celery sets up
    # logging.
    signals.celeryd_init.connect(configure, weak=False)
    signals.setup_logging.connect(configure, weak=False)
    signals.task_prerun.connect(_name_task)
    signals.task_postrun.connect(_forget_task)
    flower.install(configure)


def _name_task(task_id: str = "", task: Any = None, **_: object) -> None:  # noqa: ANN401 - Celery's task
    clear_contextvars()
    bind_contextvars(task_id=task_id, task=getattr(task, "name", None))


def _forget_task(**_: object) -> None:
    clear_contextvars()
