"""A screen that costs no run: what it cannot show is replaced, and one that goes away is no longer written to."""

import contextlib
import io
import os
from typing import TextIO

from rich.console import Console
from rich.text import Text

# narrower lines say nothing, wider ones are no screen's
_NARROWEST, _WIDEST, _USUAL = 20, 1000, 80


class _Screen(io.TextIOBase):
    """Text to a stream, or to nothing once the stream fails (a closed pipe, a terminal that is gone, a full disk)."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def write(self, text: str) -> int:
        self._try(lambda stream: stream.write(text.encode(self.encoding, "replace").decode(self.encoding)))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def _try(self, action) -> None:
        if self._stream is None:
            return
        try:
            action(self._stream)
        except (OSError, ValueError):
            gone, self._stream = self._stream, None
            with contextlib.suppress(OSError, ValueError):  # io.UnsupportedOperation: no file is behind it
                _to_null(gone.fileno())  # what is still in its buffer is flushed at exit


def open_console(stream: TextIO | None) -> Console:
    """A console on a stream, of a width that can be read."""
    console = Console(file=_Screen(stream), highlight=False)
    if not _NARROWEST <= console.width <= _WIDEST:
        console.width = _USUAL
    return console


def say(console: Console, text: str) -> None:
    """A line as it is: brackets in a file's name are no markup."""
    console.print(Text(printable(text)), soft_wrap=True)


def printable(text: str) -> str:
    """The text without characters that steer a terminal or that no encoding has."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def fill_standard_streams() -> None:
    """Opens those of the files 0 to 2 that are closed: the next file opened would else get what is meant for them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _to_null(number)


def _to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
