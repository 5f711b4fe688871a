"""Holders: who holds which slots since when, who waits for one, and taking one away."""

from __future__ import annotations

import re
import time
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from django.core.management.base import CommandError, CommandParser

from .. import conf
from ..backends import BaseBackend
from ..backends.base import Holder, Waiter
from ..decorated import leases, policies_in_use
from ..exceptions import BackendError, did_you_mean
from ..fields import FieldError, check_duration
from ..keys import masked
from ..occupancy import Row, is_key, line, rows
from ..policies import Policy
from .config import configuration, notes, stores
from .output import Output, table

HELP = (
    "who holds which slots since when, who waits in which line, and --evict; exit code 1 if nobody holds or waits, or nobody "
    "was evicted"
)

#: Seconds between two looks, at least.
OFTEN = 0.1
#: As `tokens` makes them.
_TOKEN = re.compile(r"[0-9a-f]{16}-[0-9a-f]+")
WAITING = ("policy", "key", ">place", ">waited", ">cost", "host", ">pid", "path", "=token")
COLUMNS = ("policy", "key", ">age", ">lease left", ">cost", "host", ">pid", "path", "=token", "marks")


def add_arguments(parser: CommandParser) -> None:
    """Whom to show, how often, and whom to evict."""
    parser.add_argument("--policy", help="of this policy only")
    parser.add_argument("--key", help="of this key only, as --show-keys has it (user:42), or masked")
    parser.add_argument("--older-than", metavar="AGE", type=_duration, help="seconds, or text such as 5m")
    parser.add_argument("--show-keys", action="store_true", help="whole keys instead of masked ones")
    parser.add_argument(
        "--watch",
        nargs="?",
        const=1.0,
        type=_every,
        metavar="EVERY",
        help="again each second (or so many), until Ctrl-C",
    )
    parser.add_argument(
        "--evict",
        metavar="TOKEN",
        help="take this holder's slots away; asks before it does; not for one who waits, whose own time-out ends that",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")


@dataclass(frozen=True, slots=True)
class Found:
    """The holders that are asked for, the oldest first; those who wait, line by line, each with its store's alias; and why a
    store could not be asked, by its alias."""

    rows: Sequence[Row]
    failed: Mapping[str, str]
    waiting: Sequence[tuple[str, Waiter]] = ()

    @property
    def code(self) -> int:
        """0: somebody holds or waits; 1: nobody does. Raises: CommandError where nobody was found, but not everywhere was
        looked."""
        if not self.rows and not self.waiting and self.failed:
            raise CommandError("; ".join(_said(alias, error) for alias, error in self.failed.items()))
        return 0 if self.rows or self.waiting else 1


def run(options: Mapping[str, Any], out: Output) -> int:
    """Exit code 0: somebody holds or waits; with `--evict`: somebody was evicted."""
    config = configuration()
    policies = policies_in_use(config)
    if options["evict"] is not None:
        return _evict(options, out, config, policies)
    found = _find(options, config, policies)
    if options["policy"] is not None and options["policy"] not in policies and not (found.rows or found.waiting):
        raise CommandError(
            f"--policy {options['policy']}: there is no such policy{did_you_mean(options['policy'], policies)}"
        )
    if options["watch"] is not None:
        return _watch(options, out, config, policies)
    if out.json:
        out.document(_as_data(found, options, notes(config)))
        return found.code
    code = found.code
    if found.rows:
        out.table(COLUMNS, _cells(found.rows, options))
    else:
        out.line("Nobody holds a slot.")
    if found.waiting:
        out.table(WAITING, _waiting_cells(found.waiting, options), _waiting_title(found))
    for alias, error in found.failed.items():
        out.note(_said(alias, error))
    for note in notes(config):
        out.note(note)
    return code


def _said(alias: str, error: str) -> str:
    return f"backend {alias} cannot be asked: {error}"


def _find(options: Mapping[str, Any], config: conf.Config, policies: Mapping[str, Sequence[Policy]]) -> Found:
    found: list[Row] = []
    waiting: list[tuple[str, Waiter]] = []
    failed: dict[str, str] = {}
    seconds = leases(policies)
    for store in stores(config):
        try:
            # Waiters first: one who is let in between the two looks is seen twice, and not never; then it holds.
            in_line, held = line(store), rows(store, seconds)
            let_in = {row.holder.token for row in held}
            found += [row for row in held if _is_wanted(row.holder, options, policies)]
            waiting += [
                pair for pair in in_line if pair[1].token not in let_in and _is_wanted(pair[1], options, policies)
            ]
        except (BackendError, NotImplementedError) as error:
            failed[store.config.alias] = str(error) or repr(error)
    in_order = sorted(waiting, key=lambda pair: (pair[0], pair[1].policy, pair[1].key, pair[1].place))
    return Found(sorted(found, key=lambda row: -row.holder.age), failed, in_order)


def _is_wanted(holder: Holder | Waiter, options: Mapping[str, Any], policies: Mapping[str, Sequence[Policy]]) -> bool:
    known = policies.get(holder.policy)
    return (
        options["policy"] in (None, holder.policy)
        and (options["older_than"] is None or holder.age >= options["older_than"])
        and (options["key"] is None or is_key(options["key"], holder, known[0] if known else None))
    )


def _cells(found: Sequence[Row], options: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row.holder.policy,
            _key(row.holder, options),
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


def _waiting_cells(found: Sequence[tuple[str, Waiter]], options: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            waiter.policy,
            _key(waiter, options),
            str(waiter.place),
            f"{waiter.age:.1f} s",
            str(waiter.cost),
            waiter.host,
            "" if waiter.pid is None else str(waiter.pid),
            waiter.path,
            waiter.token,
        ]
        for _, waiter in found
    ]


def _waiting_title(found: Found) -> str:
    number = len({waiter.token for _, waiter in found.waiting})
    return "1 waits in line" if number == 1 else f"{number} wait in line"


def _key(holder: Holder | Waiter, options: Mapping[str, Any]) -> str:
    return holder.key if options["show_keys"] else masked(holder.key)


def _as_data(found: Found, options: Mapping[str, Any], keep_in_mind: Sequence[str]) -> dict[str, Any]:
    return {
        "holders": [
            {
                "backend": row.backend,
                "policy": row.holder.policy,
                "key": _key(row.holder, options),
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
            for row in found.rows
        ],
        "waiting": [
            {
                "backend": alias,
                "policy": waiter.policy,
                "key": _key(waiter, options),
                "token": waiter.token,
                "place": waiter.place,
                "age": round(waiter.age, 3),
                "cost": waiter.cost,
                "host": waiter.host or None,
                "pid": waiter.pid,
                "path": waiter.path,
            }
            for alias, waiter in found.waiting
        ],
        "failed": dict(found.failed),
        "notes": list(keep_in_mind),
    }


def _watch(
    options: Mapping[str, Any], out: Output, config: conf.Config, policies: Mapping[str, Sequence[Policy]]
) -> int:
    """Until Ctrl-C. A store that fails meanwhile is said, and asked again."""
    live: Any = None
    if not out.json and out.console.is_terminal:
        from rich.console import Group
        from rich.live import Live

        live = Live(console=out.console, auto_refresh=False)
    keep_in_mind = notes(config)
    try:
        with live or nullcontext():
            while True:
                found = _find(options, config, policies)
                if out.json:
                    out.document(_as_data(found, options, keep_in_mind))
                else:
                    said = [*(_said(alias, error) for alias, error in found.failed.items()), *keep_in_mind]
                    title = "; ".join([f"{len(found.rows)} holders at {time.strftime('%H:%M:%S')}", *said])
                    drawn = [table(COLUMNS, _cells(found.rows, options), title)]
                    if found.waiting:
                        drawn.append(table(WAITING, _waiting_cells(found.waiting, options), _waiting_title(found)))
                    _ = out.console.print(*drawn) if live is None else live.update(Group(*drawn), refresh=True)
                time.sleep(options["watch"])
    except KeyboardInterrupt:
        return 0


def _evict(
    options: Mapping[str, Any], out: Output, config: conf.Config, policies: Mapping[str, Sequence[Policy]]
) -> int:
    token = options["evict"]
    if not _TOKEN.fullmatch(token):
        raise CommandError(f"--evict {token!r}: expected a token as `holders` shows it, such as 6412d35a61953572-3")
    shared = [store for store in stores(config) if not store.one_process]
    if not shared:
        raise CommandError(
            "--evict: the store counts in each process, and this one holds nothing; restart the server instead"
        )
    found = _find({**options, "policy": None, "key": None, "older_than": None}, config, policies)
    theirs = [row for row in found.rows if row.holder.token == token]
    aliases = {row.backend for row in theirs} | set(found.failed)
    if theirs and not options["yes"] and not _agreed(theirs, options, out):
        out.line("Nobody was evicted.")
        return 1
    evicted = [store.config.alias for store in shared if store.config.alias in aliases and _evicted(store, token)]
    if out.json:
        out.document({"token": token, "evicted": bool(evicted), "backends": evicted})
    elif evicted:
        out.line(f"Evicted: {token}.", "green")
    elif any(waiter.token == token for _, waiter in found.waiting):
        out.line(f"{token} waits and holds no slot yet: it is let in, or ends by its own time-out.", "red")
    else:
        out.line(f"Nobody holds a slot under {token}.", "red")
    return 0 if evicted else 1


def _evicted(store: BaseBackend, token: str) -> bool:
    try:
        return store.evict(token)
    except (BackendError, NotImplementedError) as error:
        raise CommandError(_said(store.config.alias, str(error))) from error


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


def _every(text: str) -> float:
    seconds = _duration(text)
    if seconds < OFTEN:
        raise ArgumentTypeError(f"expected at least {OFTEN} seconds, as each look asks the stores for everybody")
    return seconds


def _duration(text: str) -> float:
    try:
        return check_duration(float(text) if text.replace(".", "", 1).isdigit() else text)
    except FieldError as error:
        raise ArgumentTypeError(str(error)) from error
