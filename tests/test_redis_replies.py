"""Where a reply begins and ends, whatever it is, and which are numbers."""

from __future__ import annotations

from typing import Any

import pytest

from django_concurrency_mw.backends.redis.replies import numbers, reply

NUMBERS: list[tuple[bytes, Any]] = [
    (b":0\r\n", 0),
    (b":-3\r\n", -3),
    (b":4503599627370496\r\n", 2**52),
    (b"*3\r\n:1\r\n:-2\r\n:33\r\n", [1, -2, 33]),
    (b"*0\r\n", []),
]
OTHERS = [
    b"+OK\r\n",
    b"-NOSCRIPT No matching script.\r\n",
    b"$0\r\n\r\n",
    b"$6\r\n:1\r\n:2\r\n",
    b"$-1\r\n",
    b"*-1\r\n",
    b"*2\r\n$1\r\n1\r\n$2\r\n22\r\n",
    b"*2\r\n:1\r\n-ERR of one\r\n",
    b"*2\r\n:1\r\n*1\r\n:2\r\n",
    b"_\r\n",
    b"#t\r\n",
    b",1.5\r\n",
    b"(12345678901234567890\r\n",
    b"!5\r\nERR x\r\n",
    b"=7\r\ntxt:abc\r\n",
    b"~2\r\n:1\r\n:2\r\n",
    b"%1\r\n+key\r\n:1\r\n",
    b">2\r\n+invalidate\r\n*1\r\n$1\r\nk\r\n",
    b"|1\r\n+ttl\r\n:3\r\n:7\r\n",
]


@pytest.mark.parametrize(("packed", "value"), [*NUMBERS, *[(packed, None) for packed in OTHERS]])
def test_a_reply_ends_where_it_ends_and_not_before_it_is_whole(packed: bytes, value: Any) -> None:
    before = b"+A\r\n"
    for more in (b"", b":9\r\n", b"$3\r\nabc\r\n"):
        assert reply(before + packed + more, len(before)) == (value, len(before) + len(packed))
    for cut in range(len(packed)):
        assert reply(before + packed[:cut], len(before)) == (None, -1)


def test_what_no_server_says_is_an_error() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        reply(b":one\r\n", 0)
    for said in (b":1\r\n:one\r\n", b"*one\r\n", b"*1\r\n:one\r\n"):
        with pytest.raises(ValueError, match="invalid literal"):
            numbers(said)


@pytest.mark.parametrize(("packed", "value"), [*NUMBERS, *[(packed, None) for packed in OTHERS]])
def test_numbers_are_read_together_up_to_what_is_none_or_not_whole(packed: bytes, value: Any) -> None:
    before = b":7\r\n*2\r\n:-8\r\n:9\r\n"
    for cut in range(len(packed)):
        assert numbers(before + packed[:cut]) == ([7, [-8, 9]], len(before))
        assert numbers(packed[:cut]) == ([], 0)
    both = before + packed + before
    expected = [7, [-8, 9]], len(before)
    if value is not None:
        expected = [7, [-8, 9], value, 7, [-8, 9]], len(both)
    assert numbers(both) == expected
