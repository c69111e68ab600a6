"""The folder of a run: its files' names, its lock, and how files come into it whole."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

METRICS, PLOT, SAMPLE, CHECKPOINTS, LOCK = "metrics.jsonl", "loss.png", "sample.txt", "checkpoints", ".lock"


def is_run(folder: Path) -> bool:
    """Whether a run has been in the folder."""
    return (folder / METRICS).is_file() and (folder / CHECKPOINTS).is_dir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of the folder for as long as this process lives, at most.

    Raises:
        ValueError: another run is there.
    """
    with (folder / LOCK).open("ab") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"out: another run is at work in {folder}; name another folder with --out") from None
        yield


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """A path to a folder, for a library that takes some characters for patterns or addresses, or knows only text.

    It is the folder's own unless that has such a character.
    """
    path = folder.absolute()
    if re.fullmatch(r"[\w/.,+=@~#% -]*", str(path)):
        yield path
        return
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        link = Path(f"/proc/self/fd/{number}")
        yield link if link.exists() else path
    finally:
        os.close(number)


def set_aside(path: Path) -> Path | None:
    """Renames a file that is there, so that nothing is written over it; gives its new name."""
    if not os.path.lexists(path):
        return None
    number = 1
    while os.path.lexists(new := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        number += 1
    return path.rename(new)


def write_whole(path: Path, contents: bytes) -> None:
    """Writes a file that is there whole or not at all, whenever the process is killed."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
