"""The hand-over: slots as text that another thread, task or process can claim, and back.

Plain text, so that every queue can carry it: pickled, as JSON, in a column. Whoever has it can claim the slots: it is a
secret of the site's own, as any task's arguments are.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from .keyspec import KeySpec
from .outcomes import HANDED_OVER, UNLIMITED, Key, Slot
from .policies import Policy
from .tokens import new_token

#: Characters of a path that are passed on; no store keeps more.
PATH_LIMIT: Final = 200
#: Of a policy that was written elsewhere: what it was asked for is in the slot.
_HANDED: Final = KeySpec("global", "handed over")


@dataclass(frozen=True, slots=True)
class HandedOver:
    """What was handed over, and whether this very process has done it."""

    slots: tuple[tuple[Policy, Slot], ...]
    here: bool


def pack(slots: Sequence[tuple[Policy, Slot]]) -> str:
    """The text for these."""
    if not slots:
        return HANDED_OVER
    data = {"from": _process, "slots": [_as_data(policy, slot) for policy, slot in slots]}
    return HANDED_OVER + base64.urlsafe_b64encode(json.dumps(data, separators=(",", ":")).encode()).decode()


def unpack(text: str) -> HandedOver:
    """What `pack` has made. Raises: ValueError for another text."""
    if not text.startswith(HANDED_OVER):
        raise ValueError("this text was not made by hand_over()")
    if text == HANDED_OVER:
        return HandedOver((), True)
    try:
        data = json.loads(base64.b64decode(text[len(HANDED_OVER) :].encode(), altchars=b"-_", validate=True))
        return HandedOver(tuple(_from_data(one) for one in data["slots"]), data["from"] == _process)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"this text was not made by hand_over(), or is not whole: {error!r}") from error


def _as_data(policy: Policy, slot: Slot) -> dict[str, Any]:
    return {
        "backend": policy.backend,
        "policy": slot.policy,
        "ttl": policy.ttl,
        "renew": policy.renew,
        "max_age": policy.max_age,
        "on_error": policy.on_backend_error,
        "block": policy.block,
        "key": [slot.key.text, slot.key.digest.hex()],
        "limit": slot.told_limit,
        "cost": slot.cost,
        "lease": slot.ttl,
        "token": slot.token,
        "path": slot.path[:PATH_LIMIT],
        "since": slot.since,
        "waits": slot.waits,
    }


def _from_data(data: dict[str, Any]) -> tuple[Policy, Slot]:
    policy = Policy(
        name=data["policy"],
        key=_HANDED,
        max_concurrent=data["limit"],
        ttl=data["ttl"],
        renew=data["renew"],
        max_age=data["max_age"],
        on_backend_error=data["on_error"],
        block=data["block"],
        backend=data["backend"],
    )
    text, digest = data["key"]
    slot = Slot(
        data["policy"],
        Key(text, bytes.fromhex(digest)),
        UNLIMITED if data["limit"] is None else data["limit"],
        data["lease"],
        data["token"],
        data["block"],
        data["path"],
        data["cost"],
        data.get("waits", False),
        data["since"],
    )
    return policy, slot


_process = new_token()


def _forked() -> None:
    global _process
    _process = new_token()


os.register_at_fork(after_in_child=_forked)
