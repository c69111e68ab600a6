"""Which files are read, and which of them are held out. A document is the contents of one file, as bytes."""

import collections
import contextlib
import os
import stat
import sysconfig
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

import numpy as np

from nsa_jax.train.folder import is_run
from nsa_jax.train.memory import host_memory, in_gib

# distributions differ in whether they ship the tests, so nobody trains on them
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

# of memory for a byte of text: itself, a token and a segment id
_PACKED = 1 + 4 + 4


def read_documents(data: Sequence[str], pattern: str, out: Path | None = None) -> list[bytes]:
    """The non-empty documents of files and folders, in an order that depends on the file names alone.

    Args:
        data: files or pipes, and folders to search whole; none for the standard library's sources. Links are followed.
            In a folder, hidden files, runs of `nsa-train` and whatever is not a regular file are left out. A file that
            is named twice, by a link too, is read once.
        pattern: which files of a folder count, such as "*.txt".
        out: a run's folder, left out wherever it is.

    Raises:
        ValueError: there is no document, or a name or the pattern is none.
        OSError: a file or folder cannot be read.
    """
    parts = PurePath(pattern).parts
    if not pattern.strip() or not parts or ".." in parts or PurePath(pattern).is_absolute():
        raise ValueError(f"pattern: expected file names inside a folder, such as '*.txt', got {pattern!r}")
    if data:
        files = [file for name in data for file in _named(name, parts, out)]
    else:
        root = Path(sysconfig.get_path("stdlib"))
        files = _inside(root, ("*.py",), out, _NOT_STDLIB)
    files = _once(files)
    size = sum(file.stat().st_size for file in files)
    if _PACKED * size > host_memory():
        raise ValueError(
            f"data: {in_gib(size)} of text take {in_gib(_PACKED * size)} of memory, of {in_gib(host_memory())} here"
        )
    documents = [contents for file in files if (contents := _read(file))]
    if not documents:
        where = ", ".join(data) or f"the standard library ({root}; no sources there? name files with --data)"
        raise ValueError(f"data: no non-empty files that match {pattern!r} in {where}")
    return documents


def _named(name: str, pattern: Sequence[str], out: Path | None) -> list[Path]:
    """The files of what a user names."""
    if not name.strip():
        raise ValueError(f"data: expected files and folders, got {name!r}")
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"data: no such file or folder: {name!r}")
    if path.is_dir():
        if _place(path.stat()) in _places(out):
            raise ValueError(f"out: expected another folder than that of the data, got {str(out)!r}")
        return _inside(path, pattern, out)
    if not (path.is_file() or path.is_fifo()):
        raise ValueError(f"data: expected a file, a pipe or a folder, got a device or socket: {name!r}")
    return [path]


def _inside(root: Path, pattern: Sequence[str], out: Path | None, skip: frozenset[str] = frozenset()) -> list[Path]:
    """The files below a folder whose paths end as the pattern says, each folder seen once, links to folders last."""
    found, seen, pending = [], _places(out), collections.deque([root])
    while pending:
        for name, folders, files in os.walk(pending.popleft(), onerror=_raise):
            folder = Path(name)
            if (place := _place(folder.stat())) in seen:
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(
                inner for inner in folders if not (inner.startswith(".") or inner in skip or is_run(folder / inner))
            )
            pending.extend(folder / inner for inner in folders if (folder / inner).is_symlink())  # not entered by walk
            paths = (folder / file for file in files if not file.startswith("."))
            found += [path for path in paths if _matches(path.relative_to(root).parts, ("**", *pattern))]
    found = [path for path in found if stat.S_ISREG(path.stat().st_mode)]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, in which "**" is any number of parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[count:], pattern[1:]) for count in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _once(files: Iterable[Path]) -> list[Path]:
    """The files without repetitions and without what this process writes its output to."""
    seen = _places(1, 2)
    places = {file: _place(file.stat()) for file in files}
    return [file for file, place in places.items() if not (place in seen or seen.add(place))]


def _places(*paths: Path | int | None) -> set[tuple[int, int]]:
    """Where those of some paths and open files are that exist."""
    places = set()
    for path in filter(None, paths):
        with contextlib.suppress(OSError, ValueError):  # it does not exist, or its name is none
            places.add(_place(os.stat(path)))
    return places


def _place(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _read(file: Path) -> bytes:
    # opening a pipe waits for a writer, unless told not to; where there is none it is empty
    number = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(number, True)
    with open(number, "rb") as opened:
        return opened.read()


def _raise(error: OSError):
    raise error


def split(documents: Sequence[bytes], held_out: float, seed: int) -> tuple[list[bytes], list[bytes]]:
    """(training, held-out) documents, a fraction `held_out` of them but at least one; a lone document is cut in two.

    Raises:
        ValueError: there is a single byte.
    """
    if len(documents) == 1:
        if len(documents[0]) < 2:
            raise ValueError("data: expected at least two bytes of text, to train on and to hold out, got one")
        cut = min(max(round(len(documents[0]) * (1 - held_out)), 1), len(documents[0]) - 1)
        return [documents[0][:cut]], [documents[0][cut:]]
    count = min(max(round(len(documents) * held_out), 1), len(documents) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(documents))[:count].tolist())
    training = [document for i, document in enumerate(documents) if i not in chosen]
    return training, [documents[i] for i in sorted(chosen)]
