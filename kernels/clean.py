"""Keys and values made safe to multiply with: rows that are not finite become 0, and `see` tells who sees them."""

import dataclasses

import triton
import triton.language as tl

from .tiles import load_rows, store_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanShape:
    """The sizes of `clean`.

    Attributes:
        COUNT: keys in all, B * C * H.
        C, H, K, V: as in `Shape`.
        K_PARTS, V_PARTS: powers of two into which the widths are cut, see tiles.py.
        ROWS: keys of a tile.
        WITH_KEY: whether clean keys are written, too.
    """

    COUNT: int
    C: int
    H: int
    K: int
    V: int
    K_PARTS: tuple[int, ...]
    V_PARTS: tuple[int, ...]
    ROWS: int
    WITH_KEY: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeeShape:
    """The sizes of `see`.

    Attributes:
        T, C, H: as in `Shape`.
        TOKENS: of a tile.
        KEYS, FEW: of a step, see `see`.
    """

    T: int
    C: int
    H: int
    TOKENS: int
    KEYS: int
    FEW: int

    @property
    def TILES(self) -> int:
        return -(-self.T // self.TOKENS)


@triton.jit
def finite_rows(tiles, PARTS: tl.constexpr):
    """[M]: 1 where the row of a tuple of [M, PARTS[i]] tiles is finite, else 0."""
    finite = tl.min((tl.abs(tiles[0]) < float("inf")).to(tl.int32), 1)
    for i in tl.static_range(1, len(PARTS)):
        finite = tl.minimum(finite, tl.min((tl.abs(tiles[i]) < float("inf")).to(tl.int32), 1))
    return finite


@triton.jit
def keep_rows(tiles, finite, PARTS: tl.constexpr):
    """The tiles with 0 in the rows that are not finite."""
    kept = ()
    for i in tl.static_range(len(PARTS)):
        kept = kept + (tl.where(finite[:, None] == 1, tiles[i], 0.0),)
    return kept


@triton.jit
def clean(key, value, clean_key, clean_value, unclean, SHAPE: tl.constexpr):
    """Clean keys and values [COUNT, K|V], and unclean int8 [B, H, C], 1 where the key or the value is not finite.

    SHAPE is a `CleanShape`. Grid: cdiv(COUNT, ROWS).
    """
    C: tl.constexpr = SHAPE.C
    H: tl.constexpr = SHAPE.H
    K: tl.constexpr = SHAPE.K
    V: tl.constexpr = SHAPE.V
    ROWS: tl.constexpr = SHAPE.ROWS
    K_PARTS: tl.constexpr = SHAPE.K_PARTS
    V_PARTS: tl.constexpr = SHAPE.V_PARTS
    first = tl.program_id(0).to(tl.int64) * ROWS
    local = tl.arange(0, ROWS)
    inside = first + local < SHAPE.COUNT
    k = load_rows(key + first * K, local * K, inside, K, K_PARTS)  # [ROWS, K]
    v = load_rows(value + first * V, local * V, inside, V, V_PARTS)  # [ROWS, V]
    finite = tl.minimum(finite_rows(k, K_PARTS), finite_rows(v, V_PARTS))
    if SHAPE.WITH_KEY:
        store_rows(clean_key + first * K, local * K, keep_rows(k, finite, K_PARTS), inside, K, K_PARTS)
    store_rows(clean_value + first * V, local * V, keep_rows(v, finite, V_PARTS), inside, V, V_PARTS)
    number = first + local
    at = (number // (C * H) * H + number % H) * C + number // H % C
    tl.store(unclean + at, (1 - finite).to(tl.int8), mask=inside)


@triton.jit
def see(key_begin, key_end, unclean, sight, SHAPE: tl.constexpr):
    """sight int8 [B, T, H]: 0 where the interval is empty, 2 if it has an unclean key, else 1.

    Looks at KEYS keys at a time, and only where one of them is unclean again, at FEW at a time for each token.
    SHAPE is a `SeeShape`. Grid: TILES * H * B.
    """
    T: tl.constexpr = SHAPE.T
    C: tl.constexpr = SHAPE.C
    H: tl.constexpr = SHAPE.H
    TOKENS: tl.constexpr = SHAPE.TOKENS
    KEYS: tl.constexpr = SHAPE.KEYS
    FEW: tl.constexpr = SHAPE.FEW
    TILES: tl.constexpr = SHAPE.TILES
    program = tl.program_id(0)
    head = program // TILES % H
    batch = (program // (TILES * H)).to(tl.int64)
    token = program % TILES * TOKENS + tl.arange(0, TOKENS)
    inside = token < T
    begin = tl.load(key_begin + batch * T + token, mask=inside, other=0)
    end = tl.load(key_end + batch * T + token, mask=inside, other=0)
    sees = end > begin
    found = tl.zeros([TOKENS], dtype=tl.int32)
    unclean += (batch * H + head) * C
    last = tl.max(tl.where(sees, end, 0), 0)
    for first in range(tl.min(tl.where(sees, begin, C), 0), last, KEYS):
        key = first + tl.arange(0, KEYS)
        if tl.max(tl.load(unclean + key, mask=key < last, other=0).to(tl.int32), 0) > 0:
            for part in range(first, tl.minimum(first + KEYS, last), FEW):
                few = part + tl.arange(0, FEW)
                flag = tl.load(unclean + few, mask=few < last, other=0).to(tl.int32)
                within = (few[None, :] >= begin[:, None]) & (few[None, :] < end[:, None])
                found = tl.maximum(found, tl.max(tl.where(within, flag[None, :], 0), 1))
    tl.store(sight + (batch * T + token) * H + head, tl.where(sees, 1 + found, 0).to(tl.int8), mask=inside)
