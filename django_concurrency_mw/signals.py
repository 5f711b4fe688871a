"""The signals: what happened to slots, told to whoever wants to count or log it.

All are sent with `send_robust` (a receiver that fails is logged by Django, never a reason to lose a slot), some of them
from threads. `sender` is the class `Policy`.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import copy_context
from typing import Any

from django.dispatch import Signal

logger = logging.getLogger("django_concurrency_mw")


class RobustSignal(Signal):
    """A signal whose `send_robust` can be called anywhere, and really never raises."""

    def send_robust(self, sender: Any, **named: Any) -> list[tuple[Any, Any]]:
        """As Django's; but on an event loop, where that could not wait for asynchronous receivers and would keep the loop
        waiting for the others, a thread of the loop's executor sends it, and the answer is empty.

        A task would be lost with its loop, as that of a sync server around an asynchronous stream.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return self._send_here(sender, named)
        if self.has_listeners(sender):
            try:
                loop.run_in_executor(None, copy_context().run, self._send_here, sender, named)
            except RuntimeError:  # that is closed already
                return self._send_here(sender, named)
        return []

    def _send_here(self, sender: Any, named: dict[str, Any]) -> list[tuple[Any, Any]]:
        try:
            return super().send_robust(sender, **named)
        except Exception:  # not a receiver's: no loop to be had for the asynchronous ones, as in a process that exits
            logger.exception("the receivers of a signal could not be called")
            return []


#: A slot was taken. Arguments: request, policy, key (str), in_flight (int, this one included), limit (int),
#: waited (seconds).
slot_acquired = RobustSignal()

#: A slot was given back. Arguments: request (None where it is gone already), policy, key, limit, held (bool: it was still
#: ours when it was given back; False means that its lease had ended before). There is no count: a release learns none.
slot_released = RobustSignal()

#: A request found a policy at its limit. Arguments: request, policy, key, in_flight, limit, reason, shadow (bool: the
#: policy has `block: false`, so the request ran all the same).
request_rejected = RobustSignal()

#: A store stopped answering, or answers again; once per change. Arguments: alias, error (None on recovery), recovered.
backend_failed = RobustSignal()
