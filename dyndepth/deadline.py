"""A time limit for code that runs in a process's main thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

AGAIN = 1.0
"""Seconds after which the limit is enforced again, should something have swallowed it."""


class TimeIsUp(BaseException):
    """The limit is over. No Exception, so that code which catches all of them lets it pass."""


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raise TimeIsUp inside the block once ``seconds`` are over; None: never.

    It reaches Python code only: a call into a library that hangs goes on hanging, and whoever holds
    the process has to end it. Outside of a main thread, or without POSIX timers, it does nothing.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if seconds is None or not in_main or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, _up)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _up(number: int, frame: Any) -> None:
    raise TimeIsUp
