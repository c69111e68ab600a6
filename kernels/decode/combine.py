"""Partial results of all branches of a step put together: outputs, times gates, added up."""

import triton
import triton.language as tl

from .partial import load_statistics, weights


@triton.jit
def _branch(
    peaks, totals, sums, first, stride, column,
    V: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """The output [columns] of a branch whose splits' statistics lie at first + split * stride; 0 if none saw a key."""
    AT_ONCE: tl.constexpr = READS if READS < SPLITS_PADDED else SPLITS_PADDED
    split = tl.arange(0, SPLITS_PADDED)
    peak, total = load_statistics(peaks, totals, first + split * stride, split < SPLITS)
    _, total_of_all, level = weights(peak, total, 0)
    total_of_all, level = tl.sum(total_of_all, 0), tl.sum(level, 0)
    output = tl.zeros([column.shape[0]], dtype=tl.float32)
    for begin in tl.static_range(0, SPLITS_PADDED, AT_ONCE):
        split = begin + tl.arange(0, AT_ONCE)
        peak, total = load_statistics(peaks, totals, first + split * stride, split < SPLITS)
        at = (first + split * stride)[:, None] * V + column[None, :]
        part = tl.load(sums + at, mask=(total != 0.0)[:, None] & (column < V)[None, :], other=0.0)
        output += tl.sum(part * tl.exp2(peak - level)[:, None], 0)
    output = tl.where(total_of_all == 0.0, 0.0, output / total_of_all)
    finite = tl.min((tl.abs(output) < float("inf")).to(tl.int32), 0)
    return tl.where(finite == 1, output, float("nan"))


@triton.jit
def combine(
    start, count, compressed_gate, selected_gate, sliding_gate, compressed_peaks, compressed_totals, compressed_sums,
    near_peaks, near_totals, near_sums, taint, output,
    QUERIES: tl.constexpr, H: tl.constexpr, G: tl.constexpr, V: tl.constexpr, COMPRESSED_SPLITS: tl.constexpr,
    SELECTED_SPLITS: tl.constexpr, SLIDING_SPLITS: tl.constexpr, COMPRESSED_PADDED: tl.constexpr,
    SELECTED_PADDED: tl.constexpr, SLIDING_PADDED: tl.constexpr, COLUMNS: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """output [B, QUERIES, N, V], 0 for padding. A branch with no splits is dropped. Grid: B * QUERIES * N.

    COLUMNS: V, padded. READS: partial results that are read at once.
    """
    program = tl.program_id(0)
    g = program % G
    head = program // G % H
    i = program // (G * H) % QUERIES
    row = (program // (G * H * QUERIES)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    result = tl.zeros([COLUMNS], dtype=tl.float32)
    index = ((row * QUERIES + i) * H + head) * G + g
    if i < tl.load(count + row):
        if COMPRESSED_SPLITS > 0:
            R: tl.constexpr = QUERIES * G
            first = (row * H + head) * (COMPRESSED_SPLITS * R) + i * G + g
            branch = _branch(
                compressed_peaks, compressed_totals, compressed_sums, first, R, column, V, COMPRESSED_SPLITS,
                COMPRESSED_PADDED, READS,
            )  # fmt: skip
            result += tl.load(compressed_gate + index).to(tl.float32) * branch
        query = (row * H + head) * QUERIES + i
        SPLITS: tl.constexpr = SELECTED_SPLITS + SLIDING_SPLITS
        if SELECTED_SPLITS > 0:
            branch = _branch(
                near_peaks, near_totals, near_sums, query * (SPLITS * G) + g, G, column, V, SELECTED_SPLITS,
                SELECTED_PADDED, READS,
            )  # fmt: skip
            result += tl.load(selected_gate + index).to(tl.float32) * branch + tl.load(taint + query)
        if SLIDING_SPLITS > 0:
            first = (query * SPLITS + SELECTED_SPLITS) * G + g
            branch = _branch(
                near_peaks, near_totals, near_sums, first, G, column, V, SLIDING_SPLITS, SLIDING_PADDED,
                READS,
            )  # fmt: skip
            result += tl.load(sliding_gate + index).to(tl.float32) * branch
    tl.store(output + index * V + column, result.to(output.dtype.element_ty), mask=column < V)
