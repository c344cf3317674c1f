"""Scheduled chat follow-ups: each sent at its moment, once, unless something cancelled it first.

From Python, in the caller's own database transaction (the row is the job; nothing else to enqueue)::

    import followups

    with Session(engine) as session, session.begin():
        followups.schedule(session, workspace_id=w, chat_id=c, message="Still there?", due_date=due)
"""

from followups.models import FollowUp
from followups.scheduling import cancel, schedule
from followups.states import ReasonCode, Status

__all__ = ["FollowUp", "ReasonCode", "Status", "cancel", "schedule"]
