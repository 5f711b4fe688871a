"""From LOCATION and OPTIONS to how connections are made and where they go: a plain server, whom Sentinels name, or the node of
a Cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from ...exceptions import shown
from ..base import BackendConfig
from .cluster import Cluster
from .connecting import Recipe
from .sentinel import Sentinel, Sentinels
from .wire import Keys

SENTINEL_PORT = 26379
#: What Redis accepts in `sentinel monitor`.
NAME = re.compile(r"[A-Za-z0-9._-]+")


def recipe_for(config: BackendConfig) -> Recipe:
    """Raises: ImproperlyConfigured for a LOCATION or an option that cannot work, by name."""
    options = dict(config.options)
    if "sentinels" not in options and "master_name" not in options:
        return _plain(config)
    urls, name = options.pop("sentinels", None), options.pop("master_name", None)
    place = f"{config.place}['OPTIONS']"
    wrong = _wrong(urls, name, options, place)
    if wrong:
        raise ImproperlyConfigured("\n".join(wrong))
    location = "redis://" if config.location is None else config.location
    recipe = Recipe(replace(config, location=location, options=options))
    _check_host(recipe, name, f"{config.place}['LOCATION']")
    ways = [_way(config, url, options, f"{place}['sentinels'][{number}]") for number, url in enumerate(urls)]
    recipe.where = Sentinels(name, ways, recipe.timeout)
    known = ", ".join(sorted(way.name.lower() for way in ways))
    recipe.server = f"the master {name} of {known}", 0, int(recipe.keywords.get("db") or 0)
    return recipe


def _plain(config: BackendConfig) -> Recipe:
    """A server, or a Cluster."""
    recipe = Recipe(config)
    if recipe.nodes:
        if not config.key_prefix:
            raise ImproperlyConfigured(
                f"{config.place}['KEY_PREFIX']: it puts all keys of an alias into one hash slot of a "
                "Cluster, so it cannot be empty"
            )
        recipe.where = Cluster(recipe, Keys(config.key_prefix))
        recipe.server = *min(recipe.nodes), 0
    return recipe


def _wrong(urls: Any, name: Any, options: Mapping[str, Any], place: str) -> list[str]:
    wrong = []
    if urls is None:
        wrong.append(f"{place}['master_name']: it needs OPTIONS['sentinels'], the URLs of those who know that master")
    elif not isinstance(urls, (list, tuple)) or not urls or not all(isinstance(url, str) for url in urls):
        example = ["redis://sentinel-1:26379", "redis://sentinel-2:26379"]
        got = f"a {type(urls).__name__}" if not isinstance(urls, (list, tuple)) or urls else "an empty one"
        wrong.append(f"{place}['sentinels']: expected a list of URLs such as {example}, got {got}")
    if name is None:
        wrong.append(
            f"{place}['sentinels']: they need OPTIONS['master_name'], the name in their `sentinel monitor <name> ...`"
        )
    elif not isinstance(name, str) or not NAME.fullmatch(name):
        wrong.append(
            f"{place}['master_name']: expected a name of letters, digits and . - _, as in `sentinel monitor`, "
            f"got {shown(name)}"
        )
    for option in ("host", "port", "path"):
        if option in options:
            wrong.append(f"{place}[{option!r}]: the sentinels say where the master is")
    if options.get("cluster"):
        wrong.append(
            f"{place}['cluster']: a Cluster has no sentinels: take out `cluster`, or `sentinels` and `master_name`"
        )
    return wrong


def _check_host(recipe: Recipe, name: str, place: str) -> None:
    """LOCATION has the master's user, password and database, and whether it speaks TLS. Its host may be the master's name."""
    keywords = recipe.keywords
    if "path" in keywords:
        raise ImproperlyConfigured(f"{place}: the sentinels say where the master is, and that is no unix:// socket")
    if "port" in keywords or str(keywords.get("host") or name).lower() != name.lower():
        raise ImproperlyConfigured(
            f"{place}: the sentinels say where the master is: leave out the host and the port (redis://user:password@/0), or "
            f"write the master's name for them (redis://user:password@{name}/0)"
        )


def _way(config: BackendConfig, url: str, options: Mapping[str, Any], place: str) -> Sentinel:
    """How one sentinel is asked. Of OPTIONS it has those of TLS, if it speaks that; its user and password are its own."""
    if not url.startswith(("redis://", "rediss://")):
        raise ImproperlyConfigured(
            f"{place}: expected a URL, redis://host:{SENTINEL_PORT} or rediss:// for TLS, with the sentinel's own user and "
            "password if it has them"
        )
    tls = {key: value for key, value in options.items() if url.startswith("rediss://") and str(key).startswith("ssl_")}
    recipe = Recipe(replace(config, location=url, options=tls), place)
    keywords = recipe.keywords
    if int(keywords.get("db") or 0) != 0:
        raise ImproperlyConfigured(f"{place}: a sentinel has no databases; that of the master stands in LOCATION")
    if not keywords.get("host"):
        raise ImproperlyConfigured(f"{place}: a sentinel needs a host")
    keywords.setdefault("port", SENTINEL_PORT)
    host = f"[{keywords['host']}]" if ":" in keywords["host"] else keywords["host"]
    return Sentinel(f"{host}:{keywords['port']}", recipe.connection)
