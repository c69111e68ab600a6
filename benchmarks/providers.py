"""What is timed: nsa_jax whole and by branch, dense and windowed attention by cuDNN, and the two ceilings."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import arithmetic
import inputs
import jax
import jax.numpy as jnp
import numpy as np
import selections
from arithmetic import Work
from plan import Case, Scale

import nsa_jax


class Workload(NamedTuple):
    """function(*floats, *integers) -> array, differentiable in its floats; `facts` go into the results."""

    function: Callable
    floats: tuple[jax.Array, ...]
    integers: tuple[jax.Array, ...]
    d_output: jax.Array | None
    work: Work
    facts: dict[str, Any] = {}  # noqa: RUF012 - never written to


def build(name: str, case: Case, scale: Scale, implementation: str) -> Workload:
    """The Workload of a provider.

    Raises:
        KeyError: there is no such provider.
    """
    if name in _CEILINGS:
        return _CEILINGS[name](scale, case)
    return _PROVIDERS[name](case, implementation)


def _nsa(case: Case, implementation: str) -> Workload:
    arrays = inputs.make(case)

    def function(query, key, value, *gates):
        return nsa_jax.native_sparse_attention(
            query, key, value,
            compressed_gate=gates[0], selected_gate=gates[1], sliding_gate=gates[2],
            block_counts=case.S, block_size=case.block_size, window_size=case.window_size,
            compression_window=case.window, compression_stride=case.stride, implementation=implementation,
        )  # fmt: skip

    work = arithmetic.together(
        arithmetic.selection(case),
        *(
            arithmetic.attention(pairs(case), case.N, case.D)
            for pairs in (arithmetic.compressed_pairs, arithmetic.selected_pairs, arithmetic.sliding_pairs)
        ),
    )
    return Workload(function, (*arrays[:3], *arrays.gates), (), arrays.d_output, work)


def _nsa_given(case: Case, implementation: str) -> Workload:
    """The original benchmark's op: given blocks, 1 to S of them per query, and the sliding window."""
    arrays = inputs.make(case)
    block_indices, overlap = inputs.blocks(case)
    block_counts = jax.random.randint(jax.random.key(2), block_indices.shape[:3], 1, case.S + 1, jnp.int32)

    def function(query, key, value, selected_gate, sliding_gate, block_indices, block_counts):
        return nsa_jax.native_sparse_attention(
            query, key, value,
            selected_gate=selected_gate, sliding_gate=sliding_gate, block_indices=block_indices,
            block_counts=block_counts, block_size=case.block_size, window_size=case.window_size,
            max_block_count=case.S, implementation=implementation,
        )  # fmt: skip

    work = arithmetic.together(
        _selected_work(case, block_indices, block_counts),
        arithmetic.attention(arithmetic.sliding_pairs(case), case.N, case.D),
    )
    floats = (*arrays[:3], *arrays.gates[1:])
    return Workload(function, floats, (block_indices, block_counts), arrays.d_output, work, {"overlap": overlap})


