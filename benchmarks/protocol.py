"""Requests and replies between the benchmark and the processes that measure: one line of JSON each.

A process that measures may crash, hang, or keep a broken GPU context. The benchmark then goes on with a new one.
"""

import json
import os
import selectors
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LENGTH = 200


class WorkerError(Exception):
    """A request failed; the message is one line."""


class Worker:
    """A process that answers requests.

    Args:
        command: its command line.
        environment: of the process.
        log: file that its standard error is appended to.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self.log = log
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream
            )

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The reply.

        Raises:
            WorkerError: the request failed, or there was no reply in time, or the process ended. Close the worker then.
        """
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._ended()) from None
        reply = json.loads(self._line(time.monotonic() + seconds, seconds))
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def _line(self, deadline: float, seconds: float) -> bytes:
        received = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerError(f"no reply within {seconds:.0f} s")
                part = os.read(self._process.stdout.fileno(), 65536)
                if not part:
                    raise WorkerError(self._ended())
                received += part
        return received

    def _ended(self) -> str:
        code = self._process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return shorten(f"process ended with {code}: {lines[-1] if lines else 'no message'}")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers the requests on standard input until it ends; an exception is a reply too.

    Its traceback, and what anything else prints, goes to standard error.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": shorten(f"{type(error).__name__}: {error}".rstrip(": "))}
        print(json.dumps(reply), file=replies, flush=True)


def shorten(message: str) -> str:
    """A message on one line of bounded length."""
    message = " ".join(message.split())
    return message if len(message) <= _LENGTH else message[: _LENGTH - 1] + "…"
