"""Lowers the whole op for an NVIDIA GPU under JAX's transformations, on a host that needs no GPU.

A script, run by test_lowering.py in a process of its own, since Triton's interpreter must be off. It prints JSON: the
kernels in each lowered module, and whether a kernel writes into one of its operands.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from lowering import export, struct

import nsa_jax
from nsa_jax.linen import NativeSparseAttention

B, T, N, H, D = 2, 2048, 16, 1, 64  # so long that blocks are selected


def attend(query, key, value, gate, segment_ids):
    return nsa_jax.native_sparse_attention(
        query, key, value, compressed_gate=gate, selected_gate=gate, sliding_gate=gate, segment_ids=segment_ids,
        window_size=512, implementation="triton",
    )  # fmt: skip


def with_gradients(query, key, value, gate, segment_ids):
    output, pullback = jax.vjp(lambda *arrays: attend(*arrays, segment_ids), query, key, value, gate)
    return output, pullback(output)


POLICY = jax.checkpoint_policies.save_only_these_names(*nsa_jax.CHECKPOINT_NAMES)


def squared(wrap):
    """The gradient of a function whose derivative needs the output itself."""

    def gradient(query, key, value, gate, segment_ids):
        square = wrap(lambda x: attend(x, key, value, gate, segment_ids) ** 2)
        return jax.grad(lambda x: square(x).astype(jnp.float32).sum())(query)

    return gradient


def scanned(query, key, value, gate, segment_ids):
    """The gradient of three layers under jax.checkpoint and jax.lax.scan."""
    layer = jax.checkpoint(lambda x: x + attend(x, key, value, gate, segment_ids), policy=POLICY)
    return jax.grad(
        lambda x: jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=3)[0].astype(jnp.float32).sum()
    )(query)


def main() -> None:
    arrays = struct(B, T, N, D), struct(B, T, H, D), struct(B, T, H, D), struct(B, T, N), struct(B, T, dtype=jnp.int32)
    rows = PartitionSpec("data")
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    module = NativeSparseAttention(num_heads=N, num_kv_heads=H, head_dim=D, implementation="triton")
    x = struct(B, T, 32, dtype=jnp.float32)
    params = jax.eval_shape(functools.partial(module.init, jax.random.key(0)), x)
    lowered = {
        "jit": export(with_gradients, arrays),
        "shard_map": export(jax.shard_map(with_gradients, mesh=mesh, in_specs=(rows,) * 5, out_specs=rows), arrays),
        "vmap": export(jax.vmap(with_gradients), [struct(3, *x.shape, dtype=x.dtype) for x in arrays]),
        "scan and remat": export(scanned, arrays),
        "squared": export(squared(lambda function: function), arrays),
        "squared and remat": export(squared(functools.partial(jax.checkpoint, policy=POLICY)), arrays),
        "layer": export(jax.grad(lambda params, x: module.apply(params, x).sum()), (params, x)),
    }
    modules = {name: exported.mlir_module() for name, exported in lowered.items()}
    print(
        json.dumps(
            {
                name: [text.count("stablehlo.custom_call @triton_kernel_call"), "output_operand_alias" in text]
                for name, text in modules.items()
            }
        )
    )


if __name__ == "__main__":
    main()
