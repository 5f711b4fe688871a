"""Single policies that load and yet hardly do what is wanted: limits of 0, short leases, keys that do not hold."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Info, Warning

from .. import conf
from ..backends import BaseBackend
from ..held import RENEW_AFTER
from ..keyspec import Part
from ..limiter import store_of
from ..policies import Policy
from .common import configuration, own_setting, policies, who

SIGNED_COOKIES = "django.contrib.sessions.backends.signed_cookies"
#: Seconds that a process may stall at any moment: a pause of its machine or container, C code that keeps the GIL.
STALL = 1.0
#: Renewals of a lease that may fail before it ends.
FAILURES = 2


def check_leases(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W020: leases too short to be renewed in time."""
    config = configuration()
    if config is None:
        return []
    messages: list[CheckMessage] = []
    for policy in policies(config):
        timeout = _timeout(policy, config)
        enough = _shortest_ttl(timeout)
        if policy.renew and timeout is not None and policy.ttl < enough:
            spare = policy.ttl * (1 - RENEW_AFTER)
            slow = f", or a store that twice takes its {timeout:g} s to fail," if timeout else ""
            messages.append(
                Warning(
                    f"{who(policy, config)}: a ttl of {policy.ttl:g} s is short for a lease that is renewed: that happens "
                    f"{policy.ttl * RENEW_AFTER:.2g} s after it began, and a process that then stalls for {spare:.2g} s{slow} "
                    "lets it lapse: somebody else gets the slot while the request still runs.",
                    hint=f"Choose a ttl of at least {ceil(enough)} s (it only matters to the slots of a process that died); or "
                    "`renew: false`, if slots are to end then.",
                    id="django_concurrency_mw.W020",
                )
            )
    return messages


def check_keys(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """W021 and W022: keys that a client can change, or that never arrive."""
    config = configuration()
    if config is None:
        return []
    messages = list(_about_header("CONCURRENCY_LIMIT['CLIENT_IP_HEADER']", own_setting("CLIENT_IP_HEADER", "")))
    for policy in policies(config):
        for part in policy.key.parts:
            if isinstance(part, Part) and part.root == "header":
                messages += _about_header(f"{who(policy, config)}: key", part.path[0])
        if settings.SESSION_ENGINE == SIGNED_COOKIES and _counts_by_session_key(policy):
            messages.append(
                Warning(
                    f"{who(policy, config)}: signed_cookies gives a session no key of its own: it is known by the text of "
                    "its cookie, which is another one after each save, and all earlier ones stay valid until they expire. A "
                    "client with several of them has the limit several times.",
                    hint="Use another SESSION_ENGINE, `key: user`, or something that is in the session, such as "
                    "`{session.NAME}`.",
                    id="django_concurrency_mw.W021",
                )
            )
    return messages


def check_nobody(app_configs: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """I001: policies that admit nobody."""
    config = configuration()
    if config is None:
        return []
    return [
        Info(
            f"{who(policy, config)}: {what}.",
            hint="Where that is what you want, silence this check. What is counted and never full is `null`.",
            id="django_concurrency_mw.I001",
        )
        for policy in policies(config)
        if policy.block
        for what in _rejects(policy)
    ]


def _timeout(policy: Policy, config: conf.Config) -> float | None:
    """Seconds that one call to its store may take; None for a store that cannot be used, about which E002 has the word."""
    try:
        store: BaseBackend = store_of(policy, config)
    except Exception:  # a store of the project's may fail in any way
        return None
    return store.timeout


def _shortest_ttl(timeout: float | None) -> float:
    """After RENEW_AFTER of a ttl comes the first renewal, and each one that failed is tried again a sixth of the ttl later at
    most (`renewals`). What is left has to be enough for failures that last as long as they can, and a stall."""
    left = 1 - RENEW_AFTER - FAILURES / 6
    return (FAILURES * (timeout or 0.0) + STALL) / left


def _counts_by_session_key(policy: Policy) -> bool:
    whole = any(isinstance(part, Part) and part.root == "session" and not part.path for part in policy.key.parts)
    return policy.key.kind == "session" or whole


def _about_header(place: str, name: str) -> Iterator[CheckMessage]:
    if "_" in name:
        yield Warning(
            f"{place}: {name!r} has an underscore: nginx and gunicorn drop such a header by default, and so does "
            "Django's ASGI handler from 6.1 on.",
            hint=f"Write {name.replace('_', '-')!r}, and let whoever sends it do so too.",
            id="django_concurrency_mw.W022",
        )


def _rejects(policy: Policy) -> Iterator[str]:
    """Whom it never admits."""
    if policy.max_concurrent == 0:
        yield "with max_concurrent: 0 nobody is admitted"
    nobody = [key for key, limit in (policy.per_key or {}).items() if limit == 0]
    if nobody:
        yield f"with a limit of 0 in per_key {'one key is' if len(nobody) == 1 else f'{len(nobody)} keys are'} never admitted"
