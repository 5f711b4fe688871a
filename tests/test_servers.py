"""Real servers: a cap of 5 under 64 clients, by the views' own gauge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import gauge
from .chaos import LONG
from .server_settings import KINDS
from .servers import crowd, free_port, gunicorn, held, running, uvicorn
from .support import wait_until

CLIENTS = 64
SECONDS = 3.0 if LONG else 0.4
CAP = 5
AT_LEAST = 50 if LONG else 20
#: How often the crowd comes at most, until enough of it was admitted and the cap was reached: a busy machine admits as exactly,
#: but fewer.
ROUNDS = 4 if LONG else 40

SERVERS: dict[str, Callable[[int], list[str]]] = {
    "gunicorn gthread 1x32": lambda port: gunicorn(port, "--workers", "1", "--threads", "32"),
    "uvicorn x1": lambda port: uvicorn(port, "--workers", "1"),
}


#: In the short run each kind of view under the server that it is made for, and the plain one under both.
PAIRS = [
    pytest.param(server, kind, id=f"{name}-{kind}")
    for name, server in SERVERS.items()
    for kind in KINDS
    if LONG or kind == "sync" or ("async" in kind) == ("uvicorn" in name)
]


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    port = free_port()
    gauge_file = tmp_path_factory.mktemp("gauge") / "events"
    with running(request.param(port), port, gauge_file):
        yield port, gauge_file


@pytest.mark.parametrize(("server", "kind"), PAIRS, indirect=["server"])
def test_the_cap_holds_is_reached_and_nothing_is_left(server: tuple[int, Path], kind: str) -> None:
    port, gauge_file = server
    statuses: Counter[int] = Counter()
    for _ in range(ROUNDS):
        statuses += crowd(port, f"/busy/{kind}/", CLIENTS, SECONDS)
        assert wait_until(lambda: held(port) == [])
        reading = gauge.read(str(gauge_file))[kind]
        if reading.admitted >= AT_LEAST and reading.most >= CAP:
            break
    print(f"{kind}: {dict(statuses)}, {reading}")
    assert reading.most == CAP, "never above the cap, and reached"
    assert reading.inside == 0
    assert reading.admitted >= AT_LEAST
    admitted = 500 if kind == "raising" else 200
    assert set(statuses) == {admitted, 429}, "an answer that neither the view nor the limit gave"
    assert statuses[admitted] == reading.admitted
