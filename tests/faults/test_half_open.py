"""Connections on which nothing comes back any more, though the network goes on acknowledging."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from faults.figures import Figures
    from faults.proxy import Proxy
    from faults.rig import Rig

DATABASE, BROKER = 0, 1


@pytest.mark.parametrize("server", [DATABASE, BROKER], ids=["database", "broker"])
def test_half_open(server: int, proxied: tuple[Rig, Sequence[Proxy]], figures: Figures) -> None:
    """Worker and beat notice within seconds, connect anew, and everything that fell due meanwhile is sent."""
    rig, proxies = proxied
    rig.start(workers=2, beats=2)
    rig.bulk(40, spread=1.0)
    rig.settle_down()
    ids = rig.bulk(100, spread=2.0)
    time.sleep(rig.rng.random())
    proxies[server].freeze()
    frozen = time.monotonic()
    took = rig.settle_down(within=90)
    assert proxies[server].frozen > 0
    ids += rig.bulk(40, spread=1.0)
    rig.settle_down(within=60)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(ids) + 40}
    name = "database" if server == DATABASE else "broker"
    figures.keep(9, verdict, **{f"{name}_all_sent_after_s": round(took, 1)})
    assert time.monotonic() - frozen < 120
