"""Which files are read, and which of them are held out. A document is the contents of one file, as bytes."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# distributions differ in whether they ship the tests, so nobody trains on them
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


def read_documents(data: Sequence[str], pattern: str) -> list[bytes]:
    """The non-empty documents of files and folders, in an order that depends on the file names alone.

    Args:
        data: files, and folders to search whole, hidden files left out; none for the standard library's sources.
        pattern: which files of a folder count, such as "*.txt".

    Raises:
        ValueError: there is no document.
        OSError: a file or folder cannot be read.
    """
    if data:
        files = [file for name in data for file in _files(Path(name), pattern)]
    else:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _files(root, "*.py") if not _NOT_STDLIB & {*file.relative_to(root).parts}]
    documents = [contents for file in files if (contents := file.read_bytes())]
    if not documents:
        where = ", ".join(data) or f"the standard library ({root}; no sources there? name files with --data)"
        raise ValueError(f"data: no non-empty files that match {pattern!r} in {where}")
    return documents


def _files(path: Path, pattern: str) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"data: no such file or folder: {path}")
    if not path.is_dir():
        return [path]
    found = (file for file in path.rglob(pattern) if not file.is_dir())
    found = (file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
    return sorted(found, key=lambda file: file.relative_to(path).parts)


def split(documents: Sequence[bytes], held_out: float, seed: int) -> tuple[list[bytes], list[bytes]]:
    """(training, held-out) documents, a fraction `held_out` of them but at least one; a lone document is cut in two."""
    if len(documents) == 1:
        cut = round(len(documents[0]) * (1 - held_out))
        return [documents[0][:cut]], [documents[0][cut:]]
    count = min(max(round(len(documents) * held_out), 1), len(documents) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(documents))[:count].tolist())
    training = [document for i, document in enumerate(documents) if i not in chosen]
    return training, [documents[i] for i in sorted(chosen)]
