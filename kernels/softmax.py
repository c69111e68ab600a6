"""The online softmax, in base 2: a score is a product q k^T, to be multiplied by a factor that holds log2(e)."""

import triton
import triton.language as tl

from .tiles import accumulate, inner, load_rows, row_dot, scaled, where

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def exponent_factor(scale):
    """What `scores` gives is to be multiplied by this, a positive number, to be an exponent of base 2."""
    return (scale if scale > 0 else 1.0) * LOG2E.value


@triton.jit
def scores(q, k, SCALE: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """q k^T [M, N], left unscaled where the scale is positive: scaling is then one fused step with what follows."""
    product = inner(q, k, PARTS, PRECISION)
    return product if SCALE > 0 else product * SCALE


@triton.jit
def online_step(score, value, peak, total, sums, FACTOR: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """Takes in one tile: score [M, N] (-inf where hidden), value [N, V]; peak, total [M], sums [M, V] run along."""
    new_peak = tl.maximum(peak, tl.max(score, 1) * FACTOR)
    seen_any = new_peak > float("-inf")
    shrink = tl.exp2(peak - tl.where(seen_any, new_peak, 0.0))
    subtrahend = tl.where(seen_any, new_peak, float("inf"))
    p = tl.exp2(score * FACTOR - subtrahend[:, None])  # [M, N]
    total = total * shrink + tl.sum(p, 1)
    sums = accumulate(scaled(sums, shrink[:, None], V_PARTS), p, value, V_PARTS, PRECISION)
    return new_peak, total, sums


@triton.jit
def finish_seen(peak, total, sums, sight, V_PARTS: tl.constexpr):
    """(output [M, V], natural-log lse [M]) of rows that see, by `sight` [M], nothing (0): (0, -inf) whatever was
    computed; something that is not finite (2): NaN; what is finite (1): as computed, NaN where the query is NaN."""
    sound = (sight == 1) & (total > 0.0)
    lse = tl.where(sight == 0, float("-inf"), float("nan"))
    lse = tl.where(sound, (peak + tl.log2(total)) * LN2, lse)
    factor = tl.where(sound, 1.0 / total, float("nan"))
    return where(sight == 0, 0.0, scaled(sums, factor[:, None], V_PARTS), V_PARTS), lse


@triton.jit
def load_statistics(
    output,
    do,
    lse,
    d_lse,
    delta,
    base,
    offset,
    inside,
    V: tl.constexpr,
    V_PARTS: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
):
    """The lse in base 2 of the rows at base + offset [M], and delta, which it also writes.

    do [M, V] is the output's cotangent. A masked row has probability 0.

    delta is what the gradients of a row's scores subtract, as in FlashAttention: rowsum(do * output) - d_lse. It is 0
    for a row that sees nothing, lse -inf: its lse is constant, whatever the cotangent holds.
    """
    o = load_rows(output + base * V, offset * V, inside, V, V_PARTS)  # [M, V]
    row_lse = tl.load(lse + base + offset, mask=inside, other=float("inf"))
    row_d_lse = tl.load(d_lse + base + offset, mask=inside, other=0.0) if HAS_D_LSE else 0.0
    row_delta = tl.where(row_lse == float("-inf"), 0.0, row_dot(do, o, V_PARTS) - row_d_lse)
    tl.store(delta + base + offset, row_delta, mask=inside)
    return row_lse * LOG2E, row_delta


@triton.jit
def finish_gradient(dq, row_lse, PARTS: tl.constexpr):
    """dq [M, K]: 0 in rows that see nothing, lse -inf, and NaN where the lse is NaN, whatever was computed."""
    dq = where(row_lse != row_lse, float("nan"), dq, PARTS)
    return where(row_lse == float("-inf"), 0.0, dq, PARTS)
