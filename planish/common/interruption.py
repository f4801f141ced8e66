"""Ctrl-C is KeyboardInterrupt to the end, also where a library on the way made another error of it (safetensors and torch do, once in 66 runs)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_count = 0  # of SIGINTs


def _noted(number: int, frame: FrameType | None) -> None:
    global _count
    _count += 1
    signal.default_int_handler(number, frame)


@contextmanager
def interruptible() -> Iterator[None]:
    """While it lasts. Whoever has a SIGINT handler of its own keeps it, and so do other threads than the main one."""
    before, handler = _count, signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread() and handler is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _noted)
    try:
        yield
    except Exception as error:
        if _count > before:
            raise KeyboardInterrupt from error
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)