def _selected_work(case: Case, block_indices: jax.Array, block_counts: jax.Array) -> Work:
    keys = np.asarray(selections.visible_keys(block_indices, block_counts, case.block_size))
    return arithmetic.attention(int(keys.sum(dtype=np.int64)), case.N // case.H, case.D)


def _compressed_arrays(case: Case) -> tuple[jax.Array, jax.Array]:
    arrays = inputs.make(case)
    return tuple(nsa_jax.compress(x, window=case.window, stride=case.stride) for x in (arrays.key, arrays.value))


def _compressed(case: Case, implementation: str) -> Workload:
    arrays = inputs.make(case)

    def function(query, key, value):
        return nsa_jax.compressed_attention(
            query, key, value, window=case.window, stride=case.stride, implementation=implementation
        )

    work = arithmetic.attention(arithmetic.compressed_pairs(case), case.N, case.D)
    return Workload(function, (arrays.query, *_compressed_arrays(case)), (), arrays.d_output, work)


def _selection(case: Case, implementation: str) -> Workload:
    window = {"window": case.window, "stride": case.stride}
    query = inputs.make(case).query
    key, value = _compressed_arrays(case)
    residual = jax.jit(
        lambda *arrays: nsa_jax.compressed_attention(*arrays, return_residual=True, implementation="xla", **window)
    )
    _, lse = residual(query, key, value)

    def function(query, key, lse):
        return nsa_jax.select_blocks(
            query, key, lse,
            block_counts=case.S, block_size=case.block_size, implementation=implementation, **window,
        )  # fmt: skip

    facts = {"overlap": float(selections.measured_overlap(jax.jit(function)(query, key, lse)))}
    return Workload(function, (query, key, lse), (), None, arithmetic.selection(case), facts)


def _selected(case: Case, implementation: str) -> Workload:
    arrays = inputs.make(case)
    block_indices, overlap = inputs.blocks(case)

    def function(query, key, value, block_indices):
        return nsa_jax.selected_attention(
            query, key, value, block_indices, block_size=case.block_size, implementation=implementation
        )

    work = _selected_work(case, block_indices, jnp.full(block_indices.shape[:3], case.S, jnp.int32))
    return Workload(function, arrays[:3], (block_indices,), arrays.d_output, work, {"overlap": overlap})


def _sliding(case: Case, implementation: str) -> Workload:
    arrays = inputs.make(case)

    def function(query, key, value):
        return nsa_jax.sliding_window_attention(
            query, key, value, window_size=case.window_size, implementation=implementation
        )

    work = arithmetic.attention(arithmetic.sliding_pairs(case), case.N, case.D)
    return Workload(function, arrays[:3], (), arrays.d_output, work)


def _dense(case: Case, implementation: str, window: int | None = None) -> Workload:
    """Causal attention by cuDNN, or by XLA where nsa_jax is measured through XLA too."""
    arrays = inputs.make(case)
    library = "cudnn" if implementation == "triton" else "xla"

    def function(query, key, value):
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation=library,
            local_window_size=None if window is None else (window - 1, 0),
        )  # fmt: skip

    pairs = arithmetic.dense_pairs(case) if window is None else arithmetic.sliding_pairs(case)
    return Workload(function, arrays[:3], (), arrays.d_output, arithmetic.attention(pairs, case.N, case.D))


def _cudnn_window(case: Case, implementation: str) -> Workload:
    return _dense(case, implementation, case.window_size)


def _cache(case: Case):
    """A full cache of random keys: (query, key, value, compressed key, compressed value), gates, (length, start)."""
    random = jax.random.split(jax.random.key(6), 5)

    def normal(key, length, heads):
        return jax.random.normal(key, (case.B, length, heads, case.D), case.dtype)

    lengths = (case.queries, case.T, case.T, case.T // case.stride, case.T // case.stride)
    arrays = [
        normal(key, n, case.N if i == 0 else case.H) for i, (key, n) in enumerate(zip(random, lengths, strict=True))
    ]
    gates = tuple(jax.random.uniform(key, (case.B, case.queries, case.N), case.dtype) for key in random[:3])
    length = jnp.full(case.B, case.T, jnp.int32)
    return arrays, gates, (length, length - case.queries)


def _decode(case: Case, implementation: str) -> Workload:
    """One layer's attention in a step: the last tokens of full rows."""
    arrays, gates, (length, start) = _cache(case)

    def function(query, key, value, compressed_key, compressed_value, *others):
        *gates, length, start = others
        cache = nsa_jax.KVCache(
            key=key, value=value, compressed_key=compressed_key, compressed_value=compressed_value,
            length=length, start=start, count=jnp.full_like(length, case.queries), block_size=case.block_size,
            compression_window=case.window, compression_stride=case.stride,
        )  # fmt: skip
        return nsa_jax.cached_attention(
            query, cache, compressed_gate=gates[0], selected_gate=gates[1], sliding_gate=gates[2],
            block_counts=case.S, window_size=case.window_size, implementation=implementation,
        )  # fmt: skip

    keys = arithmetic.step_keys(case)
    pairs = case.B * (case.queries * (keys[0] + keys[2]) + keys[1])
    read = case.B * sum(keys) * 2 * case.H * case.D * arrays[0].dtype.itemsize
    work = arithmetic.attention(pairs, case.N, case.D)
    return Workload(function, (*arrays, *gates), (length, start), None, work, {"read_bytes": read})


def _decode_dense(case: Case, implementation: str, library: str) -> Workload:
    """The same step with attention to all keys."""
    (query, key, value, *_), _, (length, _) = _cache(case)

    def function(query, key, value, length):
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=length, query_seq_lengths=jnp.full_like(length, case.queries),
            implementation=library,
        )  # fmt: skip

    pairs = case.B * case.queries * case.T
    read = case.B * case.T * 2 * case.H * case.D * query.dtype.itemsize
    work = arithmetic.attention(pairs, case.N, case.D)
    return Workload(function, (query, key, value), (length,), None, work, {"read_bytes": read})


