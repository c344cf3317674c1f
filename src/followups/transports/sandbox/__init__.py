"""The sandbox: chats with configurable behaviour, in the same process or over HTTP."""
