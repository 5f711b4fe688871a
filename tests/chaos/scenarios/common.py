"""What the scenarios share: a site in a process, its store, and processes that are forked, told what to do, and ended."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from django.test import override_settings

from django_concurrency_mw import backends, conf
from django_concurrency_mw.backends import BackendConfig, BaseBackend, get_backend


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


class Child:
    """A forked process: `work` gets the descriptors that it reads its orders from, and answers by."""

    def __init__(self, work: Callable[[int, int], None]) -> None:
        orders, self._tell = os.pipe()
        self._told, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(self._tell)
                os.close(self._told)
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
        os.close(self._tell)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._told)
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._tell)
        os.close(self._told)
