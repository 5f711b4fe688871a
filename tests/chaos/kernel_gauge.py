"""Who is inside, counted by the kernel: one locked byte each, free the moment its process is dead."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from pathlib import Path


class Gauge:
    """For `places` threads or tasks of several processes, each with a number of its own.

    Opened before the host store's file, so that its locks go before those do: whoever takes a dead one's slot does not find it
    here any more.
    """

    def __init__(self, path: Path, places: int) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.one_at_a_time = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        self.mutex = threading.Lock()
        self.places = places
        self.here: set[int] = set()

    def enter(self, place: int) -> set[int]:
        """Returns who is inside now."""
        with self.mutex:
            fcntl.flock(self.one_at_a_time, fcntl.LOCK_EX)
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            self.here.add(place)
            inside = self.here | {each for each in range(self.places) if self._is_locked(each)}
            fcntl.flock(self.one_at_a_time, fcntl.LOCK_UN)
        return inside

    def leave(self, place: int) -> None:
        with self.mutex:
            fcntl.flock(self.one_at_a_time, fcntl.LOCK_EX)
            fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, place)
            self.here.discard(place)
            fcntl.flock(self.one_at_a_time, fcntl.LOCK_UN)

    def _is_locked(self, place: int) -> bool:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
        answer = fcntl.fcntl(self.fd, fcntl.F_GETLK, asked)
        return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)
