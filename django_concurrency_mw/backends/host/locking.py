"""The locks: one flock for the whole table, and one byte per process by which the others see that it lives.

Both are on one file description, so the kernel lets go of them when the process ends, however it ends. Nothing here ever
waits: whoever finds the table locked comes again.

The calls keep the GIL where they can. Python's own let go of it, and to get it back behind a busy thread takes milliseconds,
in which this process would hold the lock of the whole host.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct
from collections.abc import Callable
from typing import Final

#: How often a lock is asked for before its being taken is believed.
TRIES: Final = 5
#: Byte LIVE + n is locked as long as the process with the number n lives. Far behind the end of any file.
LIVE: Final = 1 << 40

#: struct flock of 64-bit Linux: type, whence, start, length, pid.
_RANGE: Final = struct.Struct("hhqqi4x")


def _load() -> tuple[Callable[..., int], Callable[..., int], Callable[..., object]] | None:
    try:
        library = ctypes.PyDLL(None, use_errno=True)
        # No argtypes for flock: an int goes as a C int all the same, and a call takes a third less time.
        flock, control, unlocking = library.flock, library.fcntl, library["flock"]  # by [] it is another object
        unlocking.restype = None
        control.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    except (OSError, AttributeError):  # no dynamic linking here
        return None
    return flock, control, unlocking


_native = _load()


def _flock(fd: int, operation: int) -> int:
    """`flock` of the C library, where that cannot be called: 0, or -1 where it is locked."""
    try:
        fcntl.flock(fd, operation)
    except BlockingIOError:
        ctypes.set_errno(errno.EAGAIN)
        return -1
    return 0


#: What takes the lock: 0 from `lock(fd, EXCLUSIVE)`; and what lets go of it: `unlock(fd, UNLOCK)`. That one must be written in
#: C, as no signal handler of Python's may come before it has done its work. Both may raise OSError, and ValueError for -1.
lock: Callable[[int, int], int] = _native[0] if _native else _flock
unlock: Callable[[int, int], object] = _native[2] if _native else fcntl.flock
EXCLUSIVE: Final = fcntl.LOCK_EX | fcntl.LOCK_NB
UNLOCK: Final = fcntl.LOCK_UN


def try_lock(fd: int) -> bool:
    """Take the table's lock. False: somebody else has it. Raises: OSError where `fd` cannot be locked at all."""
    if not lock(fd, EXCLUSIVE):
        return True
    for _ in range(TRIES - 1):
        if not lock(fd, EXCLUSIVE):
            return True
    number = ctypes.get_errno()
    if number not in (errno.EAGAIN, errno.EINTR):
        raise OSError(number, "the table's file cannot be locked")
    return False


def claim(fd: int, numbers: int) -> int | None:
    """Be the first number below `numbers` that no living process is; None: all are taken."""
    for number in range(numbers):
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _RANGE.pack(fcntl.F_WRLCK, 0, LIVE + number, 1, 0))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        else:
            return number
    return None


def any_alive(fd: int, first: int, numbers: int = 1) -> bool:
    """Does another description than `fd` hold one of these numbers?"""
    asked = _RANGE.pack(fcntl.F_WRLCK, 0, LIVE + first, numbers, 0)
    if _native is None:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    else:
        buffer = ctypes.create_string_buffer(asked, _RANGE.size)
        if _native[1](fd, fcntl.F_OFD_GETLK, buffer):
            raise OSError(ctypes.get_errno(), "the processes of the table cannot be asked for")
        answer = buffer.raw
    return bool(_RANGE.unpack(answer)[0] != fcntl.F_UNLCK)
