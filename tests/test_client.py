"""The client's address: nobody chooses it but the peer of the connection and the proxies that are trusted."""

from __future__ import annotations

import pytest
from django.test import RequestFactory
from hypothesis import given
from hypothesis import strategies as st

from django_concurrency_mw.client import TrustedProxies, bucket, client_address, parse_address

XFF = "HTTP_X_FORWARDED_FOR"


def address(peer: str | None, forwarded: str | None = None, trusted: str = "", header: str = XFF) -> str | None:
    request = RequestFactory().get("/")
    if peer is None:
        del request.META["REMOTE_ADDR"]
    else:
        request.META["REMOTE_ADDR"] = peer
    if forwarded is not None:
        request.META[header] = forwarded
    found = client_address(request, TrustedProxies.parse(trusted.split()), header)
    return None if found is None else bucket(found)


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "expected"),
    [
        ("203.0.113.9", None, "", "203.0.113.9"),
        # without trusted proxies the header is the client's own text
        ("203.0.113.9", "1.2.3.4", "", "203.0.113.9"),
        ("203.0.113.9", "1.2.3.4", "10.0.0.0/8", "203.0.113.9"),
        # the walk starts at the right and ends at the first hop that is not trusted
        ("10.0.0.1", "198.51.100.7", "10.0.0.0/8", "198.51.100.7"),
        ("10.0.0.1", "1.2.3.4, 198.51.100.7", "10.0.0.0/8", "198.51.100.7"),
        ("10.0.0.1", "1.2.3.4, 198.51.100.7, 10.1.1.1", "10.0.0.0/8", "198.51.100.7"),
        ("10.0.0.1", "10.3.3.3, 10.1.1.1", "10.0.0.0/8", "10.3.3.3"),
        ("10.0.0.1", None, "10.0.0.0/8", "10.0.0.1"),
        ("10.0.0.1", "", "10.0.0.0/8", "10.0.0.1"),
        # at an invalid entry the last valid hop counts
        ("10.0.0.1", "198.51.100.7, unknown", "10.0.0.0/8", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7, _hidden, 10.1.1.1", "10.0.0.0/8", "10.1.1.1"),
        ("10.0.0.1", "1.2.3.4, ,", "10.0.0.0/8", "10.0.0.1"),
        # how entries are written
        ("10.0.0.1", "198.51.100.7:5678", "10.0.0.0/8", "198.51.100.7"),
        ("10.0.0.1", '"[2001:db8:1:2::7]:443"', "10.0.0.0/8", "2001:db8:1:2::/64"),
        ("10.0.0.1", "2001:db8:1:2::7", "10.0.0.0/8", "2001:db8:1:2::/64"),
        # one client in IPv6 has a /64; a mapped address is the IPv4 one; a zone is dropped
        ("2001:db8:1:2:aaaa::1", None, "", "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.9", None, "", "203.0.113.9"),
        ("::ffff:10.0.0.1", "198.51.100.7", "10.0.0.0/8", "198.51.100.7"),
        ("fe80::1%eth0", None, "", "fe80::/64"),
        # the peer of a unix socket: '' at gunicorn, absent at uvicorn
        ("", None, "", None),
        (None, None, "", None),
        ("", "198.51.100.7", "", None),
        ("", "198.51.100.7", "10.0.0.0/8", None),
        ("", "198.51.100.7", "unix", "198.51.100.7"),
        (None, "1.2.3.4, 198.51.100.7, 10.0.0.1", "unix 10.0.0.0/8", "198.51.100.7"),
        ("", "garbage", "unix", None),
        ("nonsense", "198.51.100.7", "unix", None),
    ],
)
def test_the_address(peer: str | None, forwarded: str | None, trusted: str, expected: str | None) -> None:
    assert address(peer, forwarded, trusted) == expected


@pytest.mark.parametrize(
    ("forwarded", "expected"),
    [
        ("for=198.51.100.7", "198.51.100.7"),
        ('For="[2001:db8:1:2::7]:4711";proto=https', "2001:db8:1:2::/64"),
        ("for=1.2.3.4, for=198.51.100.7;by=10.0.0.9", "198.51.100.7"),
        ("proto=https", "10.0.0.1"),
        # a comma or a semicolon inside quotes parts nothing: a client may choose what stands in there
        ('for=198.51.100.7;host="x, for=203.0.113.66"', "198.51.100.7"),
        ('for=198.51.100.7;host="x;for=203.0.113.66"', "198.51.100.7"),
        ("for=unknown", "10.0.0.1"),
        ("for=_secret", "10.0.0.1"),
    ],
)
def test_the_standard_header(forwarded: str, expected: str) -> None:
    assert address("10.0.0.1", forwarded, "10.0.0.0/8", "HTTP_FORWARDED") == expected


def test_another_header() -> None:
    assert address("10.0.0.1", "198.51.100.7", "10.0.0.0/8", "HTTP_CF_CONNECTING_IP") == "198.51.100.7"


def test_a_header_without_end_is_not_walked_to_its_end() -> None:
    """A client that writes a hundred thousand trusted-looking hops gets the last one that is looked at, quickly."""
    parse_address.cache_clear()
    forwarded = ",".join(f"10.{n // 65536}.{n // 256 % 256}.{n % 256}" for n in range(100_000))
    assert address("10.0.0.1", forwarded, "10.0.0.0/8") is not None
    assert parse_address.cache_info().misses < 100


def test_a_peer_of_any_length_takes_no_memory() -> None:
    parse_address.cache_clear()
    for number in range(10):
        assert address(f"{number}" * 60_000) is None
    assert parse_address.cache_info().currsize == 0


@given(st.text(max_size=200), st.text(max_size=200))
def test_no_text_is_an_error(peer: str, forwarded: str) -> None:
    address(peer, forwarded, "unix 0.0.0.0/0 ::/0")
    address(peer, forwarded, "unix 0.0.0.0/0 ::/0", "HTTP_FORWARDED")
