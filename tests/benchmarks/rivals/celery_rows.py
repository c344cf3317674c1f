"""Celery as commonly used: beat enqueues a task for each due row; tasks use an ORM and `requests`."""

from __future__ import annotations

import uuid
from datetime import datetime

import requests
from celery import Celery
from sqlalchemy import create_engine, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from rivals.place import BROKER, DATABASE, RECEIVER

app = Celery("celery_rows", broker=BROKER)
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    worker_prefetch_multiplier=4,
    broker_connection_retry_on_startup=True,
    beat_schedule={"find_due": {"task": "find_due", "schedule": 0.1, "options": {"expires": 1.0}}},
)
engine = create_engine(DATABASE.replace("postgresql://", "postgresql+psycopg://"))
http = requests.Session()


class Base(DeclarativeBase):
    """SQLAlchemy's declarative base for this program's only table."""


class Row(Base):
    """A message to be sent."""

    __tablename__ = "bench_rows"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    due_date: Mapped[datetime]
    message: Mapped[str]
    status: Mapped[str]
    message_id: Mapped[uuid.UUID | None]


@app.task(name="find_due")
def find_due() -> None:
    """Enqueue a task for each due row."""
    with Session(engine) as session, session.begin():
        due = select(Row.id).where(Row.status == "pending", Row.due_date <= datetime.now().astimezone())
        due = due.order_by(Row.due_date).limit(1000).with_for_update(skip_locked=True)
        ids = session.scalars(due).all()
        session.execute(update(Row).where(Row.id.in_(ids)).values(status="queued"))
    for row_id in ids:
        deliver.delay(str(row_id))


@app.task(name="deliver", autoretry_for=(requests.RequestException,), retry_backoff=True)
def deliver(row_id: str) -> None:
    """Send one message and record it in its row."""
    with Session(engine) as session:
        row = session.get_one(Row, uuid.UUID(row_id))
        if row.status == "sent":
            return
        answer = http.post(RECEIVER, json={"followUpId": row_id, "message": row.message}, timeout=30)
        answer.raise_for_status()
        row.status, row.message_id = "sent", uuid.UUID(answer.json()["chatMessageId"])
        session.commit()
