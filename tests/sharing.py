"""How the workers of pytest-xdist share the tests: by file, and whatever real servers do is one worker's."""

from __future__ import annotations

from pathlib import PurePath

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

#: The unit of the tests that must not run against one another: they start crowds of processes and say when things happen.
SERVERS = "servers"
_FOLDERS = {"chaos"}
_FILES = {
    f"test_{name}.py"
    for name in (
        "cluster_failover",
        "command_servers",
        "example",
        "greenlets",
        "reload_servers",
        "servers",
        "servers_redis",
        "soak",
        "waiting_servers",
    )
}


def unit(nodeid: str) -> str:
    """What runs in one worker, in its order. What a module's tests share is then made once."""
    file = nodeid.partition("::")[0]
    path = PurePath(file)
    return SERVERS if path.name in _FILES or path.parent.name in _FOLDERS else file


class Sharing(LoadScopeScheduling):
    """The units in the order of the collection, each to the worker that is through with its own."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)
