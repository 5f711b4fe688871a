"""What stores keep of a text for people: all of it, or its beginning where it is long, in one line."""

from __future__ import annotations

from typing import Final

#: Bytes of a name or a key that every store keeps; longer ones may be cut.
KEPT_BY_ALL: Final = 60


def is_kept_of(shown: str, text: str) -> bool:
    """Is `shown` what a store keeps of this text?"""
    return shown == text or (
        len(shown.encode()) >= KEPT_BY_ALL and text.replace("\n", " ").startswith(shown.replace("\n", " "))
    )
