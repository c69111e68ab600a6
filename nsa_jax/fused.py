"""The three branches as one differentiable function by the Triton kernels.

Differentiated as one, the gates cost nothing: the kernels scale by them what is theirs of the output's cotangent, which
no branch then needs a copy of, and the delta of a branch's derivative is the gradient of its gate.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nsa_jax import interval, segments, selected, tiling
from nsa_jax.interval_hopper import Addends
from nsa_jax.residuals import Branch, name_residuals
from nsa_jax.runtime import device, transforms
from nsa_jax.selection import select_blocks
from nsa_jax.walk import choose

Array = jax.Array


class Config(NamedTuple):
    """The static arguments of `native_sparse_attention`; window and stride are those of the compression."""

    scale: float
    block_size: int
    window_size: int
    window: int
    stride: int
    num_init_blocks: int
    num_local_blocks: int
    max_block_count: int


class Arrays(NamedTuple):
    """What is attended with and to; compressed arrays are None where neither branch nor selection needs them."""

    query: Array
    key: Array
    value: Array
    compressed_key: Array | None
    compressed_value: Array | None


class Gates(NamedTuple):
    """A gate [B, T, N] (or, of the same structure, an output or lse) per branch, None for a branch that is dropped."""

    compressed: Array | None
    selected: Array | None
    sliding: Array | None


class Routing(NamedTuple):
    """Integers: segment ids [B, T] or None; block indices [B, T, H, S], None to select; counts () or [B, T, H]."""

    segment_ids: Array | None
    block_indices: Array | None
    block_counts: Array


class _Seen(NamedTuple):
    """Who sees whom, per branch that is computed."""

    compressed: segments.Intervals | None
    selected: selected.Routes | None
    sliding: segments.Intervals | None  # None also where the selected branch's kernels do the window


def gated_sum(gates: Gates, outputs: Gates, query: Array, value: Array) -> Array:
    """The sum of gate * output [B, T, N, V] over the branches, in float32, rounded to query's dtype."""
    total = jnp.zeros((*query.shape[:3], value.shape[-1]), jnp.float32)
    for gate, output in zip(gates, outputs, strict=True):
        if gate is not None:
            total += gate.astype(jnp.float32)[..., None] * output.astype(jnp.float32)
    return total.astype(query.dtype)


def attend(config: Config, arrays: Arrays, gates: Gates, routing: Routing) -> Array:
    """`native_sparse_attention` of checked arguments by the Triton kernels: [B, T, N, V]."""
    arrays, gates, routing = transforms.vary_together((arrays, gates, routing))
    clear = functools.partial(segments.clear_padding, segment_ids=routing.segment_ids)
    arrays = arrays._replace(query=clear(arrays.query), key=clear(arrays.key), value=clear(arrays.value))
    return _attend(config, arrays, gates, routing)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(config: Config, arrays: Arrays, gates: Gates, routing: Routing) -> Array:
    return _branches(config, arrays, gates, routing, keep=False)[0]


def _one_pass(config: Config, gates: Gates) -> bool:
    """Whether the selected branch's kernels do the sliding branch too."""
    both = gates.selected is not None and gates.sliding is not None
    return both and tiling.selected_does_sliding(config.window_size, config.block_size)


def _specs(config: Config, gates: Gates, length: int) -> tuple[interval.Spec, selected.Spec, interval.Spec]:
    precision = device.dot_precision()
    window = config.window_size if _one_pass(config, gates) else 0
    return (
        interval.Spec("compressed", config.scale, precision),
        selected.Spec(config.block_size, config.scale, precision, window),
        interval.Spec("sliding", config.scale, precision, reach=min(config.window_size, length)),
    )


