"""Attention of few queries to the rows of a cache, by kernels/decode/: four launches, fewer where branches are dropped.

Letters as in the package docstring; the Tq queries of a batch row stand one after the other.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax import tiling
from nsa_jax.branches import Config, PerBranch, needs_windows, selects
from nsa_jax.runtime import device
from nsa_jax.runtime.launch import launch

Array = jax.Array
_FLOAT = jnp.float32
_LOG2E = math.log2(math.e)


class _Pool(NamedTuple):
    """What of the cache all batch rows may share: pages, or with no pages the rows' own keys, leading axis B."""

    key: Array
    value: Array
    compressed_key: Array | None
    compressed_value: Array | None


class _Rows(NamedTuple):
    """What each batch row has for itself, leading axis B."""

    query: Array
    page_indices: Array | None
    start: Array
    count: Array
    length: Array | None
    gates: PerBranch
    block_counts: Array | None


class _Partial(NamedTuple):
    """Partial results of splits, as kernels/decode/ lays them out."""

    peaks: Array
    totals: Array
    sums: Array


def attend(
    config: Config,
    query: Array,
    key: Array,
    value: Array,
    compressed_key: Array | None,
    compressed_value: Array | None,
    page_indices: Array | None,
    start: Array,
    count: Array,
    gates: PerBranch,
    block_counts: int | Array,
    length: Array | None = None,
) -> Array:
    """The gated sum of the branches for queries at the end of their rows: [B, Tq, N, V] in query's dtype.

    Query i of row b stands at start[b] + i if i < count[b]; otherwise it is padding and gives 0. Nothing is read of the
    cache that no query sees.

    Args:
        config: window and stride of the compression, selection, window size, scale.
        query: [B, Tq, N, K].
        key, value: [B, capacity, H, K|V], or pages [num_pages, page_size, H, K|V].
        compressed_key, compressed_value: [B, capacity // stride, H, K|V], or [num_pages, page_size // stride, H, K|V]:
            a window lies in the page of its first token. None where no branch needs them.
        page_indices: int32 [B, capacity // page_size], the pages of each row; None where rows lie in one piece.
        start, count: int32 [B].
        gates: [B, Tq, N] each, None for a branch that is dropped.
            What they hold for padding has no effect.
        block_counts: an int, int32 [], or int32 [B, Tq, H].
        length: int32 [B], tokens in each row: queries i < count[b] that would stand behind them did not fit, and give
            NaN, as all do where count[b] is beyond Tq. None: all fit.
    """
    if config.window_size == 0:
        gates = gates._replace(sliding=None)
    counts = None if isinstance(block_counts, int) else block_counts
    most = config.max_block_count if counts is not None else min(config.max_block_count, max(block_counts, 0))
    counted = "none" if counts is None else "each" if counts.ndim else "one"
    step = _Step(config._replace(max_block_count=most), page_indices is not None, counted)
    if most == 0 or all(gate is None for gate in gates):
        gates = gates._replace(selected=None)
    if not needs_windows(config, gates):
        compressed_key = compressed_value = None
    pool = _Pool(key, value, compressed_key, compressed_value)
    return _attend(step, pool, _Rows(query, page_indices, start, count, length, gates, counts))


class _Step(NamedTuple):
    """What is static of a step."""

    config: Config
    paged: bool
    counted: str  # see `room_of` in kernels/decode/select_blocks.py


