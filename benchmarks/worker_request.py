"""A row as a request to a process that measures, and back."""

import dataclasses
from typing import Any

from plan import FULL, SMOKE, Case, Row, Scale


def encode(row: Row, *, smoke: bool, implementation: str) -> dict[str, Any]:
    """The request to measure a row."""
    return {"kind": "row", "row": dataclasses.asdict(row), "smoke": smoke, "implementation": implementation}


def decode(request: dict[str, Any]) -> tuple[Row, Scale, str]:
    """(row, sizes, implementation) of a request."""
    row = Row(**{**request["row"], "case": Case(**request["row"]["case"])})
    return row, SMOKE if request["smoke"] else FULL, request["implementation"]