def _branches(
    config: Config, arrays: Arrays, gates: Gates, routing: Routing, keep: bool
) -> tuple[Array, Gates, Gates, _Seen]:
    """(gated sum, outputs, lse, seen) of the branches that have a gate; unless `keep` an output may be lacking."""
    query, key, value, compressed_key, compressed_value = arrays
    B, T, _, _ = query.shape
    tokens = segments.layout(routing.segment_ids, B, T)
    specs = _specs(config, gates, T)
    outputs, lses, seen = Gates(None, None, None), Gates(None, None, None), _Seen(None, None, None)
    total = None

    block_indices, block_counts = routing.block_indices, routing.block_counts
    if compressed_key is not None:
        windows = segments.window_intervals(tokens, config.window, config.stride)
        compressed_key, compressed_value = (
            segments.clear_empty_slots(x, windows) for x in (compressed_key, compressed_value)
        )
        output, lse = interval.forward(query, compressed_key, compressed_value, windows, specs[0])
        output, lse = name_residuals("compressed", output, lse)
        if gates.compressed is not None:
            outputs, lses = outputs._replace(compressed=output), lses._replace(compressed=lse)
            seen = seen._replace(compressed=windows)
        if gates.selected is not None and block_indices is None:
            block_indices = select_blocks(
                query, compressed_key, lse,
                block_counts=jnp.broadcast_to(block_counts, (B, T, key.shape[2])),
                max_block_count=config.max_block_count, block_size=config.block_size,
                window=config.window, stride=config.stride,
                num_init_blocks=config.num_init_blocks, num_local_blocks=config.num_local_blocks,
                scale=config.scale, segment_ids=routing.segment_ids, implementation="triton",
            )  # fmt: skip
            block_indices, block_counts = checkpoint_name(block_indices, "nsa_block_indices"), None
    if gates.selected is not None:
        choice = choose(block_indices, block_counts, routing.segment_ids, config.block_size, specs[1].window_size)
        routes = selected.route(query, value, choice, specs[1])
        chosen, *near = selected.forward(query, key, value, routes, specs[1])
        output, lse = name_residuals("selected", *chosen)
        outputs, lses = outputs._replace(selected=output), lses._replace(selected=lse)
        seen = seen._replace(selected=routes)
    if gates.sliding is not None:
        if _one_pass(config, gates):
            output, lse = near[0]
        else:
            seen = seen._replace(sliding=segments.sliding_intervals(tokens, config.window_size))
            sliding = query, key, value, seen.sliding, specs[2]
            others = tuple(pair for pair in zip(outputs, gates, strict=True) if pair[0] is not None)
            if others and interval.adds_up(query, key, value, specs[2]):
                output, lse, total = interval.forward_and_sum(*sliding, Addends(gates.sliding, others, keep))
                total = checkpoint_name(total, "nsa_output")
            else:
                output, lse = interval.forward(*sliding)
        if output is not None:
            output, lse = name_residuals("sliding", output, lse)
        outputs, lses = outputs._replace(sliding=output), lses._replace(sliding=lse)
    if total is None:
        total = gated_sum(gates, outputs, query, value)
    return total, outputs, lses, seen


def _attend_forward(config, arrays, gates, routing):
    total, outputs, lses, seen = _branches(config, arrays, gates, routing, keep=True)
    return total, (arrays, gates, outputs, lses, seen)


def _attend_backward(config, residuals, d_output):
    arrays, gates, outputs, lses, seen = residuals
    query, key, value, compressed_key, compressed_value = arrays
    specs = _specs(config, gates, query.shape[1])
    branches = [
        None if gate is None else Branch(output, lse, gate.astype(jnp.float32))
        for output, lse, gate in zip(outputs, lses, gates, strict=True)
    ]
    deltas, d_query, d_shared, d_compressed = Gates(None, None, None), None, [], (None, None)
    if gates.compressed is not None:
        arguments = (query, compressed_key, compressed_value, d_output, branches[0])
        d_query, delta = interval.backward_query(*arguments, seen.compressed, specs[0])
        d_compressed = interval.backward_key_value(*arguments, delta, seen.compressed, specs[0])
        deltas = deltas._replace(compressed=delta)
    elif compressed_key is not None:
        d_compressed = jnp.zeros_like(compressed_key), jnp.zeros_like(compressed_value)
    if seen.sliding is not None:
        arguments = (query, key, value, d_output, branches[2])
        d_query, delta = interval.backward_query(*arguments, seen.sliding, specs[2], d_query)
        d_shared.append(interval.backward_key_value(*arguments, delta, seen.sliding, specs[2]))
        deltas = deltas._replace(sliding=delta)
    if gates.selected is not None:
        arguments = (query, key, value, d_output, branches[1:] if _one_pass(config, gates) else branches[1:2])
        d_query, (delta, *near) = selected.backward_query(*arguments, seen.selected, specs[1], d_query)
        d_shared.append(selected.backward_key_value(*arguments, [delta, *near], seen.selected, specs[1]))
        deltas = deltas._replace(selected=delta)
        if near:
            deltas = deltas._replace(sliding=near[0])

    d_key, d_value = (_sum([pair[i] for pair in d_shared], like) for i, like in enumerate((key, value)))
    d_gates = jax.tree.map(lambda delta, gate: delta.astype(gate.dtype), deltas, gates)
    return Arrays(d_query, d_key, d_value, *d_compressed), d_gates, None


_attend.defvjp(_attend_forward, _attend_backward)


def _sum(terms: list[Array], like: Array) -> Array:
    """The sum of the terms, in float32, rounded to the dtype of `like`, whose shape zero terms give zeros of."""
    if len(terms) == 1:
        return terms[0]
    return sum((term.astype(jnp.float32) for term in terms), jnp.zeros(like.shape, jnp.float32)).astype(like.dtype)
