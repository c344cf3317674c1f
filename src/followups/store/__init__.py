"""Every SQL statement of the system, one module for each subject.

**Lock order.** Every transaction that waits for row locks acquires them in this order, which prevents deadlocks:

1. chats, in ascending order of their ids (`lock_chat`, `lock_many` and `lock_chats_of` of `followups.store.chats`);

2. the pending follow-ups of these chats, ordered by due date and id;

3. the workspace's quotas (`followups.store.quotas.take`), before its new chat or follow-up is inserted.

When a caller creates, changes or cancels a follow-up, the follow-up's chat is locked first. A transaction that records
a chat message or removes a chat also locks the chat first. A transaction that changes several chats locks them in
ascending order of their ids.

The dispatcher's statements lock no chat. These statements skip locked follow-ups (``SKIP LOCKED``) and try them again
later. Bulk cancels, the release of held follow-ups and pruning skip locked rows. A caller's change never locks a
follow-up in flight, because the lock would delay settle. Only a reply, a takeover, a chat's removal and a bulk cancel
lock follow-ups in flight, and only briefly, to request their cancellation.
"""
