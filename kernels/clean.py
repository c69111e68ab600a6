"""Keys and values made safe to multiply with: rows that are not finite become 0, and are told."""

import triton
import triton.language as tl

from .tiles import load_rows, store_rows


@triton.jit
def _finite(tiles, PARTS: tl.constexpr):
    """[M]: whether the rows of a tuple of [M, PARTS[i]] tiles are finite."""
    finite = tl.min((tl.abs(tiles[0]) < float("inf")).to(tl.int32), 1)
    for i in tl.static_range(1, len(PARTS)):
        finite = tl.minimum(finite, tl.min((tl.abs(tiles[i]) < float("inf")).to(tl.int32), 1))
    return finite


@triton.jit
def _kept(tiles, finite, PARTS: tl.constexpr):
    """The tiles with 0 in the rows that are not finite."""
    kept = ()
    for i in tl.static_range(len(PARTS)):
        kept = kept + (tl.where(finite[:, None] == 1, tiles[i], 0.0),)
    return kept


@triton.jit
def clean(
    key,
    value,
    clean_key,
    clean_value,
    unclean,
    COUNT: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    K_PARTS: tl.constexpr,
    V_PARTS: tl.constexpr,
):
    """clean_key [COUNT, K], clean_value [COUNT, V], and unclean int32 [COUNT], 1 where key or value is not finite.

    Grid: cdiv(COUNT, ROWS).
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    local = tl.arange(0, ROWS)
    inside = first + local < COUNT
    k = load_rows(key + first * K, local * K, inside, K, K_PARTS)  # [ROWS, K]
    v = load_rows(value + first * V, local * V, inside, V, V_PARTS)  # [ROWS, V]
    finite = tl.minimum(_finite(k, K_PARTS), _finite(v, V_PARTS))
    store_rows(clean_key + first * K, local * K, _kept(k, finite, K_PARTS), inside, K, K_PARTS)
    store_rows(clean_value + first * V, local * V, _kept(v, finite, V_PARTS), inside, V, V_PARTS)
    tl.store(unclean + first + local, 1 - finite, mask=inside)
