"""Cuts a call short before any of its bytecodes, as a signal's handler that raises may, or only where such a one may; or does
something else there, as another thread may."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dis import opname
from types import FrameType, ModuleType
from typing import Any

#: Behind these the interpreter looks whether a signal has come.
LOOKS = ("CALL", "CALL_FUNCTION_EX", "CALL_KW", "RESUME", "JUMP_BACKWARD")


class Struck(BaseException):
    """Raised before a bytecode."""


def struck_at(point: int, module: ModuleType, call: Callable[[], Any], *, by_signals: bool = False) -> bool:
    """Do this, and raise before the bytecode of that number of the module's. False: it has fewer. `by_signals`: those are
    counted alone before which a signal's handler may run."""

    def strike() -> None:
        raise Struck

    try:
        done_at(point, module, call, strike, by_signals=by_signals)
    except Struck:
        return True
    return False


def done_at(
    point: int, module: ModuleType, call: Callable[[], Any], other: Callable[[], Any], *, by_signals: bool = True
) -> bool:
    """Do this, and the other thing before the bytecode of that number, as another thread may. False: it has fewer."""
    seen = 0
    last: dict[FrameType, str] = {}

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != module.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if not by_signals or last.get(frame) in LOOKS:
                seen += 1
            last[frame] = opname[frame.f_code.co_code[frame.f_lasti]]
            if seen == point:
                sys.settrace(None)
                other()
                return None
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return seen >= point