def _attend(step: _Step, pool: _Pool, rows: _Rows) -> Array:
    """`_run`, and under jax.vmap one run for all: rows and pools are put one behind the other."""

    @jax.custom_batching.custom_vmap
    def attend(pool, rows):
        return _run(step, pool, rows)

    @attend.def_vmap
    def rule(size, batched, pool, rows):
        pool_batched, rows_batched = batched

        def merge(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        of_all = step
        if step.counted == "one":  # a number alone has no rows to put one behind the other
            counts, is_batched = rows.block_counts, rows_batched.block_counts
            shape = (*rows.query.shape[-4:-2], pool.value.shape[-2])
            counts = jnp.broadcast_to(counts[:, None, None, None], (size, *shape)) if is_batched else counts
            rows = rows._replace(block_counts=counts if is_batched else jnp.broadcast_to(counts, shape))
            of_all = step._replace(counted="each")
        merged = jax.tree.map(merge, rows, rows_batched)
        shared = step.paged and not any(jax.tree.leaves(pool_batched))
        if not shared:
            if step.paged:
                offset = jnp.arange(size, dtype=jnp.int32)[:, None, None] * pool.key.shape[pool_batched.key]
                pages = merged.page_indices.reshape(size, -1, merged.page_indices.shape[1]) + offset
                merged = merged._replace(page_indices=pages.reshape(merged.page_indices.shape))
            pool = jax.tree.map(merge, pool, pool_batched)
        output = _attend(of_all, pool, merged)
        return output.reshape(size, -1, *output.shape[1:]), True

    return attend(pool, rows)


class _Sizes(NamedTuple):
    """Of a launch over keys: rows of a tile, how many such tiles, keys of a tile, splits, warps and stages."""

    rows: int
    tiles: int
    keys: int
    warps: int
    stages: int


_PROGRAMS = 3  # of a multiprocessor: enough for the copies in flight to hide the memory's latency
_MOST_SPLITS = 64
_KEYS = 32  # of a tile: a warp's share of a product with them fits its registers
_STAGES = 3  # two tiles on their way while one is multiplied


def _sizes(capability: int, rows: int, columns: int, itemsize: int, keys: int, paged: bool) -> _Sizes:
    """Sizes for so many rows, key plus value columns, of elements of so many bytes."""
    side = min(64, max(16, tiling.power_of_two(rows)))
    tiles = -(-rows // side)
    if capability == tiling.INTERPRETER:
        return _Sizes(side, tiles, keys, 1, 1)
    if itemsize > 2:
        return _Sizes(side, tiles, keys, 4, 1)
    warps = max(side // 16, 1 if columns <= 320 else 2)  # a warp has 16 rows, so that no two share a row's statistics
    stages = _STAGES if keys * columns <= _KEYS * 256 else 2
    stages += 2 * paged  # pages are looked up as far again ahead
    return _Sizes(side, tiles, keys, warps, stages)


def _programs(capability: int) -> int:
    """How many programs fill the device."""
    return 16 if capability == tiling.INTERPRETER else _PROGRAMS * device.multiprocessors()


def _spread(programs: int, tiles: int, others: int) -> int:
    """Into how many splits so many tiles of keys go, where each split is as many programs as there are others."""
    return max(1, min(tiles, _MOST_SPLITS, round(programs / max(others, 1))))


def _run(step: _Step, pool: _Pool, rows: _Rows) -> Array:
    config, gates = step.config, rows.gates
    (_, Tq, N, K), (H, V) = rows.query.shape, pool.value.shape[2:]
    page = pool.key.shape[1] if step.paged else 0
    capacity = rows.page_indices.shape[1] * page if step.paged else pool.key.shape[1]
    blocks = -(-capacity // config.block_size)
    S = min(config.max_block_count, blocks)
    scored = -(-blocks // 16) * 16  # rows of scores that wide loads can read
    step_sizes = {
        "QUERIES": Tq,
        "CAPACITY": capacity,
        "WITH_LENGTH": rows.length is not None,
        "H": H,
        "G": N // H,
    }
    key_sizes = {
        **step_sizes,
        "K": K,
        "V": V,
        "K_PARTS": tiling.parts(K),
        "V_PARTS": tiling.parts(V),
        "PRECISION": device.dot_precision(),
        "FACTOR": config.scale * _LOG2E,
        "POOL": pool.key.shape[0],
    }
    selection = {"COUNTED": step.counted, "S": S, "BLOCK_SIZE": config.block_size}
    compressed, near, taint = None, None, None
    if needs_windows(config, gates):
        compressed, scores = _compressed(step, pool, rows, key_sizes, scored, page)
    if selects(config, gates):
        block_indices, taint = _select(step, rows, step_sizes, selection, compressed, scores)
    else:
        block_indices = rows.query
    if gates.selected is not None or gates.sliding is not None:
        near, splits = _near(step, pool, rows, key_sizes, selection, block_indices, page)
    else:
        splits = 0, 0
    return _combine(rows, V, step_sizes, compressed, near, splits, taint)


def _compressed(step, pool, rows, shape, blocks, page):
    """Partial results of the compressed branch, and the scores of the blocks."""
    from nsa_jax.kernels.decode import compressed as kernels

    config, gates = step.config, rows.gates
    B, Tq, N, _ = rows.query.shape
    K, V, H = shape["K"], shape["V"], shape["H"]
    R, strides = Tq * N // H, config.block_size // config.stride
    with_value, with_scores = gates.compressed is not None, selects(config, gates)
    columns = sum(shape["K_PARTS"]) + (sum(shape["V_PARTS"]) if with_value else 0)
    itemsize = rows.query.dtype.itemsize
    capability = device.capability_of(kernels.compressed)
    sizes = _sizes(capability, R, columns, itemsize, max(16 if itemsize > 2 else _KEYS, strides), step.paged)
    windows = shape["CAPACITY"] // config.stride
    splits = _spread(_programs(capability), -(-windows // sizes.keys), B * H * sizes.tiles)
    key, value = pool.compressed_key, pool.compressed_value
    if windows == 0 or not with_value:
        value = rows.query  # a kernel can be given it; nobody reads it
    if windows == 0:
        key = rows.query
    none = jax.ShapeDtypeStruct((1,), _FLOAT)
    scores = jax.ShapeDtypeStruct((B, H, R, blocks), _FLOAT)
    of_blocks, *partial = launch(
        kernels.compressed,
        rows.query,
        key,
        value,
        _or(rows.page_indices, rows.start),
        *_places(rows),
        name="decode_compressed",
        outputs=(scores if with_scores else none, *_partial((B, H, splits, R), V if with_value else 0)),
        programs=B * splits * sizes.tiles * H,
        warps=sizes.warps,
        stages=sizes.stages,
        flops=2 * B * N * Tq * windows * (K + V),
        SHAPE=kernels.CompressedShape(
            WINDOW=config.window,
            STRIDE=config.stride,
            BLOCK_STRIDES=strides,
            BLOCKS=blocks,
            SPLITS=splits,
            ROWS=sizes.rows,
            KEYS=sizes.keys,
            TILES=sizes.tiles,
            WITH_SCORES=with_scores,
            WITH_VALUE=with_value,
            PAGE=page // config.stride,
            **shape,
        ),
    )
    return _Partial(*partial), of_blocks


_RANKED = 2048  # blocks that are ranked at once, at most
_LANE = 128  # blocks that a warp ranks, unless there would be more warps than
_LANES = 8
_SCORES = 16384  # scores that are held at once
_COMPARED = 64  # pairs of the lanes' best blocks that a thread compares at once, at most


def _select(step, rows, shape, selection, compressed, scores):
    """block_indices int32 [B, H, Tq, S] and taint float32 [B, H, Tq]."""
    from nsa_jax.kernels.decode import select_blocks as kernels

    config = step.config
    (B, Tq, N, _), H, G = rows.query.shape, shape["H"], shape["G"]
    splits, blocks = compressed.peaks.shape[2], -(-shape["CAPACITY"] // config.block_size)
    chunk = min(_RANKED, max(16, tiling.power_of_two(blocks)))
    lanes, entries = min(_LANES, max(1, chunk // _LANE)), tiling.power_of_two(selection["S"])
    return launch(
        kernels.select,
        _or(rows.block_counts, rows.start),
        *_places(rows),
        scores,
        compressed.peaks,
        compressed.totals,
        name="decode_select_blocks",
        outputs=(
            jax.ShapeDtypeStruct((B, H, Tq, selection["S"]), jnp.int32),
            jax.ShapeDtypeStruct((B, H, Tq), _FLOAT),
        ),
        programs=B * Tq * H,
        warps=lanes,
        stages=1,
        flops=B * Tq * N * blocks,
        SHAPE=kernels.SelectShape(
            INIT=min(config.num_init_blocks, blocks),
            LOCAL=min(max(config.num_local_blocks, 1), blocks),
            BLOCKS=scores.shape[3],
            SPLITS=splits,
            SPLITS_PADDED=tiling.power_of_two(splits),
            HEADS=min(tiling.power_of_two(G), max(1, _SCORES // chunk)),
            LANES=lanes,
            WIDTH=chunk // lanes,
            ENTRIES=entries,
            PAIRWISE=lanes * entries**2 <= 32 * _COMPARED,
            **selection,
            **shape,
        ),
    )


def _near(step, pool, rows, shape, selection, block_indices, page):
    """Partial results of the selected and the sliding branch, and how many splits each has."""
    from nsa_jax.kernels.decode import near as kernels

    config, gates = step.config, rows.gates
    B, Tq, N, _ = rows.query.shape
    K, V, H, G = shape["K"], shape["V"], shape["H"], shape["G"]
    columns, itemsize = sum(shape["K_PARTS"]) + sum(shape["V_PARTS"]), rows.query.dtype.itemsize
    keys = min(config.block_size, 16 if itemsize > 2 else _KEYS)
    capability = device.capability_of(kernels.near)
    sizes = _sizes(capability, G, columns, itemsize, keys, step.paged)
    window = min(config.window_size, shape["CAPACITY"])
    tiles = (
        selection["S"] * config.block_size // keys if gates.selected is not None else 0,
        -(-window // keys) + 1 if gates.sliding is not None else 0,
    )
    others = B * Tq * H * sizes.tiles
    each = max(2, -(-sum(tiles) // max(1, round(_programs(capability) / max(others, 1)))))
    splits = tuple(min(_MOST_SPLITS, -(-count // each)) for count in tiles)
    partial = launch(
        kernels.near,
        rows.query,
        pool.key,
        pool.value,
        _or(rows.page_indices, rows.start),
        *_places(rows),
        _or(rows.block_counts, rows.start),
        block_indices,
        name="decode_near",
        outputs=_partial((B, H, Tq, sum(splits), G), V),
        programs=others * sum(splits),
        warps=sizes.warps,
        stages=sizes.stages,
        flops=2 * B * N * Tq * sum(tiles) * keys * (K + V),
        SHAPE=kernels.NearShape(
            WINDOW=window,
            ALL=config.selects_all,
            SELECTED_SPLITS=splits[0],
            SLIDING_SPLITS=splits[1],
            ROWS=sizes.rows,
            KEYS=keys,
            TILES=sizes.tiles,
            PAGE=page,
            **selection,
            **shape,
        ),
    )
    return _Partial(*partial), splits


_NUMBERS = 64  # of partial results that a thread holds, about


def _combine(rows, V, shape, compressed, near, splits, taint):
    """The output [B, Tq, N, V]."""
    from nsa_jax.kernels.decode import combine as kernels

    B, Tq, N, _ = rows.query.shape
    nothing = _Partial(rows.start, rows.start, rows.start)
    splits = (compressed.peaks.shape[2] if rows.gates.compressed is not None else 0, *splits)
    padded = [tiling.power_of_two(max(count, 1)) for count in splits]
    columns = tiling.power_of_two(V)
    names = "COMPRESSED", "SELECTED", "SLIDING"
    (output,) = launch(
        kernels.combine,
        *_places(rows),
        *(_or(gate, rows.start) for gate in rows.gates),
        *(compressed or nothing),
        *(near or nothing),
        _or(taint, rows.start),
        name="decode_combine",
        outputs=(jax.ShapeDtypeStruct((B, Tq, N, V), rows.query.dtype),),
        programs=B * Tq * N,
        warps=min(8, tiling.power_of_two(-(-sum(padded) * columns // (32 * _NUMBERS)))),
        stages=1,
        flops=2 * B * Tq * N * V * sum(splits),
        SHAPE=kernels.CombineShape(
            V=V,
            COLUMNS=columns,
            TAINTED=taint is not None,
            **{f"{name}_SPLITS": count for name, count in zip(names, splits, strict=True)},
            **{f"{name}_PADDED": count for name, count in zip(names, padded, strict=True)},
            **shape,
        ),
    )
    return output


def _partial(shape: tuple[int, ...], V: int):
    """What the outputs of a launch over splits look like; without values the sums are not written."""
    sums = (*shape, V) if V else (1,)
    return tuple(jax.ShapeDtypeStruct(x, _FLOAT) for x in (shape, shape, sums))


def _places(rows: _Rows) -> tuple[Array, Array, Array]:
    """What kernels are told about where queries stand."""
    return rows.start, rows.count, _or(rows.length, rows.start)


def _or(x: Array | None, other: Array) -> Array:
    """x, or in its place what a kernel can be given and does not read."""
    return other if x is None else x
