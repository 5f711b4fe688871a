"""What the scenarios share: a site in a process, its store, and processes that are forked, told what to do, and ended."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, ClassVar

from django.test import override_settings

from django_concurrency_mw import backends, conf
from django_concurrency_mw.backends import BackendConfig, BaseBackend, get_backend
from django_concurrency_mw.bells import Bell
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Queued, QueueReply, Slot, Taken
from django_concurrency_mw.tokens import new_token

from ...support import wait_until

#: The only one there is.
KEY = make_key("global")

#: Seconds for whatever has to come.
SOON = 30.0


def until(fact: Callable[[], bool]) -> bool:
    """Does it come?"""
    return wait_until(fact, SOON)


def site(backend: Mapping[str, Any], policies: Mapping[str, Any], **more: Any) -> BaseBackend:
    """This process belongs to a site with these policies and this one store from now on; returns the store."""
    settings = {
        "BACKENDS": {"default": backend},
        "POLICIES": {"policies": policies},
        "ON_BACKEND_ERROR": "deny",  # a count of its own would not be the store's
        **more,
    }
    backends._instances.clear()  # one of the process that this one was forked from, say
    override_settings(CONCURRENCY_LIMIT=settings).enable()
    store = get_backend("default", conf.current().backends)
    conf.current().stores["default"] = store
    return store


def apart(backend: Mapping[str, Any]) -> BaseBackend:
    """The same store for one who only looks on, and forks: what this process has of it is in nobody's way."""
    entry = {
        "alias": "apart",
        "backend": backend["BACKEND"],
        "location": backend.get("LOCATION"),
        "key_prefix": backend["KEY_PREFIX"],
        "options": backend.get("OPTIONS", {}),
    }
    return get_backend("apart", {"apart": BackendConfig(**entry)})


class Client:
    """One who asks a store for a slot, and no more than the store does."""

    def __init__(self, store: BaseBackend, policy: str, limit: int = 1) -> None:
        self.store = store
        self.slots = (Slot(policy, KEY, limit, 600.0, new_token(), waits=True),)
        self.bell: Bell = store.bell()

    def ask(self, most: int | None = 1000) -> QueueReply:
        return self.store.queue(self.slots, (most,), self.bell)

    def wait(self, seconds: float) -> bool:
        """Does it get the slot?"""
        end = monotonic() + seconds
        while isinstance(reply := self.ask(), Queued):
            if monotonic() > end:
                return False
            self.bell.wait(reply.again)
        return isinstance(reply, Taken)

    def give(self) -> None:
        self.store.give(self.slots)
        self.bell.close()


class Child:
    """A forked process: `work` gets the descriptors that it reads its orders from, and answers by."""

    #: Ours of all children. Whoever is forked later closes them, or the end of the orders would be seen by nobody.
    _ours: ClassVar[set[int]] = set()

    def __init__(self, work: Callable[[int, int], None]) -> None:
        orders, self._tell = os.pipe()
        self._told, answers = os.pipe()
        self._ours |= {self._tell, self._told}
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                for descriptor in self._ours:
                    os.close(descriptor)
                work(orders, answers)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(orders)
        os.close(answers)

    def tell(self, order: bytes) -> None:
        os.write(self._tell, order)

    def hear(self) -> bytes:
        """Its next answer; empty if it has ended."""
        return os.read(self._told, 1)

    def ask(self, order: bytes) -> bytes:
        self.tell(order)
        return self.hear()

    def end(self) -> int:
        """No more orders: it comes to its end by itself. Returns its exit code."""
        self._close(self._tell)
        _, status = os.waitpid(self.pid, 0)
        self._close(self._told)
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._close(self._tell)
        self._close(self._told)

    def _close(self, descriptor: int) -> None:
        os.close(descriptor)
        self._ours.discard(descriptor)
