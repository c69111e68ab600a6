"""Partial results of all branches of a step put together: outputs, times gates, added up."""

import triton
import triton.language as tl

from .cache import placement
from .partial import load_statistics, weights


@triton.aggregate
class Parts:
    """Partial results of a branch: peaks, totals [SPLITS], sums [SPLITS, COLUMNS]."""

    peaks: tl.tensor
    totals: tl.tensor
    sums: tl.tensor


@triton.jit
def _load(
    peaks, totals, sums, first, stride, V: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """The `Parts` whose statistics lie at first + split * stride; of a split that saw nothing the sums are anything."""
    split = tl.arange(0, PADDED)
    column = tl.arange(0, COLUMNS)
    at = first + split * stride
    inside = (split < SPLITS)[:, None] & (column < V)[None, :]
    part = tl.load(sums + at[:, None] * V + column[None, :], mask=inside, other=0.0)
    peak, total = load_statistics(peaks, totals, at, split < SPLITS)
    return Parts(peak, total, part)


@triton.jit
def _output(parts, gate):
    """gate * output [COLUMNS]: output 0 where no split saw a key, NaN where not all of it is finite."""
    weight, total, _ = weights(parts.peaks, parts.totals, 0)
    part = tl.where((parts.totals != 0.0)[:, None], parts.sums * weight[:, None], 0.0)
    total = tl.sum(total, 0)
    output = tl.sum(part, 0) / total
    finite = tl.min((tl.abs(output) < float("inf")).to(tl.int32), 0)
    return gate * tl.where(total == 0.0, 0.0, tl.where(finite == 1, output, float("nan")))


@triton.jit
def combine(
    start, count, length, compressed_gate, selected_gate, sliding_gate, compressed_peaks, compressed_totals,
    compressed_sums, near_peaks, near_totals, near_sums, taint, output,
    QUERIES: tl.constexpr, WITH_LENGTH: tl.constexpr, H: tl.constexpr, G: tl.constexpr, V: tl.constexpr,
    COMPRESSED_SPLITS: tl.constexpr, SELECTED_SPLITS: tl.constexpr, SLIDING_SPLITS: tl.constexpr,
    COMPRESSED_PADDED: tl.constexpr, SELECTED_PADDED: tl.constexpr, SLIDING_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr, TAINTED: tl.constexpr,
):  # fmt: skip
    """output [B, QUERIES, N, V], 0 for padding and NaN for queries that do not fit in their row. Grid: B * QUERIES * N.

    A branch with no splits is dropped. COLUMNS: V, padded.
    """
    SPLITS: tl.constexpr = SELECTED_SPLITS + SLIDING_SPLITS
    R: tl.constexpr = QUERIES * G
    program = tl.program_id(0)
    g = program % G
    head = program // G % H
    i = program // (G * H) % QUERIES
    row = (program // (G * H * QUERIES)).to(tl.int64)
    query = (row * H + head) * QUERIES + i
    index = ((row * QUERIES + i) * H + head) * G + g

    # all that is read is read first: none of it waits for another
    if COMPRESSED_SPLITS > 0:
        first = (row * H + head) * (COMPRESSED_SPLITS * R) + i * G + g
        compressed = _load(
            compressed_peaks, compressed_totals, compressed_sums, first, R, V, COLUMNS, COMPRESSED_SPLITS,
            COMPRESSED_PADDED,
        )  # fmt: skip
        by_compressed = tl.load(compressed_gate + index).to(tl.float32)
    if SELECTED_SPLITS > 0:
        first = query * (SPLITS * G) + g
        selected = _load(near_peaks, near_totals, near_sums, first, G, V, COLUMNS, SELECTED_SPLITS, SELECTED_PADDED)
        by_selected = tl.load(selected_gate + index).to(tl.float32)
        tainted = tl.load(taint + query) if TAINTED else 0.0
    if SLIDING_SPLITS > 0:
        first = (query * SPLITS + SELECTED_SPLITS) * G + g
        sliding = _load(near_peaks, near_totals, near_sums, first, G, V, COLUMNS, SLIDING_SPLITS, SLIDING_PADDED)
        by_sliding = tl.load(sliding_gate + index).to(tl.float32)
    _, placed = placement(start, count, length, row, QUERIES, WITH_LENGTH)
    given = tl.load(count + row)

    result = tl.zeros([COLUMNS], dtype=tl.float32)
    if COMPRESSED_SPLITS > 0:
        result += _output(compressed, by_compressed)
    if SELECTED_SPLITS > 0:
        result += _output(selected, by_selected) + tainted
    if SLIDING_SPLITS > 0:
        result += _output(sliding, by_sliding)
    result = tl.where(i < placed, result, 0.0)
    if WITH_LENGTH:
        result = tl.where(((i < given) & (i >= placed)) | (given > QUERIES), float("nan"), result)
    column = tl.arange(0, COLUMNS)
    tl.store(output + index * V + column, result.to(output.dtype.element_ty), mask=column < V)
