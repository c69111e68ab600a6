"""Partial results of all branches of a step put together: outputs, times gates, added up."""

import dataclasses

import triton
import triton.language as tl

from .cache import placement
from .partial import load_statistics, weights
from .shape import StepShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineShape(StepShape):
    """The sizes of `combine`.

    Attributes:
        V, COLUMNS: value width, and that padded.
        COMPRESSED_SPLITS, SELECTED_SPLITS, SLIDING_SPLITS: of each branch, 0 where it is dropped.
        COMPRESSED_PADDED, SELECTED_PADDED, SLIDING_PADDED: those, padded.
        TAINTED: whether blocks were selected, by scores that may not be finite.
    """

    V: int
    COLUMNS: int
    COMPRESSED_SPLITS: int
    SELECTED_SPLITS: int
    SLIDING_SPLITS: int
    COMPRESSED_PADDED: int
    SELECTED_PADDED: int
    SLIDING_PADDED: int
    TAINTED: bool

    @property
    def SPLITS(self) -> int:
        """Of the selected and the sliding branch."""
        return self.SELECTED_SPLITS + self.SLIDING_SPLITS


@triton.aggregate
class Parts:
    """Partial results of a branch: peaks, totals [SPLITS], sums [SPLITS, COLUMNS]."""

    peaks: tl.tensor
    totals: tl.tensor
    sums: tl.tensor


@triton.jit
def _load(peaks, totals, sums, first, stride, SHAPE: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr):
    """The `Parts` whose statistics lie at first + split * stride; of a split that saw nothing the sums are anything."""
    split = tl.arange(0, PADDED)
    column = tl.arange(0, SHAPE.COLUMNS)
    at = first + split * stride
    inside = (split < SPLITS)[:, None] & (column < SHAPE.V)[None, :]
    part = tl.load(sums + at[:, None] * SHAPE.V + column[None, :], mask=inside, other=0.0)
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
    start,
    count,
    length,
    compressed_gate,
    selected_gate,
    sliding_gate,
    compressed_peaks,
    compressed_totals,
    compressed_sums,
    near_peaks,
    near_totals,
    near_sums,
    taint,
    output,
    SHAPE: tl.constexpr,
):
    """output [B, QUERIES, N, V], 0 for padding and NaN for queries that do not fit in their row. Grid: B * QUERIES * N.

    A branch with no splits is dropped.
    """
    program = tl.program_id(0)
    g = program % SHAPE.G
    head = program // SHAPE.G % SHAPE.H
    i = program // (SHAPE.G * SHAPE.H) % SHAPE.QUERIES
    row = (program // (SHAPE.G * SHAPE.H * SHAPE.QUERIES)).to(tl.int64)
    query = (row * SHAPE.H + head) * SHAPE.QUERIES + i
    index = ((row * SHAPE.QUERIES + i) * SHAPE.H + head) * SHAPE.G + g

    # all that is read is read first: none of it waits for another
    if SHAPE.COMPRESSED_SPLITS > 0:
        first = (row * SHAPE.H + head) * (SHAPE.COMPRESSED_SPLITS * SHAPE.R) + i * SHAPE.G + g
        compressed = _load(
            compressed_peaks,
            compressed_totals,
            compressed_sums,
            first,
            SHAPE.R,
            SHAPE,
            SHAPE.COMPRESSED_SPLITS,
            SHAPE.COMPRESSED_PADDED,
        )
        by_compressed = tl.load(compressed_gate + index).to(tl.float32)
    if SHAPE.SELECTED_SPLITS > 0:
        first = query * (SHAPE.SPLITS * SHAPE.G) + g
        selected = _load(
            near_peaks, near_totals, near_sums, first, SHAPE.G, SHAPE, SHAPE.SELECTED_SPLITS, SHAPE.SELECTED_PADDED
        )
        by_selected = tl.load(selected_gate + index).to(tl.float32)
        tainted = tl.load(taint + query) if SHAPE.TAINTED else 0.0
    if SHAPE.SLIDING_SPLITS > 0:
        first = (query * SHAPE.SPLITS + SHAPE.SELECTED_SPLITS) * SHAPE.G + g
        sliding = _load(
            near_peaks, near_totals, near_sums, first, SHAPE.G, SHAPE, SHAPE.SLIDING_SPLITS, SHAPE.SLIDING_PADDED
        )
        by_sliding = tl.load(sliding_gate + index).to(tl.float32)
    _, placed = placement(start, count, length, row, SHAPE)
    given = tl.load(count + row)

    result = tl.zeros([SHAPE.COLUMNS], dtype=tl.float32)
    if SHAPE.COMPRESSED_SPLITS > 0:
        result += _output(compressed, by_compressed)
    if SHAPE.SELECTED_SPLITS > 0:
        result += _output(selected, by_selected) + tainted
    if SHAPE.SLIDING_SPLITS > 0:
        result += _output(sliding, by_sliding)
    result = tl.where(i < placed, result, 0.0)
    if SHAPE.WITH_LENGTH:
        result = tl.where(((i < given) & (i >= placed)) | (given > SHAPE.QUERIES), float("nan"), result)
    column = tl.arange(0, SHAPE.COLUMNS)
    tl.store(output + index * SHAPE.V + column, result.to(output.dtype.element_ty), mask=column < SHAPE.V)
