"""Signals: an interrupt or termination is noted, a terminal that goes away is nothing."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Says whether an interrupt or termination signal has come; a second one acts as ever."""
    seen = []

    def note(number, _):
        seen.append(number)
        signal.signal(number, usual[number])

    with _handlers({signal.SIGINT: note, signal.SIGTERM: note}) as usual:
        yield lambda: bool(seen)


def hang_ups_ignored() -> contextlib.AbstractContextManager:
    """The terminal's going away does not end the process."""
    return _handlers({signal.SIGHUP: signal.SIG_IGN} if hasattr(signal, "SIGHUP") else {})


@contextlib.contextmanager
def _handlers(handlers: dict) -> Iterator[dict]:
    """Puts handlers in place and gives those that were there; Python allows that in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    usual = {number: signal.getsignal(number) or signal.SIG_DFL for number in handlers}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield usual
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
