"""Policies: the compiled table as it is now, with what is held, and the views that it does not reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError, CommandParser

from .. import conf
from ..coverage import SecondName, Unmatched, covers, second_names, unmatched_patterns
from ..decorated import decorated, policies_in_use
from ..exceptions import BackendError
from ..keys import masked
from ..limiter import is_replaced, store_of
from ..occupancy import Use, uses
from ..policies import Policy
from ..routes import Route, routes
from .config import configuration, notes, stores
from .output import Output, near

HELP = "the table as it is compiled: per policy what is held and the peak, per URL name its policies, and what no policy covers"
#: Keys at their limit that are named.
NAMED = 3


def add_arguments(parser: CommandParser) -> None:
    """What else to do."""
    parser.add_argument("--reset-peak", action="store_true", help="forget the peaks, after showing them")
    parser.add_argument("--show-keys", action="store_true", help="whole keys instead of masked ones")


def run(options: Mapping[str, Any], out: Output) -> int:
    """Exit code 0."""
    config = configuration()
    known = routes()
    try:
        first = [sharing[0] for sharing in policies_in_use(config).values()]
        used, failed = uses(first, lambda policy: store_of(policy, config))
        if options["reset_peak"]:
            for store in stores(config):
                store.reset_peaks()
    except (BackendError, ImproperlyConfigured, NotImplementedError) as error:
        raise CommandError(str(error)) from error
    keep_in_mind = [*notes(config), *(f"backend {alias} cannot be asked: {error}" for alias, error in failed.items())]
    names = _by_name(known, config)
    around, unmatched = second_names(config.table, known), unmatched_patterns(config.table, known)
    if out.json:
        out.document({**_as_data(used, names, around, unmatched, options), "notes": keep_in_mind})
        return 0
    if not config.enabled:
        out.line("ENABLED is False: nothing is limited.", "red")
    _tell_uses(used, options, out)
    _tell_names(names, out)
    for unmet in unmatched:
        nearest = f"; the nearest name is {unmet.nearest}" if unmet.nearest else ""
        out.line(f"{near(unmet.policy.place)}: {unmet.field} {unmet.pattern!r} matches no URL{nearest}.", "yellow")
    for one in around:
        out.line(
            f"{near(one.policy.place)}: {one.policy.name} covers {one.covered.name}, and the same view is reachable as "
            f"{one.outside.name} (/{one.outside.pattern}), outside the policy.",
            "yellow",
        )
    if options["reset_peak"]:
        out.line("The peaks are forgotten.")
    for note in keep_in_mind:
        out.note(note)
    return 0


def _by_name(known: Sequence[Route], config: conf.Config) -> dict[str, list[tuple[Policy, str]]]:
    """URL name -> its policies, each with the methods that it is about; in the order of the URL configuration."""
    found: dict[str, list[tuple[Policy, str]]] = {}
    for route in known:
        entry = found.setdefault(route.name, [])
        pairs = [
            (policy, _methods(policy))
            for policy in config.table
            if covers(policy, route.name) and not is_replaced(policy, route.view)
        ]
        try:
            pairs += [(one.policy, one.method or _methods(one.policy)) for one in decorated(route.view, config)]
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error
        entry += [pair for pair in pairs if pair not in entry]
    return found


def _methods(policy: Policy) -> str:
    return "" if policy.methods is None else ", ".join(sorted(policy.methods))


def _tell_uses(used: Sequence[Use], options: Mapping[str, Any], out: Output) -> None:
    if not used:
        out.line("There is no policy.")
        return
    lines = any(one.policy.wait or one.waiting for one in used)
    out.table(
        (
            *(
                "policy",
                ">limit",
                ">in flight",
                ">keys",
                ">busiest key",
                ">peak",
                *((">wait", ">waiting") if lines else ()),
            ),
            *("at their limit", "=written in"),
        ),
        [
            (
                one.policy.name + ("" if one.policy.block else " (shadow)"),
                "none" if one.limit is None else str(one.limit),
                *_held(one),
                "-" if one.peak is None else str(one.peak),
                *(_line(one) if lines else ()),
                _full(one, options),
                near(one.policy.place),
            )
            for one in used
        ],
    )


def _held(one: Use) -> tuple[str, str, str]:
    if one.in_flight is None:
        return "?", "?", "?"
    return str(one.in_flight), str(len(one.by_key)), str(one.busiest)


def _line(one: Use) -> tuple[str, str]:
    if not one.policy.wait and not one.waiting:
        return "-", "-"
    return f"{one.policy.wait:g} s", f"{'?' if one.waiting is None else one.waiting} of {one.policy.max_waiting}/key"


def _full(one: Use, options: Mapping[str, Any]) -> str:
    shown = [key if options["show_keys"] else masked(key) for key in one.full]
    more = f" and {len(shown) - NAMED} more" if len(shown) > NAMED else ""
    return ", ".join(shown[:NAMED]) + more


def _tell_names(names: Mapping[str, Sequence[tuple[Policy, str]]], out: Output) -> None:
    covered = {name: pairs for name, pairs in names.items() if pairs}
    if covered:
        out.table(
            ("URL name", "policies"),
            [
                (name, "; ".join(policy.name + (f" ({methods})" if methods else "") for policy, methods in pairs))
                for name, pairs in covered.items()
            ],
        )
    bare = [name for name, pairs in names.items() if not pairs]
    if bare:
        out.line(f"No policy covers: {', '.join(bare)}.")


def _as_data(
    used: Sequence[Use],
    names: Mapping[str, Sequence[tuple[Policy, str]]],
    around: Sequence[SecondName],
    unmatched: Sequence[Unmatched],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "policies": [
            {
                "policy": one.policy.name,
                "place": one.policy.place,
                "block": one.policy.block,
                "backend": one.policy.backend,
                "limit": one.limit,
                "in_flight": one.in_flight,
                "keys": len(one.by_key),
                "busiest": one.busiest,
                "peak": one.peak,
                "wait": one.policy.wait,
                "max_waiting": one.policy.max_waiting,
                "waiting": one.waiting,
                "at_limit": [key if options["show_keys"] else masked(key) for key in one.full],
            }
            for one in used
        ],
        "url_names": {
            name: [{"policy": policy.name, "methods": methods or None} for policy, methods in pairs]
            for name, pairs in names.items()
        },
        "uncovered": [name for name, pairs in names.items() if not pairs],
        "also_reachable": [
            {"policy": one.policy.name, "covered": one.covered.name, "outside": one.outside.name} for one in around
        ],
        "unmatched": [
            {"policy": one.policy.name, "field": one.field, "pattern": one.pattern, "nearest": one.nearest}
            for one in unmatched
        ],
        "peaks_reset": bool(options["reset_peak"]),
    }
