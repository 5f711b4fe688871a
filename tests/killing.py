"""A process that kills itself before a bytecode of one's choice, inside the host store."""

from __future__ import annotations

import os
import signal
import struct
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from django_concurrency_mw.backends.host.store import HostBackend

PACKAGE = os.path.join("backends", "host", "")

#: What a process does, then the call in which it is killed.
Killed = tuple[Callable[[HostBackend], None], Callable[[HostBackend], Any]]


def may_be_over(point: int, points: range) -> bool:
    """How many steps a call takes may vary a little, as where it meets others: who was through before has ended by itself."""
    return point > 0.8 * points.stop


def killed_at(point: int, store: Callable[[], HostBackend], calls: Killed) -> int:
    """A process that kills itself before the bytecode of that number. Returns how many there were, 0 if it was killed."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            own = store()
            prepare, call = calls
            prepare(own)
            seen = 0

            def trace(frame: FrameType, event: str, argument: object) -> Any:
                nonlocal seen
                if PACKAGE not in frame.f_code.co_filename:
                    return None
                frame.f_trace_opcodes = True
                if event == "opcode":
                    seen += 1
                    if seen == point:
                        os.kill(os.getpid(), signal.SIGKILL)
                return trace

            sys._getframe().f_trace_opcodes = True
            sys.settrace(trace)
            call(own)
            sys.settrace(None)
            os.write(tell, struct.pack("i", seen))
        finally:
            os._exit(0)
    os.close(tell)
    answer = os.read(told, 4)
    os.close(told)
    os.waitpid(pid, 0)
    return struct.unpack("i", answer)[0] if answer else 0
