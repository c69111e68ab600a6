"""Every public op, on rows with padding and several segments, for tests of what must hold of all of them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import branch_gates, normal, packing, qkv

import nsa_jax

B, T, N, H, K, V, BLOCK, STRIDE = 2, 48, 2, 1, 16, 8, 16, 8
IMPLEMENTATIONS = ("xla", "triton")


class Op(NamedTuple):
    """function: of its arrays, of which it has gradients for the first `floats`."""

    function: Callable
    arrays: tuple[jax.Array, ...]
    floats: int

    def output_and_gradients(self, *arrays):
        """The output, and the gradients for a cotangent of ones; for integers the output alone."""
        floats, others = arrays[: self.floats], arrays[self.floats :]
        if not floats:
            return self.function(*others)
        output, pullback = jax.vjp(lambda *floats: self.function(*floats, *others), *floats)
        return output, pullback(jax.tree.map(jnp.ones_like, output))


def public_ops(implementation: str) -> dict[str, Op]:
    query, key, value = qkv(0, B, T, N, H, K, V)
    compressed_key, compressed_value = qkv(1, B, T, N, H, K, V, C=T // STRIDE)[1:]
    gates = branch_gates(2, B, T, N)
    segment_ids = packing(T)
    indices = jnp.asarray(np.random.default_rng(3).integers(-1, 4, (B, T, H, 3)), jnp.int32)
    counts = jnp.asarray(np.random.default_rng(4).integers(0, 4, (B, T, H)), jnp.int32)
    lse = normal(5, B, T, N).at[:, ::3].set(-jnp.inf)  # as for queries that see no window
    residual = {"return_residual": True, "implementation": implementation}
    windows = {"window": BLOCK, "stride": STRIDE}

    def native(query, key, value, *arrays, **options):
        gates, segment_ids = dict(zip(names, arrays[:3], strict=True)), arrays[3]
        return nsa_jax.native_sparse_attention(
            query, key, value, block_counts=2, block_size=BLOCK, window_size=9, compression_window=BLOCK,
            compression_stride=STRIDE, segment_ids=segment_ids, implementation=implementation, **gates, **options,
        )  # fmt: skip

    def native_of_indices(query, key, value, *arrays):
        return native(query, key, value, *arrays[:4], block_indices=arrays[4])

    def compressed(query, key, value, segment_ids):
        return nsa_jax.compressed_attention(query, key, value, segment_ids=segment_ids, **windows, **residual)

    def selected(query, key, value, indices, counts, segment_ids):
        return nsa_jax.selected_attention(
            query, key, value, indices, block_counts=counts, block_size=BLOCK, segment_ids=segment_ids, **residual
        )

    def sliding(query, key, value, segment_ids):
        return nsa_jax.sliding_window_attention(query, key, value, window_size=9, segment_ids=segment_ids, **residual)

    def select(query, key, lse, counts, segment_ids):
        return nsa_jax.select_blocks(
            query, key, lse, block_counts=counts, block_size=BLOCK, segment_ids=segment_ids, max_block_count=3,
            implementation=implementation, **windows,
        )  # fmt: skip

    names = tuple(gates)
    ops = {
        "native_sparse_attention": Op(native, (query, key, value, *gates.values(), segment_ids), 6),
        "native_sparse_attention, indices": Op(
            native_of_indices, (query, key, value, *gates.values(), segment_ids, indices), 6
        ),
        "compressed_attention": Op(compressed, (query, compressed_key, compressed_value, segment_ids), 3),
        "selected_attention": Op(selected, (query, key, value, indices, counts, segment_ids), 3),
        "sliding_window_attention": Op(sliding, (query, key, value, segment_ids), 3),
        "select_blocks": Op(select, (query, compressed_key, lse, counts, segment_ids), 0),
    }
    if implementation == "xla":  # these have but one

        def compress(x, segment_ids):
            return nsa_jax.compress(x, segment_ids=segment_ids, **windows)

        def gather_windows(x, segment_ids):
            return nsa_jax.gather_windows(x, segment_ids=segment_ids, **windows)

        def from_cu_seqlens(cu_seqlens):
            return nsa_jax.segment_ids_from_cu_seqlens(cu_seqlens, T)

        cu_seqlens = jnp.array([0, 5, 20], jnp.int32)
        ops |= {
            "compress": Op(compress, (key, segment_ids), 1),
            "gather_windows": Op(gather_windows, (key, segment_ids), 1),
            "segment_ids_from_cu_seqlens": Op(from_cu_seqlens, (cu_seqlens,), 0),
        }
    return ops


EVERY_OP = {f"{name}, {kind}": op for kind in IMPLEMENTATIONS for name, op in public_ops(kind).items()}


@functools.cache
def under_jit(name: str) -> list[jax.Array]:
    """The leaves of output and gradients of an op of EVERY_OP."""
    op = EVERY_OP[name]
    return jax.tree.leaves(jax.jit(op.output_and_gradients)(*op.arrays))
