"""The online softmax of a split of the keys, in base 2, and the partial results that splits leave behind."""

import triton
import triton.language as tl

from ..tiles import accumulate, inner, scaled


@triton.jit
def exponents(q, k, FACTOR: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """FACTOR * q k^T [ROWS, KEYS]; NaN where that is not finite, so that it can't be taken for hidden."""
    score = inner(q, k, PARTS, PRECISION) * FACTOR
    return tl.where(tl.abs(score) < float("inf"), score, float("nan"))


@triton.jit
def take_in(score, value, peak, total, sums, WITH_VALUE: tl.constexpr, V_PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """Takes in a tile: score [ROWS, KEYS] (-inf where hidden), value [KEYS, V]; peak, total [ROWS], sums [ROWS, V].

    Returns the weights [ROWS, KEYS] too, relative to the new peak.
    """
    peak_after = tl.maximum(peak, tl.max(score, 1))
    level = tl.where(peak_after == float("-inf"), 0.0, peak_after)
    shrink = tl.exp2(peak - level)
    p = tl.exp2(score - level[:, None])
    total = total * shrink + tl.sum(p, 1)
    if WITH_VALUE:
        sums = accumulate(scaled(sums, shrink[:, None], V_PARTS), p, value, V_PARTS, PRECISION)
    return p, peak_after, total, sums


@triton.jit
def store_statistics(peaks, totals, base, inside, peak, total):
    """Writes peak and total of the rows that are inside, all [ROWS], from `base` on."""
    local = tl.arange(0, peak.shape[0])
    tl.store(peaks + base + local, peak, mask=inside)
    tl.store(totals + base + local, total, mask=inside)


@triton.jit
def load_statistics(peaks, totals, index, inside):
    """(peaks, totals) at `index`; where not inside those of a split that saw nothing."""
    peak = tl.load(peaks + index, mask=inside, other=float("-inf"))
    return peak, tl.load(totals + index, mask=inside, other=0.0)


@triton.jit
def weights(peak, total, AXIS: tl.constexpr):
    """(weight of each split, total of all, level): partial sums times the weights are relative to 2^level."""
    level = tl.max(peak, AXIS, keep_dims=True)
    level = tl.where(level == float("-inf"), 0.0, level)
    weight = tl.exp2(peak - level)
    return weight, tl.sum(total * weight, AXIS, keep_dims=True), level