def _decode_cudnn(case: Case, implementation: str) -> Workload:
    return _decode_dense(case, implementation, "cudnn")


def _decode_xla(case: Case, implementation: str) -> Workload:
    return _decode_dense(case, implementation, "xla")


def _prefill(case: Case, implementation: str) -> Workload:
    """A row put into a cache in chunks of case.queries tokens, each attended with as it comes."""
    arrays = inputs.make(dataclasses.replace(case, queries=0))

    def function(query, key, value, *gates):
        def chunks(x):
            return x.reshape(case.B, case.T // case.queries, case.queries, *x.shape[2:]).swapaxes(0, 1)

        def step(cache, chunk):
            query, key, value, *gates = chunk
            cache = nsa_jax.extend_cache(cache, key, value)
            output = nsa_jax.cached_attention(
                query, cache, compressed_gate=gates[0], selected_gate=gates[1], sliding_gate=gates[2],
                block_counts=case.S, window_size=case.window_size, implementation=implementation,
            )  # fmt: skip
            return cache, output

        cache = nsa_jax.init_cache(
            case.B, case.T, case.H, case.D, block_size=case.block_size, compression_window=case.window,
            compression_stride=case.stride, dtype=query.dtype,
        )  # fmt: skip
        return jax.lax.scan(step, cache, tuple(map(chunks, (query, key, value, *gates))))[1]

    return Workload(function, (*arrays[:3], *arrays.gates), (), None, _nsa(case, implementation).work)


def _matmul(scale: Scale, case: Case) -> Workload:
    """A square matrix product, random data: on zeros a GPU draws less power and clocks higher."""
    a, b = (jax.random.normal(k, (scale.matmul,) * 2, case.dtype) for k in jax.random.split(jax.random.key(3)))
    return Workload(jnp.matmul, (a, b), (), None, Work(2 * scale.matmul**3))


def _copy(scale: Scale, case: Case) -> Workload:
    """Reads and writes an array once."""
    x = jax.random.bits(jax.random.key(4), (scale.copy_bytes // 4,), jnp.uint32)
    return Workload(lambda x: x ^ jnp.uint32(1), (x,), (), None, Work(0), {"bytes": 2 * x.nbytes})


_CEILINGS = {"ceiling-matmul": _matmul, "ceiling-copy": _copy}
_PROVIDERS = {
    "nsa": _nsa,
    "nsa-paper": _nsa,
    "nsa-given": _nsa_given,
    "compressed": _compressed,
    "compressed-paper": _compressed,
    "selection": _selection,
    "selection-paper": _selection,
    "selected": _selected,
    "sliding": _sliding,
    "dense": _dense,
    "decode": _decode,
    "decode-4": _decode,
    "decode-paper": _decode,
    "decode-cudnn": _decode_cudnn,
    "decode-xla": _decode_xla,
    "prefill": _prefill,
    "cudnn-window": _cudnn_window,
}
