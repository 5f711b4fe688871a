"""Holders: who holds which slots since when, and taking one away."""

from __future__ import annotations

import time
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from django.core.management.base import CommandError, CommandParser

from .. import conf
from ..backends import BaseBackend
from ..decorated import policies_in_use
from ..exceptions import BackendError, did_you_mean
from ..fields import FieldError, check_duration
from ..keys import masked
from ..occupancy import Row, is_key, rows
from ..policies import Policy
from .config import configuration, stores
from .output import Output, table

HELP = "who holds which slots since when, and --evict; exit code 1 if nobody does, or nobody was evicted"

COLUMNS = ("policy", "key", ">age", ">lease left", ">cost", "host", ">pid", "path", "=token", "marks")


def add_arguments(parser: CommandParser) -> None:
    """Whom to show, how often, and whom to evict."""
    parser.add_argument("--policy", help="of this policy only")
    parser.add_argument("--key", help="of this key only, as per_key has it: user:42")
    parser.add_argument("--older-than", metavar="AGE", type=_duration, help="seconds, or text such as 5m")
    parser.add_argument("--show-keys", action="store_true", help="whole keys instead of masked ones")
    parser.add_argument(
        "--watch",
        nargs="?",
        const=1.0,
        type=_duration,
        metavar="EVERY",
        help="again each second (or so many), until Ctrl-C",
    )
    parser.add_argument("--evict", metavar="TOKEN", help="take this holder's slots away; asks before it does")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(options: Mapping[str, Any], out: Output) -> int:
    """Exit code 0: somebody holds; with `--evict`: somebody was evicted."""
    config = configuration()
    policies = policies_in_use(config)
    wanted = options["policy"]
    if wanted is not None and wanted not in policies:
        raise CommandError(f"--policy {wanted}: there is no such policy{did_you_mean(wanted, policies)}")
    if options["evict"] is not None:
        return _evict(options, out, config, policies)
    if options["watch"] is not None:
        return _watch(options, out, config, policies)
    found = _rows(options, config, policies)
    if out.json:
        out.document(_as_data(found, options))
        return 0 if found else 1
    if found:
        out.table(COLUMNS, _cells(found, options))
    else:
        out.line("Nobody holds a slot.")
    for store in stores(config):
        if store.one_process:
            out.line(
                f"Note: backend {store.config.alias} counts in each process; only the holders of this command's own are seen.",
                "yellow",
            )
    return 0 if found else 1


def _rows(options: Mapping[str, Any], config: conf.Config, policies: Mapping[str, Policy]) -> list[Row]:
    """Those that are asked for, the oldest first."""
    found = [row for store in stores(config) for row in _asked(store, policies) if _is_wanted(row, options, policies)]
    return sorted(found, key=lambda row: -row.holder.age)


def _asked(store: BaseBackend, policies: Mapping[str, Policy]) -> list[Row]:
    try:
        return rows(store, policies)
    except (BackendError, NotImplementedError) as error:
        raise CommandError(f"backend {store.config.alias}: {error}") from error


def _is_wanted(row: Row, options: Mapping[str, Any], policies: Mapping[str, Policy]) -> bool:
    holder = row.holder
    return (
        options["policy"] in (None, holder.policy)
        and (options["older_than"] is None or holder.age >= options["older_than"])
        and (options["key"] is None or is_key(options["key"], holder, policies.get(holder.policy)))
    )


def _cells(found: Sequence[Row], options: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row.holder.policy,
            _key(row, options),
            f"{row.holder.age:.1f} s",
            f"{row.holder.lease_left:.1f} s",
            str(row.holder.cost),
            row.holder.host,
            "" if row.holder.pid is None else str(row.holder.pid),
            row.holder.path,
            row.holder.token,
            ", ".join(row.marks),
        ]
        for row in found
    ]


def _key(row: Row, options: Mapping[str, Any]) -> str:
    return row.holder.key if options["show_keys"] else masked(row.holder.key)


def _as_data(found: Sequence[Row], options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "holders": [
            {
                "backend": row.backend,
                "policy": row.holder.policy,
                "key": _key(row, options),
                "token": row.holder.token,
                "age": round(row.holder.age, 3),
                "lease_left": round(row.holder.lease_left, 3),
                "cost": row.holder.cost,
                "host": row.holder.host or None,
                "pid": row.holder.pid,
                "path": row.holder.path,
                "overran": row.overran,
                "not_renewed": row.not_renewed,
            }
            for row in found
        ]
    }


def _watch(options: Mapping[str, Any], out: Output, config: conf.Config, policies: Mapping[str, Policy]) -> int:
    """Until Ctrl-C. A store that fails meanwhile is said, and asked again."""
    live: Any = None
    if not out.json:
        from rich.live import Live

        live = Live(console=out.console, auto_refresh=False)
    try:
        with live or nullcontext():
            while True:
                try:
                    found = _rows(options, config, policies)
                except CommandError as error:
                    _show(out, live, str(error), {"error": str(error)})
                else:
                    title = f"{len(found)} holders at {time.strftime('%H:%M:%S')}"
                    drawn = None if out.json else table(COLUMNS, _cells(found, options), title)
                    _show(out, live, drawn, _as_data(found, options))
                time.sleep(options["watch"])
    except KeyboardInterrupt:
        return 0


def _show(out: Output, live: Any, drawn: Any, data: Mapping[str, Any]) -> None:
    if live is None:
        out.document(data)
    else:
        live.update(drawn, refresh=True)


def _evict(options: Mapping[str, Any], out: Output, config: conf.Config, policies: Mapping[str, Policy]) -> int:
    token = options["evict"]
    shared = [store for store in stores(config) if not store.one_process]
    if not shared:
        raise CommandError(
            "--evict: the store counts in each process, and this one holds nothing; restart the server instead"
        )
    found = [row for store in shared for row in _asked(store, policies) if row.holder.token == token]
    if found and not options["yes"] and not _agreed(found, options, out):
        out.line("Nobody was evicted.")
        return 1
    evicted = [store.config.alias for store in shared if _evicted(store, token)]
    if out.json:
        out.document({"token": token, "evicted": bool(evicted), "backends": evicted})
    elif evicted:
        out.line(f"Evicted: {token}.", "green")
    else:
        out.line(f"Nobody holds a slot under {token}.", "red")
    return 0 if evicted else 1


def _evicted(store: BaseBackend, token: str) -> bool:
    try:
        return store.evict(token)
    except (BackendError, NotImplementedError) as error:
        raise CommandError(f"backend {store.config.alias}: {error}") from error


def _agreed(found: Sequence[Row], options: Mapping[str, Any], out: Output) -> bool:
    if out.json:
        raise CommandError("--evict with --json cannot ask; add --yes")
    out.table(COLUMNS, _cells(found, options))
    out.line(
        "Its request is not ended: it runs on without a slot, and another one is let in beside it at once, so the limit is "
        "exceeded by it until it ends. Its renewals do not bring the slot back."
    )
    try:
        answer = input("Take its slots away? [y/N] ")
    except EOFError:
        answer = ""
    return answer.strip().lower() in ("y", "yes")


def _duration(text: str) -> float:
    try:
        return check_duration(float(text) if text.replace(".", "", 1).isdigit() else text)
    except FieldError as error:
        raise ArgumentTypeError(str(error)) from error
