"""The client's address: which text in a request says where it comes from, and how far that text may be believed.

REMOTE_ADDR is the peer of the connection. A forwarding header is the client's own text until a trusted proxy has added to
it, so its hops are walked from the right, from the peer on, and the walk ends at the first one that is not trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from django.http import HttpRequest

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: No chain of proxies is longer; what a client writes beyond this is not looked at.
MOST_HOPS = 64
#: No address, with port and zone, is written with more characters.
LONGEST_HOP = 128
#: Addresses that share one bucket in IPv6: a site is given at least this many bits of its own.
IPV6_PREFIX = 64


#: Characters of a Forwarded header that are looked at, from its end.
LONGEST_HEADER = 16_384


@dataclass(frozen=True, slots=True)
class TrustedProxies:
    """The proxies whose word is taken: networks, and whether the peer of a unix socket is one of them."""

    networks: tuple[Network, ...] = ()
    unix: bool = False

    @classmethod
    def parse(cls, entries: Sequence[str]) -> TrustedProxies:
        """From CIDRs, single addresses and the word "unix". Raises: ValueError naming the first entry that is none."""
        networks = []
        for entry in entries:
            if entry != "unix":
                networks.append(ip_network(entry))
        return cls(tuple(networks), "unix" in entries)

    def trust(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


def client_address(request: HttpRequest, trusted: TrustedProxies, header: str) -> Address | None:
    """The client's own address; None where there is none. To count by, see `bucket`.

    `header` is the META key of the forwarding header (`HTTP_X_FORWARDED_FOR`).
    """
    peer = request.META.get("REMOTE_ADDR") or ""
    here = _parse(peer)
    if here is None:
        # A unix socket has no address: gunicorn says '', uvicorn leaves it out.
        if peer or not trusted.unix:
            return None
    elif not trusted.trust(here):
        return here
    for entry in _hops(request.META.get(header) or "", header):
        hop = _parse(entry)
        if hop is None:
            break
        here = hop
        if not trusted.trust(hop):
            break
    return here


def bucket(address: Address) -> str:
    """The text to count by, which addresses of one client share: `203.0.113.9`, or `2001:db8:1:2::/64` in IPv6."""
    if address.version == 4:
        return str(address)
    return str(IPv6Network((int(address), IPV6_PREFIX), strict=False))


def _parse(text: str) -> Address | None:
    # What is longer is no address, and must not reach a function that remembers its arguments.
    return parse_address(text) if len(text) <= LONGEST_HOP else None


@lru_cache(maxsize=1024)
def parse_address(text: str) -> Address | None:
    """An address as headers write it: with a port, in brackets, quoted, with a zone. None where it is not one."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    if len(text) > 64:
        return None
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _hops(value: str, header: str) -> Iterator[str]:
    """The hops of a forwarding header, nearest first; several header lines arrive joined by commas."""
    forwarded = header == "HTTP_FORWARDED"
    # In Forwarded a comma may stand inside a quoted value, which a client may have chosen (`host`).
    entries = _split(value[-LONGEST_HEADER:], ",") if forwarded else value.rsplit(",", MOST_HOPS)
    for entry in reversed(entries[-MOST_HOPS:]):
        yield _forwarded_for(entry) if forwarded else entry


def _split(text: str, separator: str) -> list[str]:
    """The parts of a list whose values may be quoted: a separator inside quotes parts nothing."""
    parts = [""]
    for number, piece in enumerate(text.split('"')):
        if number % 2:
            parts[-1] += f'"{piece}"'
        else:
            first, *rest = piece.split(separator)
            parts[-1] += first
            parts += rest
    return parts


def _forwarded_for(element: str) -> str:
    """The `for` parameter of one RFC 7239 element; '' where it has none."""
    for pair in _split(element, ";"):
        name, _, value = pair.partition("=")
        if name.strip().lower() == "for":
            return value.strip()
    return ""
