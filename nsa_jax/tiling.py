"""Tile sizes by architecture and shape: tables, nothing tuned at run time.

A table lists tiles from the one that is fastest where it fits to the one that fits anywhere; a kernel gets the first
that the architecture's shared memory holds. The tables were measured on an H200 with bfloat16, widths of 128 and
G = 16; other rows follow from the registers and spills that the compiler reports.
"""

from collections.abc import Sequence
from typing import NamedTuple

# Shared memory that one program may use, bytes, by compute capability.
SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
SMALLEST_SHARED_MEMORY = 99
INTERPRETER = 0  # in place of a compute capability


class Tile(NamedTuple):
    """rows: (token, head) pairs a side; keys: keys a side; warps, stages: of the launch."""

    rows: int
    keys: int
    warps: int
    stages: int


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


def _fit(tiles: tuple[Tile, ...], capability: int, footprint) -> Tile:
    limit = 1024 * SHARED_MEMORY.get(capability, SMALLEST_SHARED_MEMORY)
    return next((tile for tile in tiles if footprint(tile) <= limit), tiles[-1])


_INTERVAL_SMALLER = (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))
_INTERVAL_FORWARD = (Tile(128, 64, 4, 2), *_INTERVAL_SMALLER)
_INTERVAL_FORWARD_WIDE = (Tile(128, 64, 8, 2), *_INTERVAL_SMALLER[1:])
_INTERVAL_BACKWARD_QUERY = (Tile(128, 32, 8, 3), *_INTERVAL_SMALLER)
_INTERVAL_BACKWARD_KEY_VALUE = (Tile(64, 128, 8, 4), Tile(64, 128, 8, 3), *_INTERVAL_SMALLER)
_INTERVAL_BACKWARD_KEY_VALUE_WIDE = (Tile(64, 64, 8, 2), *_INTERVAL_SMALLER[1:])
# exact float32 products are no tensor-core products: a thread's share of a larger tile does not fit its registers
_INTERVAL_FLOAT32 = (Tile(32, 32, 8, 1), Tile(16, 16, 4, 1))
_INTERVAL_INTERPRETED = Tile(64, 32, 4, 1)


def _copies(capability: int, stages: int) -> int:
    """Of the tiles that a backward loop loads, how many are in shared memory at once: sm_100 keeps one more."""
    return stages + (100 <= capability < 120)


def _by_width(columns: int, itemsize: int, tiles: tuple[Tile, ...], wide: tuple[Tile, ...]) -> tuple[Tile, ...]:
    if itemsize > 2:
        return _INTERVAL_FLOAT32
    return tiles if columns <= 256 else wide  # beyond, accumulators of the tuned tiles do not fit the registers


def interval_forward(capability: int, columns: int, itemsize: int) -> Tile:
    """Tile of kernels/interval.py forward; columns: key plus value columns."""
    if capability == INTERPRETER:
        return _INTERVAL_INTERPRETED
    tiles = _by_width(columns, itemsize, _INTERVAL_FORWARD, _INTERVAL_FORWARD_WIDE)
    return _fit(tiles, capability, lambda t: itemsize * columns * (t.rows + t.stages * t.keys))


def interval_backward_query(capability: int, columns: int, itemsize: int) -> Tile:
    """Tile of kernels/interval.py backward_query; columns: key plus value columns."""
    if capability == INTERPRETER:
        return _INTERVAL_INTERPRETED
    tiles = _by_width(columns, itemsize, _INTERVAL_BACKWARD_QUERY, _INTERVAL_BACKWARD_QUERY)

    def footprint(t):
        return itemsize * (columns * (t.rows + _copies(capability, t.stages) * t.keys) + t.rows * t.keys)

    return _fit(tiles, capability, footprint)


