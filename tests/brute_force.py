"""The paper's equations in NumPy float64, one query and one head at a time: what the reference is tested against.

Source: Yuan et al. 2025, arXiv 2502.11089, equations 5 to 12. Arrays are laid out as in the public ops; `segment_ids`
is an int array [B, T] or None, `query_indices` one of [B, Tq] or None for a query at every token. Nothing here is
shared with the package.
"""

import itertools

import numpy as np


def segment_bounds(segment_ids, row, length):
    """The (start, stop) of every segment of a row, padding left out."""
    if segment_ids is None:
        return [(0, length)]
    ids = segment_ids[row]
    cuts = [0, *(t for t in range(1, length) if ids[t] != ids[t - 1]), length]
    return [(start, stop) for start, stop in itertools.pairwise(cuts) if ids[start] >= 0]


def window_spans(bounds, window, stride):
    """For every segment the (start, stop) of its complete windows; chained, entry i belongs to slot i."""
    return [[(first, first + window) for first in range(start, stop - window + 1, stride)] for start, stop in bounds]


def compress(x, *, window, stride, segment_ids=None):
    """The mean over each complete window: equation 7 with a mean for its map."""
    batch, length = x.shape[:2]
    means = np.zeros((batch, length // stride, *x.shape[2:]))
    for b in range(batch):
        spans = window_spans(segment_bounds(segment_ids, b, length), window, stride)
        for slot, (first, last) in enumerate(itertools.chain(*spans)):
            means[b, slot] = x[b, first:last].astype(np.float64).mean(axis=0)
    return means


def attend(query, keys, values, scale):
    """Softmax attention of one query [K] over keys [n, K], values [n, V]: (output [V], lse)."""
    if len(keys) == 0:
        return np.zeros(values.shape[-1]), -np.inf
    scores = keys @ query * scale
    lse = scores.max() + np.log(np.exp(scores - scores.max()).sum())
    return np.exp(scores - lse) @ values, lse


def _attention(query, key, value, scale, seen):
    """Every query over the rows of key and value that seen(b, i, h) lists."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, queries, heads = query.shape[:3]
    group = heads // key.shape[2]
    output, lse = np.zeros((batch, queries, heads, value.shape[-1])), np.full((batch, queries, heads), -np.inf)
    for b, i, n in np.ndindex(batch, queries, heads):
        rows = seen(b, i, n // group)
        output[b, i, n], lse[b, i, n] = attend(
            query[b, i, n], key[b, rows, n // group], value[b, rows, n // group], scale
        )
    return output, lse


def _find(segment_ids, query_indices, b, i, length):
    """(token, number of its segment, start of it) of query i's place in the row, or None on padding and outside."""
    t = i if query_indices is None else int(query_indices[b, i])
    bounds = segment_bounds(segment_ids, b, length)
    return next(((t, number, start) for number, (start, stop) in enumerate(bounds) if start <= t < stop), None)


def sliding_window_attention(query, key, value, *, window_size, scale, segment_ids=None, query_indices=None):
    """(output, lse) over the positions p - window_size + 1 .. p of the query's segment."""

    def seen(b, i, h):
        place = _find(segment_ids, query_indices, b, i, key.shape[1])
        return [] if place is None else list(range(max(place[2], place[0] - window_size + 1), place[0] + 1))

    return _attention(query, key, value, scale, seen)


def _windows_seen(place, segment_ids, b, length, window, stride):
    """[(slot, window number in its segment)] of the windows that a query at this place, see `_find`, sees."""
    if place is None:
        return []
    spans = window_spans(segment_bounds(segment_ids, b, length), window, stride)
    before = sum(len(windows) for windows in spans[: place[1]])
    return [(before + c, c) for c, (_, stop) in enumerate(spans[place[1]]) if stop - 1 <= place[0]]


def compressed_attention(
    query, compressed_key, compressed_value, *, window, stride, scale, segment_ids=None, query_indices=None, length=None
):
    """(output, lse) over the complete windows that end by the query: equation 5 with equation 7's keys.

    `length` is that of the key row, where query_indices are given.
    """
    length = query.shape[1] if length is None else length

    def seen(b, i, h):
        place = _find(segment_ids, query_indices, b, i, length)
        return [slot for slot, _ in _windows_seen(place, segment_ids, b, length, window, stride)]

    return _attention(query, compressed_key, compressed_value, scale, seen)


def importance(
    query, compressed_key, b, i, h, *,
    block_size, window, stride, scale, segment_ids=None, query_indices=None, length=None,
):  # fmt: skip
    """Equations 8 to 10: of every block of query i's segment up to its own, for key/value head h; None on padding."""
    length = query.shape[1] if length is None else length
    place = _find(segment_ids, query_indices, b, i, length)
    if place is None:
        return None
    group = query.shape[2] // compressed_key.shape[2]
    windows = _windows_seen(place, segment_ids, b, length, window, stride)
    total = np.zeros((place[0] - place[2]) // block_size + 1)
    if not windows:
        return total
    keys = np.asarray(compressed_key[b, [slot for slot, _ in windows], h], np.float64)
    for n in range(h * group, (h + 1) * group):
        scores = keys @ np.asarray(query[b, i, n], np.float64) * scale
        probability = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        for share, (_, c) in zip(probability, windows, strict=True):
            for j in range(len(total)):
                shared = min(c * stride + window, (j + 1) * block_size) - max(c * stride, j * block_size)
                total[j] += share * max(shared, 0) / stride
    return total


def select_blocks(
    query,
    compressed_key,
    *,
    block_counts,
    max_block_count,
    num_init_blocks,
    num_local_blocks,
    **options,
):
    """Equation 11: the blocks of most importance, the forced ones first; int [B, Tq, H, max_block_count].

    options: those of `importance`.
    """
    shape = (*query.shape[:2], compressed_key.shape[2])
    counts = np.broadcast_to(block_counts, shape)
    chosen = np.full((*shape, max_block_count), -1)
    for b, i, h in np.ndindex(shape):
        scores = importance(query, compressed_key, b, i, h, **options)
        if scores is None:
            continue
        own = len(scores) - 1
        forced = [*range(own, own - max(num_local_blocks, 1), -1), *range(num_init_blocks)]
        ranked = [*forced, *sorted(range(own + 1), key=lambda j: (-scores[j], j))]
        candidates = list(dict.fromkeys(j for j in ranked if 0 <= j <= own))
        taken = sorted(candidates[: min(max(counts[b, i, h], 0), max_block_count)])
        chosen[b, i, h, : len(taken)] = taken
    return chosen


def selected_attention(
    query, key, value, block_indices, *, block_counts, block_size, scale, segment_ids=None, query_indices=None
):
    """(output, lse) over the listed blocks, up to the query: equation 12."""
    slots = block_indices.shape[-1]
    counts = np.broadcast_to(slots if block_counts is None else block_counts, block_indices.shape[:-1])

    def seen(b, i, h):
        place = _find(segment_ids, query_indices, b, i, key.shape[1])
        if place is None:
            return []
        t, _, start = place
        listed = block_indices[b, i, h, : max(counts[b, i, h], 0)].tolist()
        return [at for at in range(start, t + 1) if (at - start) // block_size in listed]

    return _attention(query, key, value, scale, seen)


def native_sparse_attention(
    query,
    key,
    value,
    compressed_gate,
    selected_gate,
    sliding_gate,
    *,
    block_counts,
    block_size,
    window_size,
    window,
    stride,
    num_init_blocks,
    num_local_blocks,
    scale,
    segment_ids=None,
    query_indices=None,
):
    """Equation 5: the three branches, gated; output [B, Tq, N, V]. `block_counts` is an int."""
    windows = {"window": window, "stride": stride, "segment_ids": segment_ids}
    compressed_key, compressed_value = compress(key, **windows), compress(value, **windows)
    windows |= {"query_indices": query_indices, "length": key.shape[1]}
    indices = select_blocks(
        query,
        compressed_key,
        block_counts=block_counts,
        max_block_count=block_counts,
        block_size=block_size,
        num_init_blocks=num_init_blocks,
        num_local_blocks=num_local_blocks,
        scale=scale,
        **windows,
    )
    common = {"scale": scale, "segment_ids": segment_ids, "query_indices": query_indices}
    compressed, _ = compressed_attention(query, compressed_key, compressed_value, scale=scale, **windows)
    selected, _ = selected_attention(query, key, value, indices, block_counts=None, block_size=block_size, **common)
    sliding, _ = sliding_window_attention(query, key, value, window_size=window_size, **common)
    gated = zip((compressed_gate, selected_gate, sliding_gate), (compressed, selected, sliding), strict=True)
    return sum(np.asarray(gate, np.float64)[..., None] * branch for gate, branch in gated)
