"""The results of a benchmark on disk, written after every row: a run that was cut short goes on where it stopped."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

FILE = "results.json"
_FORMAT = 1


class Results:
    """results.json of a folder.

    Args:
        folder: made if it is not there.
        settings: what all rows of a file share; a file with others is refused.
        run: facts about this run (versions, command line), kept beside those of earlier runs.
        fresh: drop what is there.

    Raises:
        ValueError: the file is of another configuration or of another format.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], run: dict[str, Any], fresh: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self._source = run["source"]
        self._content = {"format": _FORMAT, "settings": settings, "runs": [], "rows": {}}
        if self._path.exists() and not fresh:
            self._content = self._checked(json.loads(self._path.read_text()), settings)
        self._content["runs"].append({"date": _now(), **run})
        self._save()

    def _checked(self, content: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        if content.get("format") != _FORMAT:
            found = content.get("format")
            raise ValueError(f"{self._path}: expected format {_FORMAT}, got {found}; give --fresh or another --out")
        for name, value in settings.items():
            found = content["settings"].get(name)
            if found != value:
                raise ValueError(
                    f"{self._path}: measured with {name} {found!r}, now it is {value!r}; give --fresh or another --out"
                )
        return content

    def is_done(self, key: str) -> bool:
        """Whether a row was measured, without an error, on the source that is here now."""
        row = self._content["rows"].get(key)
        return row is not None and "error" not in row and row["source"] == self._source

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keeps a row, in place of an earlier one of that key, and writes the file."""
        self._content["rows"][key] = {"date": _now(), "source": self._source, **row}
        self._save()

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows by key."""
        return self._content["rows"]

    @property
    def settings(self) -> dict[str, Any]:
        """What all rows share."""
        return self._content["settings"]

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The runs that the rows come from, this one last."""
        return self._content["runs"]

    def _save(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._content, indent=1) + "\n")
        os.replace(partial, self._path)


def milliseconds(row: dict[str, Any] | None) -> float | None:
    """Device time of a row: that inside one program where it was taken, else that of calls of their own."""
    if row is None or "ms" not in row:
        return None
    return row["ms"] if row["chained_ms"] is None else row["chained_ms"]


def teraflops(row: dict[str, Any] | None) -> float | None:
    """TFLOP/s of a row; None where it has no time or no arithmetic."""
    time = milliseconds(row)
    return row["flops"] / time / 1e9 if time and row["flops"] else None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
