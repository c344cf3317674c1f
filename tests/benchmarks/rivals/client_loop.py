"""A bare asyncio loop with the service's own HTTP client: an upper limit for the benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import uvloop

from followups.json_encoding import encode_json
from followups.settings import load_settings
from followups.transports.http import DIALECT
from followups.transports.http_client import HttpClient
from followups.transports.port import Sent
from rivals.asyncio_loop import IN_FLIGHT, run
from rivals.place import RECEIVER

if TYPE_CHECKING:
    from uuid import UUID


async def main() -> None:
    """Run the benchmark's loop with the HTTP client that the transports share."""
    client = HttpClient(load_settings(concurrency=IN_FLIGHT))
    await client.open()

    async def post(row_id: UUID, message: str) -> UUID:
        body = encode_json({"followUpId": str(row_id), "message": message})
        outcome = await client.deliver(RECEIVER, [], body, DIALECT)
        if not isinstance(outcome, Sent) or outcome.chat_message_id is None:
            raise RuntimeError(outcome)
        return outcome.chat_message_id

    await run(post)


if __name__ == "__main__":
    uvloop.run(main())
