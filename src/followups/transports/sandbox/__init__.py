"""The sandbox: chats with configurable behaviour, in the same process or behind HTTP."""
