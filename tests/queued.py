"""Who stands in line, for tests: waiters that somebody goes on asking for, as their requests would."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from django.utils.module_loading import import_string

from django_concurrency_mw.backends import SHORT_NAMES, BaseBackend
from django_concurrency_mw.bells import Bell
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Queued, Slot
from django_concurrency_mw.tokens import new_token

#: The stores that let wait.
WAITING = [kind for kind, path in SHORT_NAMES.items() if import_string(path).supports_wait]
#: Of the waiters that are made here.
PATH = "/standing/"
#: Seconds between two questions of a waiter: a fifth of what it keeps its place for.
EVERY = 1.0


@contextmanager
def standing(store: BaseBackend, policy: str, key: str, n: int = 1, *, limit: int = 1, cost: int = 1) -> Iterator[None]:
    """So many stand in this line for the length of the block; they are out of it, or give back, at its end."""
    asked: list[tuple[tuple[Slot, ...], Bell]] = []
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(EVERY):
            for slots, bell in asked:
                store.queue(slots, (1_000_000,), bell)

    asking = threading.Thread(target=go_on, daemon=True)
    try:
        for _ in range(n):
            slot = Slot(policy, make_key(key), limit, 60.0, new_token(), path=PATH, cost=cost, waits=True)
            asked.append(((slot,), store.bell()))
            reply = store.queue((slot,), (1_000_000,), asked[-1][1])
            assert isinstance(reply, Queued), f"there is room: {reply}"
        asking.start()
        yield
    finally:
        over.set()
        if asking.ident is not None:
            asking.join()
        for slots, bell in reversed(asked):  # the last one first: nobody of them comes forward meanwhile
            store.give(slots)
            bell.close()