def interval_backward_key_value(capability: int, columns: int, itemsize: int) -> Tile:
    """Tile of kernels/interval.py backward_key_value; columns: key plus value columns."""
    if capability == INTERPRETER:
        return _INTERVAL_INTERPRETED
    tiles = _by_width(columns, itemsize, _INTERVAL_BACKWARD_KEY_VALUE, _INTERVAL_BACKWARD_KEY_VALUE_WIDE)

    def footprint(t):
        return itemsize * (columns * (t.keys + _copies(capability, t.stages) * t.rows) + 2 * t.rows * t.keys)

    return _fit(tiles, capability, footprint)


def interval_splits(programs: int, queries_per_key_tile: int, rows: int) -> int:
    """Into how many shares the queries of a key tile are cut, so that few key tiles still fill the GPU."""
    wanted = -(-1024 // max(programs, 1))
    return max(1, min(wanted, 64, queries_per_key_tile // (8 * rows)))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


WALK_SORTS = 2048  # entries up to which kernels/block_lists.py sorts: beyond, its code is too long to compile


def walk_units(entries: int) -> int:
    """Tiles of tokens that one program of kernels/block_lists.py does, each with that many entries."""
    return max(1, 512 // entries)


def walk_warps(entries: int) -> int:
    """Warps of a program of kernels/block_lists.py: up to 8 entries a thread, where so many threads can be."""
    return max(4, min(16, entries // 256))


# for G = 16: four tokens to a tile
_SELECTED_BACKWARD_QUERY = (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 16, 4, 2), Tile(64, 16, 4, 1))
_SELECTED_FORWARD = (Tile(64, 64, 4, 3), *_SELECTED_BACKWARD_QUERY)
_SELECTED_BACKWARD_KEY_VALUE = (
    Tile(32, 64, 4, 5),
    Tile(64, 64, 4, 2),
    Tile(64, 32, 4, 2),
    Tile(32, 32, 4, 1),
    Tile(16, 16, 4, 1),
)
_SELECTED_BACKWARD_KEY_VALUE_WIDE = (Tile(64, 32, 8, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))


def selected_tokens(group: int) -> int:
    """Tokens that walk their blocks together in kernels/selected.py."""
    return max(1, min(16, _selected_rows(group) // group))


def _selected_rows(group: int) -> int:
    # as many tokens as the table has at G = 16
    return max(power_of_two(group), min(128, max(16, 4 * power_of_two(group))))


def selected_forward(capability: int, columns: int, itemsize: int, group: int, block_size: int) -> Tile:
    """Tile of kernels/selected.py forward; columns: key plus value columns."""
    return _selected_walk(_SELECTED_FORWARD, capability, columns, itemsize, group, block_size)


def selected_backward_query(capability: int, columns: int, itemsize: int, group: int, block_size: int) -> Tile:
    """Tile of kernels/selected.py backward_query; columns: key plus value columns."""
    return _selected_walk(_SELECTED_BACKWARD_QUERY, capability, columns, itemsize, group, block_size)


def selected_ahead(capability: int) -> bool:
    """Whether kernels/selected.py looks up a block a step ahead: for sm_100 Triton 3.9 fails on such a loop."""
    return not 100 <= capability < 120


def _selected_walk(tiles, capability: int, columns: int, itemsize: int, group: int, block_size: int) -> Tile:
    rows = _selected_rows(group)
    if capability == INTERPRETER:
        return Tile(rows, min(block_size, 32), 4, 1)
    warps = min(8, rows // 16 * max(1, power_of_two(columns) // 256))
    tiles = tuple(t._replace(rows=rows, warps=warps) for t in tiles if t.keys <= block_size)
    return _fit(tiles, capability, lambda t: itemsize * columns * (t.rows + t.stages * t.keys))


class HopperTile(NamedTuple):
    """tokens: of a unit; keys: of a slot of the ring, of which there are `stages`."""

    tokens: int
    keys: int
    stages: int


_HOPPER_ROWS = 128  # (token, head) pairs of a unit
_HOPPER_BARRIERS = 1024  # bytes of shared memory beside the ring
_HOPPER_STAGES = 12


def selected_hopper(
    capability: int, widths: Sequence[int], itemsize: int, group: int, block_size: int
) -> HopperTile | None:
    """Tile of kernels/sm90/selected.py; None where it is not for this architecture or shape.

    Args:
        capability: of the architecture.
        widths: of keys and of values.
        itemsize: bytes of an element.
        group: query heads of a key head.
        block_size: keys of a block.
    """
    fits = all(width in (64, 128) for width in widths) and group in (8, 16, 32, 64, 128) and block_size >= 32
    if capability != 90 or itemsize != 2 or not fits:
        return None
    keys = min(block_size, 64)
    room = 1024 * SHARED_MEMORY[capability] - _HOPPER_BARRIERS
    return HopperTile(_HOPPER_ROWS // group, keys, min(_HOPPER_STAGES, room // (itemsize * keys * sum(widths))))


HOPPER_KEYS = 64  # of a program of kernels/sm90/key_pass.py, two of which share a multiprocessor
HOPPER_KEYS_REGISTERS = 128  # of a thread, so that they do
_HOPPER_KEYS_ROWS = 64  # of a slot of its ring
_HOPPER_KEYS_STATISTICS = 12  # bytes beside a row
_HOPPER_KEYS_STAGES = 4


def hopper_keys_stages(key_width: int, value_width: int) -> int:
    """Slots of the ring of kernels/sm90/key_pass.py, for elements of two bytes."""
    row = 2 * (key_width + value_width)
    room = 1024 * (SHARED_MEMORY[90] // 2) - _HOPPER_BARRIERS - HOPPER_KEYS * row
    return min(_HOPPER_KEYS_STAGES, room // (_HOPPER_KEYS_ROWS * (row + _HOPPER_KEYS_STATISTICS)))


INTERVAL_HOPPER_ROWS = 192  # of a unit of kernels/sm90/interval.py
INTERVAL_HOPPER_KEYS = 512  # seen by a query at most: where it is fewer, beginning and ending a unit costs too much


def interval_hopper(capability: int, widths: Sequence[int], itemsize: int, group: int) -> bool:
    """Whether kernels/sm90/interval.py is for this architecture and shape; arguments as in `selected_hopper`."""
    fits = all(width in (64, 128) for width in widths) and group in (1, 2, 4, 8, 16, 32, 64, 128)
    return capability == 90 and itemsize == 2 and fits


def interval_hopper_stages(key_width: int, value_width: int) -> int:
    """Slots of the ring of kernels/sm90/interval.py, beside the queries of two units, for elements of two bytes."""
    room = 1024 * SHARED_MEMORY[90] - _HOPPER_BARRIERS - 2 * 2 * INTERVAL_HOPPER_ROWS * key_width
    return min(_HOPPER_STAGES, room // (2 * HOPPER_KEYS * (key_width + value_width)))


def interval_hopper_shares(programs: int, rows: int, reach: int) -> int:
    """Into how many shares the rows of kernels/sm90/interval_keys.py are cut, so that few key tiles fill the GPU.

    Args:
        programs: key tiles of all heads and rows of the batch.
        rows: (token, head of the group) pairs.
        reach: most queries that see one key, 0 if any number can.
    """
    if reach:
        return 1  # shares are of the whole row: of a key's few queries most would hold none
    return max(1, min(-(-2048 // max(programs, 1)), 64, rows // (8 * _HOPPER_KEYS_ROWS)))


def hopper_together(group: int) -> int:
    """Tokens of a warpgroup that must want a block for it to be multiplied as one: three quarters of the 64 rows."""
    return -(-48 // group)


def selected_backward_key_value(capability: int, columns: int, itemsize: int, block_size: int) -> Tile:
    """Tile of kernels/selected.py backward_key_value; columns: key plus value columns."""
    if capability == INTERPRETER:
        return Tile(32, min(block_size, 32), 4, 1)
    tiles = _SELECTED_BACKWARD_KEY_VALUE if columns <= 256 else _SELECTED_BACKWARD_KEY_VALUE_WIDE
    tiles = tuple(t for t in tiles if t.keys <= block_size and (itemsize == 2 or t.keys <= 32))
    return _fit(tiles, capability, lambda t: itemsize * (columns * (t.keys + t.stages * t.rows) + 2 * t.rows * t.keys))


def selected_chunk(capability: int) -> int:
    """Tokens that one item of kernels/selected.py backward_key_value holds: small enough that a block that all tokens
    choose is shared among many programs, large enough that the partial sums stay a fraction of the inputs."""
    return 16 if capability == INTERPRETER else 1024


def selected_stretch(capability: int) -> int:
    """Tokens in a stretch of the row, by which the items of kernels/selected.py are ordered: few enough that what
    programs read together is often in the L2 still, enough that the partial sums stay a fraction of the inputs."""
    return 48 if capability == INTERPRETER else 16384


class SelectionTile(NamedTuple):
    """tokens, heads: the side of queries; keys: the other; parts: key tiles in a chunk; entries: in a token's list."""

    tokens: int
    heads: int
    keys: int
    parts: int
    entries: int
    warps: int
    stages: int


_SELECTION = (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 1))
_SELECTION_BLOCKS = 256  # in a chunk
_SELECTION_OVERLAPPING = (Tile(128, 64, 4, 3), Tile(128, 64, 4, 2), *_SELECTION)  # where a block is several strides
_SELECTION_OVERLAPPING_BLOCKS = 64
_SELECTION_SCRATCH = 16 * 1024  # bytes that layout changes take


def selection(capability: int, columns: int, itemsize: int, group: int, count: int, share: int) -> SelectionTile:
    """Tile of kernels/select_blocks.py; columns: of keys, count: most blocks to select, share: strides in a block."""
    heads, entries = power_of_two(group), selection_entries(count)
    if capability == INTERPRETER:
        tile, blocks = Tile(64, 32, 4, 1), 32
    else:
        tiles, blocks = _SELECTION, _SELECTION_BLOCKS
        if share > 1:
            tiles, blocks = _SELECTION_OVERLAPPING, _SELECTION_OVERLAPPING_BLOCKS
        tiles = tiles if itemsize == 2 else _SELECTION[2:]
        tile = _fit(tiles, capability, lambda t: itemsize * columns * (t.rows + t.stages * t.keys) + _SELECTION_SCRATCH)
    tokens = max(1, min(16, tile.rows // heads, 4096 // entries))
    keys = max(tile.keys, share)
    return SelectionTile(
        tokens, max(heads, 16 // tokens), keys, max(1, blocks * share // keys), entries, tile.warps, tile.stages
    )


def selection_entries(count: int) -> int:
    """Entries in a token's list, of which it uses at most `count`."""
    return max(32, power_of_two(max(count, 1)))


SELECTION_HOPPER_ROWS = 256  # of a unit of kernels/sm90/select_blocks.py
_SELECTION_HOPPER_WINDOWS = 256  # in a chunk


def selection_hopper(capability: int, width: int, itemsize: int, group: int, count: int, share: int) -> bool:
    """Whether kernels/sm90/select_blocks.py is for this architecture and shape; width: of keys; the rest as in
    `selection`."""
    fits = width in (64, 128) and group in (8, 16, 32, 64) and count <= 64 and share in (1, 2, 4, 8)
    return capability == 90 and itemsize == 2 and fits


def selection_hopper_stages(width: int, group: int) -> int:
    """Slots of the ring of kernels/sm90/select_blocks.py, beside the queries of two units and two chunks of sums."""
    queries = 2 * SELECTION_HOPPER_ROWS * (2 * width + 4)  # with a number in float32 each
    sums = 2 * 4 * SELECTION_HOPPER_ROWS // group * _SELECTION_HOPPER_WINDOWS
    room = 1024 * SHARED_MEMORY[90] - _HOPPER_BARRIERS - queries - sums
    return min(_HOPPER_STAGES, room // (2 * HOPPER_KEYS * width))


def selected_does_sliding(window_size: int, block_size: int) -> bool:
    """Whether the pass over the selected blocks does the sliding window too: while it touches at most two blocks."""
    return 0 < window_size <= block_size + 1
