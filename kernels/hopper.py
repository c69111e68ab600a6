"""The names of sm90/rows.py and sm90/ptx.py, for the kernels that have not moved yet."""

from .sm90.ptx import arrive
from .sm90.rows import LN2, LOG2E, WIDTH, as_columns, as_rows, copy_rows, lanes, place_of, product_layout, store_rows

__all__ = [
    "LN2", "LOG2E", "WIDTH", "arrive", "as_columns", "as_rows", "copy_rows", "lanes", "place_of", "product_layout",
    "store_rows",
]  # fmt: skip
