"""If a failover turns a broker into a replica, clients close their connections to that broker."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
import redis

from followups.api.key_rate_limit import KeyRateLimit
from followups.embedded import EmbeddedValkey
from followups.flow_control.breaker import BreakerStore, OutcomeReport
from followups.flow_control.limiter import Bucket, Limiter, TokenRequest
from followups.settings import Settings, load_settings
from followups.worker.broker import App
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

MOMENT = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def broker() -> Iterator[tuple[Settings, redis.Redis]]:
    """Return settings for a separate Valkey server, and an admin client for that server."""
    with EmbeddedValkey() as valkey, redis.Redis.from_url(valkey.url()) as admin:
        yield load_settings(database_url="postgresql://db.invalid/none", broker_url=valkey.url()), admin


def connections(admin: redis.Redis) -> set[str]:
    """Return the ids of all broker connections except the admin client's."""
    return {client["id"] for client in admin.client_list()} - {str(admin.client_id())}


def check(admin: redis.Redis, use: Callable[[], None]) -> None:
    """Check that a client closes its connection once the broker has become a replica."""
    use()
    before = connections(admin)
    assert before
    admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    with suppress(Exception):  # each client library reports the failure with a different exception
        use()
    wait_until(lambda: not before & connections(admin), 5)


def test_the_apis_rate_limit(broker: tuple[Settings, redis.Redis]) -> None:
    """During a broker failover, the API does not count requests until a connection works again."""
    limit = KeyRateLimit(broker[0])
    with asyncio.Runner() as loop:
        check(broker[1], lambda: loop.run(limit.check(uuid4())))
        loop.run(limit.close())


def test_publishers(broker: tuple[Settings, redis.Redis]) -> None:
    """After a broker failover, hints and nudges are published over a new connection, even without retries."""
    app = App("test", broker[0].broker_url.get_secret_value())
    check(broker[1], lambda: app.send_task("nothing", retry=False) and None)
    app.pool.force_close_all()
    app.close()


@pytest.mark.parametrize("kind", ["limiter", "breaker"])
async def test_limiter_and_breaker(broker: tuple[Settings, redis.Redis], kind: str) -> None:
    """The rate limiter and the breaker reconnect after a broker failover."""
    settings, admin = broker
    client: Limiter | BreakerStore = Limiter(settings) if kind == "limiter" else BreakerStore(settings, "http")

    def ask() -> Coroutine[object, object, object]:
        if isinstance(client, BreakerStore):
            return client.report(OutcomeReport((uuid4(),)), 0)
        return client.ask([TokenRequest(uuid4(), MOMENT, (Bucket("all", 1000, 1000),))], [])

    await ask()
    before = connections(admin)
    admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    with suppress(redis.RedisError):
        await ask()
    await asyncio.to_thread(wait_until, lambda: not before & connections(admin), 5)
    await client.close()
