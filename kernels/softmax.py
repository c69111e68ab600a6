"""The online softmax, in base 2: a score is a product q k^T, to be multiplied by a factor that holds log2(e)."""

import triton
import triton.language as tl

from .tiles import accumulate, inner, row_dot, scaled

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
def online_step(
    score, live, value, peak, total, sums, FACTOR: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr
):
    """Takes in one tile: score [M, N] (-inf where hidden), value [N, V]; peak, total [M], sums [M, V] run along.

    Rows that are not live [M] see nothing of the tile.
    """
    new_peak = tl.where(live, tl.maximum(peak, tl.max(score, 1) * FACTOR), peak)
    seen_any = new_peak > float("-inf")
    shrink = tl.exp2(peak - tl.where(seen_any, new_peak, 0.0))
    # one number per row hides all of it, which costs less than a mask
    subtrahend = tl.where(live & seen_any, new_peak, float("inf"))
    p = tl.exp2(score * FACTOR - subtrahend[:, None])  # [M, N]
    total = total * shrink + tl.sum(p, 1)
    sums = accumulate(scaled(sums, shrink[:, None], V_PARTS), p, value, V_PARTS, PRECISION)
    return new_peak, total, sums


@triton.jit
def finish(peak, total, sums, V_PARTS: tl.constexpr):
    """(output [M, V], natural-log lse [M]); a row that saw nothing gives (0, -inf)."""
    seen = total > 0.0
    safe = tl.where(seen, total, 1.0)
    lse = tl.where(seen, (peak + tl.log2(safe)) * LN2, float("-inf"))
    return scaled(sums, (1.0 / safe)[:, None], V_PARTS), lse


@triton.jit
def score_shift(output, d_output, d_lse, lse, V_PARTS: tl.constexpr):
    """What the gradients of a row's scores subtract [M], FlashAttention's delta: rowsum(d_output * output) - d_lse.

    0 for a row that sees nothing, lse -inf: its lse is constant, whatever the cotangent holds.
    """
    return tl.where(lse == float("-inf"), 0.0, row_dot(d_output, output, V_PARTS) - d_lse)
