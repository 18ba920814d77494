"""A time limit for a reader's function, in the reader's own thread, so that an endless loop gets a sentence."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TooLong(BaseException):
    """Not an Exception, so that `except Exception` in the code that is stopped does not catch it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TooLong inside of the block when it is not done after `seconds`, at the next line of Python that it runs.

    Works in any thread and on any system, unlike signals. One call into C, such as a long sleep, is not interrupted.
    """
    thread, lock, done = threading.get_ident(), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TooLong))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done = True
        timer.cancel()
