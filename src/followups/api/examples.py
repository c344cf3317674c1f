"""Examples in the OpenAPI document, all of the same follow-up."""

from __future__ import annotations

from typing import Any

FOLLOW_UP_ID = "0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51"
CHAT_ID = "6a1f3f0e-4f0e-4b39-8f5b-0f6a3f1f7c11"
MESSAGE_ID = "c4b5a7d2-53a9-4d29-9b62-7a2c1a5d9e01"
REPLY_ID = "e3d9a5f4-9f55-4f7f-a7b6-2d6a1b9c4f02"

NEW_FOLLOW_UP: dict[str, Any] = {
    "chatId": CHAT_ID,
    "dueDate": "2030-01-31T09:00:00Z",
    "message": "Hello! Are you still interested?",
}

FOLLOW_UP: dict[str, Any] = {
    "id": FOLLOW_UP_ID,
    "createdAt": "2030-01-30T09:00:00Z",
    "updatedAt": "2030-01-30T09:00:00Z",
    "chatId": CHAT_ID,
    "chatMessageId": None,
    "dueDate": "2030-01-31T09:00:00Z",
    "finishedAt": None,
    "message": "Hello! Are you still interested?",
    "reason": None,
    "status": "pending",
    "triggerChatMessageId": MESSAGE_ID,
}

CANCELLED_FOLLOW_UP = FOLLOW_UP | {
    "updatedAt": "2030-01-30T10:00:00Z",
    "finishedAt": "2030-01-30T10:00:00Z",
    "reason": "cancelled_by_api",
    "status": "cancelled",
}

CHAT_PUT: dict[str, Any] = {"channel": "whatsapp", "externalId": "491701234567"}

CHAT: dict[str, Any] = {
    "id": CHAT_ID,
    "channel": "whatsapp",
    "externalId": "491701234567",
    "createdAt": "2030-01-30T08:00:00Z",
    "updatedAt": "2030-01-30T08:00:00Z",
}

NEW_CHAT_MESSAGE: dict[str, Any] = {
    "id": REPLY_ID,
    "chatId": CHAT_ID,
    "role": "user",
    "createdAt": "2030-01-30T10:00:00Z",
}

CHAT_MESSAGE = NEW_CHAT_MESSAGE | {"cancelledFollowUpIds": [FOLLOW_UP_ID]}

NEW_CONSOLE_LINK: dict[str, Any] = {"role": "agent", "chatId": CHAT_ID, "expiresIn": "PT10M"}

CONSOLE_LINK: dict[str, Any] = {
    "url": "https://chat.example/console/login#token=fcl_Vn3sUxg7m2pQ4rT6yZ8bC0dE1fG5hJ9kL-wX_aSoPiU",
    "expiresAt": "2030-01-30T09:10:00Z",
}

HEALTH: dict[str, Any] = {"status": "up"}

READINESS: dict[str, Any] = {
    "status": "ready",
    "checks": {
        "database": {"ok": True, "detail": "answers"},
        "migrations": {"ok": True, "detail": "0002"},
        "tick": {"ok": True, "detail": "0.4 s ago"},
        "broker": {"ok": True, "detail": "answers"},
    },
}

METRICS = """\
# HELP followups_pending Follow-ups that are accepted and not ended.
# TYPE followups_pending gauge
followups_pending 42.0
"""
