"""A store's take and give by themselves: what is left of what a limit adds when everything around them costs nothing."""

from __future__ import annotations

from django_concurrency_mw import conf
from django_concurrency_mw.backends import BaseBackend, get_backend
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Slot
from django_concurrency_mw.tokens import new_token

from .policies import AMPLE
from .room import Awork, Work

_KEY = make_key("ip:127.0.0.1")


def _store(name: str) -> BaseBackend:
    return get_backend(name, conf.current().backends)


def _slots() -> tuple[Slot, ...]:
    return (Slot("alone", _KEY, AMPLE, 60.0, new_token(), True, "/reports/export/"),)


def takes(name: str) -> Work:
    store = _store(name)

    def work(calls: int) -> None:
        for _ in range(calls):
            mine = _slots()
            store.take(mine)
            store.give(mine)

    return work


def atakes(name: str) -> Awork:
    store = _store(name)

    async def work(calls: int) -> None:
        for _ in range(calls):
            mine = _slots()
            await store.atake(mine)
            await store.agive(mine)

    return work
