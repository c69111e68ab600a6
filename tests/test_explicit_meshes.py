"""Ops, layer and model on a mesh of two devices: in shard_map, and with explicit axes, as jax.make_mesh makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from public_ops import EVERY_OP, under_jit

from nsa_jax.linen import NativeSparseAttention, NSATransformer, TransformerConfig

WITH_ROWS = [name for name in EVERY_OP if "cu_seqlens" not in name]
LAYER = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "block_size": 16, "block_counts": 2, "window_size": 8}
SEGMENT_IDS = jnp.asarray(np.repeat([[0, 3, -1], [5, 5, 6]], [20, 24, 4], axis=1), jnp.int32)


def explicit_mesh():
    return jax.make_mesh((2, 1), ("rows", "heads"))


def spread(x, mesh):
    return jax.device_put(x, NamedSharding(mesh, P("rows")))


@pytest.mark.parametrize("name", WITH_ROWS)
def test_shard_map(name):
    op = EVERY_OP[name]
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    rows = jax.shard_map(op.output_and_gradients, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"))
    assert_close(jax.tree.leaves(rows(*op.arrays)), under_jit(name))


@pytest.mark.parametrize("name", WITH_ROWS)
def test_ops_with_explicit_axes(name):
    op, mesh = EVERY_OP[name], explicit_mesh()
    assert AxisType.Explicit in mesh.axis_types
    with jax.set_mesh(mesh):
        results = jax.jit(op.output_and_gradients)(*(spread(x, mesh) for x in op.arrays))
    results = jax.tree.leaves(results)
    assert all(x.sharding.spec[0] == "rows" for x in results)
    assert_close(results, under_jit(name))


@pytest.mark.parametrize("name", [name for name in WITH_ROWS if name.startswith("native")][:2])
def test_arrays_of_one_device_with_a_mesh_around(name):
    op = EVERY_OP[name]
    with jax.set_mesh(explicit_mesh()):
        results = jax.jit(op.output_and_gradients)(*op.arrays)
    assert_close(jax.tree.leaves(results), under_jit(name))


def value_and_gradients(module, params, *arrays):
    def loss(params, *arrays):
        return (module.apply({"params": params}, *arrays, segment_ids=SEGMENT_IDS).astype(jnp.float32) ** 2).sum()

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params, *arrays))


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("kind", ["layer", "model"])
def test_modules_with_explicit_axes(kind, implementation):
    if kind == "layer":
        module = NativeSparseAttention(**LAYER, implementation=implementation)
        x = jax.random.normal(jax.random.key(1), (2, 48, 16))
    else:
        sizes = {"vocab_size": 32, "hidden_size": 16, "num_layers": 1, "mlp_size": 24}
        module = NSATransformer(TransformerConfig(**sizes, **LAYER, implementation=implementation))
        x = jax.random.randint(jax.random.key(1), (2, 48), 0, 32)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(0).normal(0, 0.3, leaf.shape), leaf.dtype), shapes
    )
    expected = value_and_gradients(module, params, x)
    mesh = explicit_mesh()
    with jax.set_mesh(mesh):
        actual = value_and_gradients(module, params, spread(x, mesh))
    assert_close(actual, expected)
