"""What the commands have in common: their errors in one line, libraries that are quiet."""

import argparse
import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator

_NEEDED = {"flax": "flax", "optax": "optax", "orbax": "orbax-checkpoint", "rich": "rich", "matplotlib": "matplotlib"}
_INSTALL = "pip install 'nsa-jax[train]'"
_LONGEST = 600  # characters of a message


def missing_packages() -> str | None:
    """What is not installed, and how to install it."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    return f"{', '.join(missing)} not installed; {_INSTALL}" if missing else None


def fail(program: str, reason: Exception | str, status: int) -> int:
    """Says in a line what was wrong; gives the status."""
    message = " ".join(str(reason).split()) or type(reason).__name__
    message = "".join(char if char.isprintable() else "?" for char in message)
    with contextlib.suppress(OSError, ValueError):  # there is nobody to tell
        print(
            f"{program}: error: {message if len(message) <= _LONGEST else message[:_LONGEST] + ' ...'}", file=sys.stderr
        )
        sys.stderr.flush()
    return status


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """What orbax and asyncio log of a failure is in the exception, and that in our message."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would end the process."""

    def error(self, message: str):
        raise ValueError(message)
