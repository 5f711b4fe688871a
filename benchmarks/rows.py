"""The comparisons: which cells are timed together, and the rows that are read off them, each with the ratio it may have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from django_concurrency_mw.middleware import ConcurrencyLimitMiddleware

from . import alone, chain, floor, handlers, peer, tables
from .holders import fill
from .policies import HOLDERS, TABLE_SIZES, held_name
from .room import Cell, Pair


@dataclass(frozen=True)
class Row:
    """What the first pair of cells adds (the first more than the second), over what the second pair does."""

    id: str
    what: str
    top: Pair
    bottom: Pair
    at_most: float | None = None
    #: Is it among what `make bench-quick` looks at?
    quick: bool = False


@dataclass(frozen=True)
class Comparison:
    """Cells that are timed in turn, made when they are wanted."""

    id: str
    cells: Callable[[], Mapping[str, Cell]]
    rows: tuple[Row, ...]
    needs_redis: bool = False

    def rows_for(self, cells: Mapping[str, object], quick: bool) -> list[Row]:
        """Those whose cells there are: what is not installed is left out."""
        there = set(cells)
        return [row for row in self.rows if {*row.top, *row.bottom} - {None} <= there and (row.quick or not quick)]


def requests(name: str, way: str = "sync", at_once: int = 1, middleware: bool = False, status: int = 200) -> Cell:
    """Requests for a view of the site, by its URL name."""
    if way == "async":
        return Cell(handlers.arequests(f"/a-{name}/", middleware, status), way, at_once)
    return Cell(handlers.requests(f"/{name}/", middleware, status), way, at_once)


def _on_store(store: str, way: str, at_once: int, url: str, with_peer: bool) -> dict[str, Cell]:
    made = {"bare": requests("bare", way, at_once)}
    if url:
        made["raw2"] = Cell(floor.araw2(url), way, at_once) if way == "async" else Cell(floor.raw2(url), way, at_once)
        made["raw2 in a view"] = requests("redis-raw2", way, at_once)
    made["store"] = Cell(alone.atakes(store) if way == "async" else alone.takes(store), way, at_once)
    made["decorator"] = requests(f"{store}-view-1", way, at_once)
    made["middleware"] = requests(f"{store}-mw-1", way, at_once, True)
    made["three by decorator"] = requests(f"{store}-view-3", way, at_once)
    made["three by middleware"] = requests(f"{store}-mw-3", way, at_once, True)
    if with_peer and peer.limit is not None:
        made["peer"] = requests(f"{store}-peer", way, at_once)
    return made


def on_store(
    store: str,
    way: str,
    url: str,
    at_once: int = 1,
    one: float | None = None,
    three: float | None = None,
    over_peer: float | None = None,
) -> Comparison:
    """One and three policies of a store, by decorator and by middleware, over the two raw round trips and over the peer."""
    name = f"{store}-{way}" + (f"-{at_once}" if at_once > 1 else "")
    words = f"{store}, {'asyncio' if way == 'async' else way}" + (f", {at_once} at once" if at_once > 1 else "")
    rows = (
        [Row(f"{name}-alone", f"{words}, take and give alone / raw2", ("store", None), ("raw2", None))] if url else []
    )
    for by in ("decorator", "middleware"):
        if url:
            rows.append(
                Row(
                    f"{name}-{by}",
                    f"{words}, by {by} / raw2",
                    (by, "bare"),
                    ("raw2", None),
                    one,
                    one is not None and at_once < 100,
                )
            )
            rows.append(
                Row(
                    f"{name}-{by}-in-a-view",
                    f"{words}, by {by} / raw2 in a view",
                    (by, "bare"),
                    ("raw2 in a view", "bare"),
                )
            )
        rows.append(
            Row(
                f"{name}-three-{by}",
                f"{words}, three policies by {by} / one",
                (f"three by {by}", "bare"),
                (by, "bare"),
                three if by == "middleware" else None,
                three is not None and by == "middleware",
            )
        )
        if store in peer.STORES:
            rows.append(
                Row(
                    f"{name}-peer-{by}",
                    f"{words}, by {by} / django-smart-ratelimit",
                    (by, "bare"),
                    ("peer", "bare"),
                    over_peer,
                    over_peer is not None,
                )
            )
    if url and store in peer.STORES:
        what = f"{words}, django-smart-ratelimit / raw2"
        rows.append(Row(f"{name}-of-peer", what, ("peer", "bare"), ("raw2", None)))
    return Comparison(
        name,
        lambda: _on_store(store, way, at_once, url, store in peer.STORES),
        tuple(rows),
        store == "redis",
    )


def cheapest_key(way: str, over_peer: float) -> Comparison:
    """The same with a key that asks nothing of the request."""

    def cells() -> dict[str, Cell]:
        made = {"bare": requests("bare", way), "decorator": requests("memory-view-global", way)}
        if peer.limit is not None:
            made["peer"] = requests("memory-peer-global", way)
        return made

    words = "asyncio" if way == "async" else way
    row = Row(
        f"memory-{way}-global-peer",
        f"memory, {words}, one key for all, by decorator / django-smart-ratelimit",
        ("decorator", "bare"),
        ("peer", "bare"),
        over_peer,
        True,
    )
    return Comparison(f"memory-{way}-global", cells, (row,))


def without_a_policy(way: str) -> Comparison:
    """The middleware on a view that no policy matches, among few and many policies."""

    def cells() -> dict[str, Cell]:
        around = chain.achain if way == "async" else chain.chain
        made = {"bare": Cell(around(None), way), "empty": Cell(around(chain.EmptyMiddleware), way)}
        for size in TABLE_SIZES:
            made[f"{size} policies"] = Cell(around(ConcurrencyLimitMiddleware), way, before=tables.switch(size))
        return made

    words = "asyncio" if way == "async" else way
    rows = [
        Row(
            f"unlimited-{way}-{size}",
            f"a view without a policy among {size:,}, {words} / an empty middleware",
            (f"{size} policies", "bare"),
            ("empty", "bare"),
            2.0,
            True,
        )
        for size in TABLE_SIZES
    ]
    rows.append(
        Row(
            f"unlimited-{way}-flat",
            f"the same among {TABLE_SIZES[-1]:,} / among {TABLE_SIZES[0]}, {words}",
            (f"{TABLE_SIZES[-1]} policies", "bare"),
            (f"{TABLE_SIZES[0]} policies", "bare"),
            1.2,
            True,
        )
    )
    return Comparison(f"unlimited-{way}", cells, tuple(rows))


def rejected(way: str) -> Comparison:
    """The whole handler, as a rejected request has no other work than being rejected."""

    def cells() -> dict[str, Cell]:
        fill("memory", "/rejected/", 1, True)
        return {
            "bare 429": requests("too-many", way, status=429),
            "rejected": requests("rejected", way, middleware=True, status=429),
        }

    words = "asyncio" if way == "async" else way
    row = Row(
        f"rejected-{way}",
        f"a rejection, the whole handler, memory, {words} / a view's own 429",
        ("rejected", None),
        ("bare 429", None),
        1.5,
        True,
    )
    return Comparison(f"rejected-{way}", cells, (row,))


def held(store: str) -> Comparison:
    """A key that few and many others hold meanwhile."""

    def cells() -> dict[str, Cell]:
        made = {"bare": requests("bare")}
        for holders in HOLDERS:
            name = held_name(store, holders)
            fill(store, f"/{name}/", holders)
            made[f"{holders} holders"] = requests(name)
        return made

    rows = tuple(
        Row(
            f"{store}-held-{holders}",
            f"{store}, {holders:,} hold the key / 10 hold it",
            (f"{holders} holders", "bare"),
            ("10 holders", "bare"),
            1.2 if holders > 10 else None,
            holders == HOLDERS[-1],
        )
        for holders in HOLDERS
        if holders != 10
    )
    return Comparison(f"{store}-held", cells, rows, store == "redis")


def comparisons(url: str, has_host: bool) -> list[Comparison]:
    """All of them; `url` is that of the Redis, empty where there is none."""
    found = [
        on_store("memory", "sync", url, over_peer=0.9),
        on_store("memory", "async", url, over_peer=0.15),
        cheapest_key("sync", 0.9),
        cheapest_key("async", 0.15),
        without_a_policy("sync"),
        without_a_policy("async"),
        rejected("sync"),
        rejected("async"),
        held("memory"),
    ]
    if has_host:
        found += [on_store("host", "sync", url, one=0.22), on_store("host", "async", url)]
    if url:
        found += [
            on_store("redis", "sync", url, one=0.60, three=1.35),
            on_store("redis", "async", url, one=0.45, three=1.35),
            on_store("redis", "async", url, 10, one=0.25),
            on_store("redis", "async", url, 100, one=0.25),
            on_store("redis", "threads", url, 10),
            on_store("redis", "threads", url, 100),
            held("redis"),
        ]
    return found
