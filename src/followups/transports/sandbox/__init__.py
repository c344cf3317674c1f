"""The sandbox: chats that behave as told, in the same process or behind HTTP."""
