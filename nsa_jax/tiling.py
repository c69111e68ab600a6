"""What a GPU holds, and the tiles that fit. Each backend has the tables of its own kernels, `gpu/portable`, `gpu/sm90`.

A table lists tiles from the one that is fastest where it fits to the one that fits anywhere; a kernel gets the first
that the architecture's shared memory holds. Nothing is tuned at run time. The tables were measured on an H200 with
bfloat16, widths of 128 and G = 16; other rows follow from the registers and spills that the compiler reports.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

# Shared memory that one program may use, KiB, by compute capability.
SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
SMALLEST_SHARED_MEMORY = 99
INTERPRETER = 0  # in place of a compute capability


class Tile(NamedTuple):
    """rows: query rows a side; keys: keys a side; warps, stages: of the launch."""

    rows: int
    keys: int
    warps: int
    stages: int


def fit(tiles: Sequence[Tile], capability: int, footprint: Callable[[Tile], int]) -> Tile:
    """The first tile whose footprint, in bytes, the shared memory holds, else the last one."""
    limit = 1024 * SHARED_MEMORY.get(capability, SMALLEST_SHARED_MEMORY)
    return next((tile for tile in tiles if footprint(tile) <= limit), tiles[-1])


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def parts(width: int) -> tuple[int, ...]:
    """The power-of-two tile widths that hold a head width: one or two, at least 16 each, as few columns as possible."""
    one = max(16, 1 << (width - 1).bit_length())
    large = one // 2
    if large < 16:
        return (one,)
    small = max(16, 1 << max(width - large - 1, 0).bit_length())
    return (large, small) if large + small < one else (one,)


def descriptors(capability: int, widths: Sequence[int]) -> bool:
    """Whether arrays of these widths are read through tensor descriptors: sm_90 and later, each width a single tile."""
    return (capability >= 90 or capability == INTERPRETER) and all(parts(width) == (width,) for width in widths)


def loads_ahead(capability: int) -> bool:
    """Whether loops load what the next step needs at the end of a step: for sm_100 Triton 3.9 fails on such a loop."""
    return not 100 <= capability < 120
