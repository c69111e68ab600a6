"""Keys and values made safe to multiply with: rows that are not finite become 0, and it is told who sees them."""

import triton
import triton.language as tl

from .tiles import load_rows, store_rows


@triton.jit
def _finite(tiles, PARTS: tl.constexpr):
    """[M]: 1 where the row of a tuple of [M, PARTS[i]] tiles is finite, else 0."""
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
    C: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    WITH_KEY: tl.constexpr,
    ROWS: tl.constexpr,
    K_PARTS: tl.constexpr,
    V_PARTS: tl.constexpr,
):
    """Of keys and values [COUNT, K|V] the clean ones, and unclean int8 [B, H, C], 1 where one is not finite.

    Without WITH_KEY clean keys are not written. Grid: cdiv(COUNT, ROWS).
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    local = tl.arange(0, ROWS)
    inside = first + local < COUNT
    k = load_rows(key + first * K, local * K, inside, K, K_PARTS)  # [ROWS, K]
    v = load_rows(value + first * V, local * V, inside, V, V_PARTS)  # [ROWS, V]
    finite = tl.minimum(_finite(k, K_PARTS), _finite(v, V_PARTS))
    if WITH_KEY:
        store_rows(clean_key + first * K, local * K, _kept(k, finite, K_PARTS), inside, K, K_PARTS)
    store_rows(clean_value + first * V, local * V, _kept(v, finite, V_PARTS), inside, V, V_PARTS)
    number = first + local
    at = (number // (C * H) * H + number % H) * C + number // H % C
    tl.store(unclean + at, (1 - finite).to(tl.int8), mask=inside)


@triton.jit
def see(
    key_begin,
    key_end,
    unclean,
    sight,
    T: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    FEW: tl.constexpr,
    TILES: tl.constexpr,
):
    """sight int8 [B, T, H]: 0 where the interval is empty, 2 if it has an unclean key, else 1. Grid: TILES * H * B.

    Looks at KEYS keys at a time, and only where one of them is unclean again, at FEW at a time for each token.
    """
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
