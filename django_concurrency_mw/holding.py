"""`hold`: slots outside a request, in a task, a consumer or a command; and the claim of those that a view handed over."""

from __future__ import annotations

import sys

from django.core.exceptions import ImproperlyConfigured

from . import conf, reload
from .blocks import Block
from .claiming import claim
from .effects import Steps
from .exceptions import ConcurrencyLimitExceeded, did_you_mean, shown
from .fields import UNSET, FieldError, check_cost, check_limit
from .handover import HandedOver, unpack
from .keys import limits_of, written
from .lease import Lease
from .limiter import admit_outside
from .outcomes import HANDED_OVER, NOT_LIMITED, Asked, Concurrency
from .policies import Policy


def hold(policy: str, *, key: str | None = None, max_concurrent: int | None = UNSET, cost: int = UNSET) -> Hold:
    """Hold a slot of a table's policy for the length of a `with` or `async with` block, outside a request.

    `policy` is its name; `key` the resolved text, as `per_key` and the commands show it (`"user:42"`), which only
    `key: global` may go without. `max_concurrent` (slots, None: never full) and `cost` (1 to 1000) go before the policy's
    own, and are needed where those are callables. What needs a request is ignored: url_names, methods, when, except_ips
    and others. Or `policy` is the text of `request.concurrency.hand_over()`, alone: what a view passed on is claimed.

    The block gets a `Concurrency`, as requests do. Its lease is renewed until it ends, however it ends.

    Raises, when the block is entered: ConcurrencyLimitExceeded, with the rejection; SlotLost where what was handed over has
    ended or was claimed before; ImproperlyConfigured for an unknown policy or store; TypeError for a missing argument;
    ValueError for a key that the policy cannot have.
    """
    caller = sys._getframe(1)
    return Hold(policy, key, max_concurrent, cost, f"{caller.f_code.co_filename}:{caller.f_lineno}")


class Hold(Block[Concurrency]):
    """One block, or several one after another. `place` is where it was written."""

    called = "hold"

    def __init__(self, policy: str, key: str | None, max_concurrent: int | None, cost: int, place: str) -> None:
        super().__init__()
        if not isinstance(policy, str):
            raise TypeError(f"hold: expected the name of a policy, or the text of hand_over(), got {shown(policy)}")
        self._handed: HandedOver | None = None
        if policy.startswith(HANDED_OVER):
            if key is not None or max_concurrent is not UNSET or cost is not UNSET:
                raise TypeError("hold: what was handed over brings its key, limit and cost along; give nothing else")
            self._handed = unpack(policy)
        if key is not None and (not isinstance(key, str) or not key):
            raise TypeError(f"hold: expected key= to be text such as 'user:42', got {shown(key)}")
        self._name, self._key, self._limit, self._cost, self._place = policy, key, max_concurrent, cost, place
        for name, value, check in (("max_concurrent", max_concurrent, check_limit), ("cost", cost, check_cost)):
            try:
                value is UNSET or check(value)
            except FieldError as error:
                raise TypeError(f"hold: {name}: {error}") from error

    def steps(self, lease: Lease) -> Steps[Concurrency]:
        config = conf.current()
        if self._handed is not None:
            return (yield from claim(self._handed, lease, config))
        entry = self._asked(config)
        if not config.enabled:
            return NOT_LIMITED
        verdict = yield from admit_outside(entry, lease, config)
        if verdict.concurrency.rejection is not None:
            raise ConcurrencyLimitExceeded(verdict.concurrency.rejection)
        return verdict.concurrency

    def _asked(self, config: conf.Config) -> Asked:
        policy = config.table.get(self._name)
        if policy is None:
            raise ImproperlyConfigured(
                f"hold: no policy {self._name!r} in CONCURRENCY_LIMIT['POLICIES']"
                + did_you_mean(self._name, (known.name for known in config.table))
            )
        reload.used(policy.name, self._place)
        if self._key is None and policy.key.kind != "global":
            raise TypeError(
                f"hold: policy {policy.name} counts by {policy.key.text!r}; give key=, such as key='user:42'"
            )
        text = self._key or "global"
        example = policy.key.unlike(text)
        if example is not None:
            raise ValueError(f"hold: {shown(text)} is no key of policy {policy.name}, whose keys look like {example!r}")
        # A header's or a session's value may be raw here too, but where it may be a digest already, as the store shows it.
        key = written(policy, text)[-1]
        return Asked(policy, key, self._limit_of(policy, key.digest), self._cost_of(policy))

    def _limit_of(self, policy: Policy, digest: bytes) -> int | None:
        if self._limit is not UNSET:
            return self._limit
        own = limits_of(policy)
        if digest in own:
            return own[digest]
        limit = policy.max_concurrent
        if limit is not None and not isinstance(limit, int):
            raise TypeError(f"hold: the limit of policy {policy.name} is a callable of a request; give max_concurrent=")
        return limit

    def _cost_of(self, policy: Policy) -> int:
        if self._cost is not UNSET:
            return self._cost
        if not isinstance(policy.cost, int):
            raise TypeError(f"hold: the cost of policy {policy.name} is a callable of a request; give cost=")
        return policy.cost
