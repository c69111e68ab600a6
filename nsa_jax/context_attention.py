"""Native Sparse Attention to rows whose tokens are shared over the devices of a mesh axis.

Queries stay where they are. Keys and values are gathered over the axis, compressed ones first, so that the raw ones
travel while the compressed branch and selection work. Nothing gathered is kept for the backward pass, which gathers
anew. Letters as in `context`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nsa_jax.branches import Arrays, Config, PerBranch, Routing, needs_windows
from nsa_jax.checkpoint_names import CHECKPOINT_NAMES
from nsa_jax.context import Context, Sharing
from nsa_jax.context_windows import Windows

Array = jax.Array

Op = Callable[[Config, Arrays, PerBranch, Routing], Array]


def attend(op: Op, sharing: Sharing, config: Config, arrays: Arrays, gates: PerBranch, routing: Routing) -> Array:
    """`native_sparse_attention` of checked arguments, of this device's tokens: [B, t, N, V].

    Args:
        op: the same of whole rows of keys.
        sharing: over which axis the rows are shared, and how.
        config: of the op.
        arrays: of this device's tokens; compressed arrays, if any, are of whole rows.
        gates, routing: of this device's tokens.
    """
    context = Context.of(sharing, routing.query_indices, *arrays.query.shape[:2])
    config = config._replace(ascending=sharing.order != "any")
    routing = routing._replace(segment_ids=context.row_ids(routing.segment_ids), query_indices=context.places)

    outputs = []
    # of contiguous shares the window sees its own and the one before, and nobody else needs the rows
    if gates.selected is None and sharing.order == "contiguous" and 0 < config.window_size <= arrays.key.shape[1] + 1:
        outputs.append(_attend_near(op, context, config, arrays, PerBranch(sliding=gates.sliding), routing))
        gates = gates._replace(sliding=None)
    if any(gate is not None for gate in gates):
        outputs.append(_attend_rows(op, context, config, arrays, gates, routing))
    if len(outputs) == 1:
        return outputs[0]
    return sum(output.astype(jnp.float32) for output in outputs).astype(arrays.query.dtype)


def _attend_near(op: Op, context: Context, config: Config, arrays: Arrays, gates: PerBranch, routing: Routing) -> Array:
    """The sliding branch of contiguous shares, each of which holds all but one of a window's keys: [B, t, N, V]."""
    batch, size = arrays.key.shape[:2]
    before = config.window_size - 1
    key, value = (context.preceded(x, before) for x in (arrays.key, arrays.value))
    place = context.device * size - before + jnp.arange(before + size, dtype=jnp.int32)
    if routing.segment_ids is None:
        ids = jnp.broadcast_to(jnp.where(place >= 0, 0, -1)[None], (batch, before + size))
    else:
        ids = jnp.take(
            routing.segment_ids, jnp.where(place >= 0, place, context.shares.length), axis=1, mode="fill", fill_value=-1
        )
    queries = jnp.broadcast_to(before + jnp.arange(size, dtype=jnp.int32), (batch, size))
    near = Routing(ids, queries, None, routing.block_counts)
    return op(config, Arrays(arrays.query, key, value, None, None), gates, near)


def _attend_rows(op: Op, context: Context, config: Config, arrays: Arrays, gates: PerBranch, routing: Routing) -> Array:
    """As `attend`, with routing of whole rows; some heads after the others."""
    outputs, step = [], _heads_at_a_time(arrays, context.shares.count)
    for first in range(0, arrays.key.shape[2], step):
        part, *others = _of_heads(first, first + step, arrays, gates, routing)
        if len(outputs) > 1:  # gather for the next heads while these are at work, and no more
            keys, outputs[-2] = jax.lax.optimization_barrier((part[1:], outputs[-2]))
            part = Arrays(part.query, *keys)
        outputs.append(_attend_heads(op, context, config, part, *others))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)


def _heads_at_a_time(arrays: Arrays, count: int) -> int:
    """How many key heads are gathered at a time: what is gathered is no larger than the queries, if that can be.

    Heads are not taken apart further than that, since it costs copies of all that queries have.
    """
    (N, K), (H, V) = arrays.query.shape[2:], arrays.value.shape[2:]
    most = max(1, N * K // (count * (K + V)))
    return max(heads for heads in range(1, H + 1) if H % heads == 0 and heads <= most)


def _of_heads(first: int, end: int, arrays: Arrays, gates: PerBranch, routing: Routing):
    """The arrays of so many key heads and of their query heads."""
    heads = arrays.key.shape[2]
    group = arrays.query.shape[2] // heads

    def cut(x, each=1):
        return x if x is None or end - first == heads else x[:, :, first * each : end * each]

    query, *keys = arrays
    routing = routing._replace(block_indices=cut(routing.block_indices))
    if routing.block_counts.ndim:
        routing = routing._replace(block_counts=cut(routing.block_counts))
    return Arrays(cut(query, group), *map(cut, keys)), PerBranch(*(cut(gate, group) for gate in gates)), routing


def _attend_heads(
    op: Op, context: Context, config: Config, arrays: Arrays, gates: PerBranch, routing: Routing
) -> Array:
    """As `attend`, with routing of whole rows."""

    def of_rows(arrays, gates, routing):
        batch, window, stride = arrays.query.shape[0], config.window, config.stride
        if needs_windows(config, gates, routing.block_indices) and arrays.compressed_key is None:
            windows = Windows(context, routing.segment_ids, batch, window, stride)
            if windows.local:  # otherwise the op makes the means of what is gathered anyway
                key, value = (windows.gather(windows.mean(x)) for x in (arrays.key, arrays.value))
                arrays = arrays._replace(compressed_key=key, compressed_value=value)
        key, value = arrays.key, arrays.value
        if gates.selected is None and gates.sliding is None and arrays.compressed_key is not None:
            # only their shapes are looked at
            key, value = (jnp.zeros((batch, context.shares.length, *x.shape[2:]), x.dtype) for x in (key, value))
        else:
            key, value = (context.gather(x, fill=jnp.nan) for x in (key, value))
        return op(config, arrays._replace(key=key, value=value), gates, routing)

    policy = jax.checkpoint_policies.save_only_these_names(*CHECKPOINT_NAMES)
    return jax.checkpoint(of_rows, policy=policy)(arrays, gates, routing)
