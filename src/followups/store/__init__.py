"""Every SQL statement of the system, by noun.

**The order of locks.** A transaction that waits for row locks takes them in this order, so that no two of our
transactions deadlock:

1. chats, in ascending order of their ids (`lock_chat`, `lock_many` and `lock_chats_of` of `followups.store.chats`);

2. the pending follow-ups of these chats, in the order of their due dates, then ids;

3. the workspace's quotas (`followups.store.quotas.take`), before its new chat or follow-up is inserted.

Every operation that creates, changes or cancels a follow-up for a caller locks the follow-up's chat first. So do a chat
message and the removal of a chat. A transaction that works on several chats locks them in ascending order of their ids.

The dispatcher's statements lock no chat, and never wait for a follow-up: they skip locked rows (``SKIP LOCKED``) and
try them again. So do the bulk cancel, the release of what is held, and pruning. No caller's change locks a follow-up in
flight, since its settlement must not be delayed. A reply does lock it, but only briefly, while it requests a cancel.
"""
