"""What LOCATION and OPTIONS may say: each is checked by name, before a connection is made of it.

Every error says where it stands and what to write instead, and repeats no password.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import redis.asyncio
from django.core.exceptions import ImproperlyConfigured
from redis.connection import parse_url

from . import tls
from .redirects import Node

SCHEMES = ("redis://", "rediss://", "unix://")
#: Those that a Cluster can be made of: a node tells a host and a port of the others.
CLUSTER_SCHEMES = ("redis://", "rediss://")
#: Where they stand wrong.
OF_A_CLUSTER = {
    "cluster": "it is written into OPTIONS, as True, and not into the URL",
    "address_remap": "it is for a Cluster alone, beside 'cluster': True",
}
DATABASE_0 = "a Cluster has database 0 only: take the number out"
#: What would break the exchange of raw replies, or takes the deadline out of our hands.
REFUSED = {
    "decode_responses": "the store reads raw replies",
    "retry": "a request retries nothing; ON_BACKEND_ERROR decides",
    "retry_on_timeout": "a request retries nothing; ON_BACKEND_ERROR decides",
    "retry_on_error": "a request retries nothing; ON_BACKEND_ERROR decides",
    "socket_connect_timeout": "socket_timeout is one deadline for connecting, handshake and reply together",
    "health_check_interval": "a dead connection is found by its use",
    "parser_class": "the store chooses it",
    "sentinels": "it is a list of URLs in OPTIONS, beside master_name",
    "master_name": "it stands in OPTIONS, beside sentinels",
    "ssl": "write rediss:// in LOCATION",
    "maint_notifications_config": "the store finds out by itself where its server is",
    "connection_pool": "the store keeps its own connections",
    "max_connections": "the store keeps as many connections as calls are under way at once",
}


def take_cluster(options: dict[str, Any], place: str) -> bool:
    """Takes the option out. Raises: ImproperlyConfigured."""
    cluster = options.pop("cluster", False)
    if not isinstance(cluster, bool):
        raise ImproperlyConfigured(f"{place}['cluster']: expected True or False, got a {type(cluster).__name__}")
    for name in ("host", "port", "path"):
        if cluster and name in options:
            raise ImproperlyConfigured(f"{place}[{name!r}]: the URLs in LOCATION say where the nodes are")
    remap = options.get("address_remap")
    if cluster and remap is not None and not callable(remap):
        raise ImproperlyConfigured(
            f"{place}['address_remap']: expected a callable ((host, port)) -> (host, port), got a {type(remap).__name__}"
        )
    return cluster


def startup_nodes(location: Any, place: str) -> tuple[str, tuple[Node, ...]]:
    """The URL that says how all nodes are spoken to, and the nodes that LOCATION names. Raises: ImproperlyConfigured."""
    urls = list(location) if isinstance(location, (list, tuple)) else [location]
    if not urls:
        raise ImproperlyConfigured(f"{place}: expected the URL of at least one node of the Cluster, got an empty list")
    nodes, first = [], None
    for url in urls:
        if not isinstance(url, str) or not url.startswith(CLUSTER_SCHEMES):
            raise ImproperlyConfigured(
                f"{place}: expected URLs of nodes such as 'redis://10.0.0.1:6379' ({', '.join(CLUSTER_SCHEMES)}), "
                f"got {without_password(url)}"
            )
        without_query(url, place)
        said = parse_url(url)  # type: ignore[no-untyped-call]  # redis-py's
        nodes.append(Node(str(said.pop("host", "localhost")), int(said.pop("port", 6379))))
        if int(said.pop("db", 0) or 0):
            raise ImproperlyConfigured(f"{place}: {DATABASE_0}")
        if first is not None and said != first:
            raise ImproperlyConfigured(
                f"{place}: {without_password(url)} differs from the first URL in more than host and port; a user, a password "
                "and TLS are those of all nodes"
            )
        first = said
    return urls[0], tuple(dict.fromkeys(nodes))


def without_query(location: str, place: str) -> tuple[str, dict[str, Any]]:
    """The URL by itself, and the options in its query. Raises: ImproperlyConfigured."""
    bare, _, query = location.partition("?")
    try:
        by_itself, whole = parse_url(bare), parse_url(location)  # type: ignore[no-untyped-call]  # redis-py's
        if "@" in query:
            raise ValueError
        path = "" if bare.startswith("unix:") else urlsplit(bare).path.replace("/", "")
        if path and not path.isdecimal():  # redis-py would take database 0
            raise ValueError
    except ValueError:  # its message may repeat the password
        raise ImproperlyConfigured(
            f"{place}: {without_password(location)} cannot be used: not a valid URL, its database is no number, or a value "
            "in its query cannot be used (in a password `/ ? # @ :` have to be percent-encoded)"
        ) from None
    names = {name for name, _ in parse_qsl(query, keep_blank_values=True)}
    return bare, {
        name: whole.get(name, "") for name in names if name not in by_itself or whole.get(name) != by_itself[name]
    }


def without_password(location: object) -> str:
    if not isinstance(location, str):
        return f"a {type(location).__name__}"
    return repr(re.sub(r"[?#].*", "", re.sub(r"//.*@", "//...@", location)))


def seconds(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.001 <= value <= 3600:
        raise ImproperlyConfigured(f"{place}: expected seconds from 0.001 to 3600, got {value!r}")
    return float(value)


def keywords_of(connection_class: type) -> set[str]:
    """Every keyword that this kind of connection takes, its bases' included."""
    names: set[str] = set()
    for cls in connection_class.__mro__:
        if "__init__" in vars(cls):
            for parameter in inspect.signature(vars(cls)["__init__"]).parameters.values():
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                    names.add(parameter.name)
    return names - {"self"}


def checked(options: Mapping[str, Any], connection_class: type, place: str) -> dict[str, Any]:
    """Returns what stands in the place of some of them. Raises: ImproperlyConfigured."""
    known = keywords_of(connection_class)
    # Both halves make connections.
    both = known & keywords_of(getattr(redis.asyncio.connection, connection_class.__name__))
    with_tls = "ssl_cert_reqs" in known
    wrong = []
    for name in options:
        if name in OF_A_CLUSTER:
            wrong.append(f"{place}[{name!r}]: {OF_A_CLUSTER[name]}")
        elif name in REFUSED:
            wrong.append(f"{place}[{name!r}]: {name} cannot be set: {REFUSED[name]}")
        elif name in ("db", "port") and not _is_number(options[name]):
            wrong.append(f"{place}[{name!r}]: expected a number, got {options[name]!r}")
        elif name in both:
            continue
        elif name in known:
            wrong.append(f"{place}[{name!r}]: redis-py has {name} for threads only, and event loops connect too")
        elif str(name).startswith("ssl_") and not with_tls:
            wrong.append(f"{place}[{name!r}]: {name} is about TLS: write rediss:// in LOCATION")
        else:
            near = get_close_matches(str(name), both, n=1)
            wrong.append(
                f"{place}[{name!r}]: redis-py's connection has no {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    more, of_tls = tls.checked(options, place) if with_tls else ({}, [])
    if wrong or of_tls:
        raise ImproperlyConfigured("\n".join([*wrong, *of_tls]))
    return more


def _is_number(value: Any) -> bool:
    """Digits will do, as a variable of the environment has them."""
    return not isinstance(value, bool) and str(value).isdecimal()
