"""The online softmax, in base 2: scores come multiplied by log2(e)."""

import triton
import triton.language as tl

from .tiles import accumulate, scaled

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def online_step(score, value, peak, total, sums, V_PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """Takes in one tile: score [M, N] (-inf where hidden), value [N, V]; peak, total [M], sums [M, V] run along."""
    new_peak = tl.maximum(peak, tl.max(score, 1))
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen nothing yet
    shrink = tl.exp2(peak - safe)
    p = tl.exp2(score - safe[:, None])  # [M, N]
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
