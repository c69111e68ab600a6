"""The attention layer: packing, gradients, transformations, custom maps, errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from nsa_jax.linen import DenseAttention, NativeSparseAttention

FEATURES = 24
BRANCHES = ("compressed", "selected", "sliding")
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(BRANCHES, size)]


class Pick(nn.Module):
    """A custom map: a weighted mean that makes something even of an empty window."""

    @nn.compact
    def __call__(self, windows):
        window = windows.shape[2]
        weights = self.param("weights", nn.initializers.normal(1.0), (window,))
        offset = self.param("offset", nn.initializers.ones_init(), (1, 1, 1, windows.shape[-1]))
        return jnp.einsum("bclhd,l->bchd", windows, nn.softmax(weights)) + offset


def layer(**fields):
    fields = {
        "block_size": 16,
        "block_counts": 2,
        "window_size": 9,
        "num_local_blocks": 1,
        "num_init_blocks": 0,
    } | fields
    return NativeSparseAttention(num_heads=4, num_kv_heads=2, head_dim=8, **fields)


def rows_of(documents, length):
    """Each list of documents [n, FEATURES] in a row of its own: (x [B, T, FEATURES], segment_ids [B, T])."""
    x = np.zeros((len(documents), length, FEATURES), np.float32)
    segment_ids = np.full((len(documents), length), -1, np.int32)
    for row, members in enumerate(documents):
        place = 0
        for number, member in enumerate(members):
            x[row, place : place + len(member)] = member
            segment_ids[row, place : place + len(member)] = number
            place += len(member)
    return jnp.asarray(x), jnp.asarray(segment_ids)


def make_documents(*lengths):
    generator = np.random.default_rng(0)
    return [generator.normal(size=(length, FEATURES)).astype(np.float32) for length in lengths]


def init(module, x, segment_ids):
    """Random parameters, none of them zero; no compilation, unlike module.init."""
    generator = np.random.default_rng(1)
    abstract = nn.unbox(jax.eval_shape(module.init, jax.random.key(1), x, segment_ids))
    return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape) / 4, leaf.dtype), abstract)


def assert_packing_never_shows(module):
    first, second, third = make_documents(21, 70, 5)
    x, segment_ids = rows_of([[first, second, third], [second], [third]], 112)
    params = init(module, x, segment_ids)
    output = np.asarray(jax.jit(module.apply)(params, x, segment_ids))
    # the same sums in float32, in an order that depends on the place in the row
    tolerance = {"rtol": 2e-5, "atol": 2e-6}
    np.testing.assert_allclose(output[0, 21:91], output[1, :70], **tolerance)
    np.testing.assert_allclose(output[0, 91:96], output[2, :5], **tolerance)
    assert np.abs(output[0, :96]).max() > 0.01
    assert np.ptp(output[0, 96:], axis=0).max() == 0  # nothing but the last projection's bias


@pytest.mark.parametrize("separate_keys", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize(
    ("branches", "compression"),
    [(subset, "mean") for subset in SUBSETS] + [(subset, "mlp") for subset in SUBSETS if "compressed" in subset],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_packed_equals_alone(branches, compression, separate_keys):
    fields = {"branches": branches, "compression": compression, "separate_keys": separate_keys}
    assert_packing_never_shows(layer(**fields, compression_window=16, compression_stride=8))


@pytest.mark.parametrize(
    "fields",
    [
        {"compression": Pick()},
        {"compression": "mlp", "separate_keys": True},
        {"rope_theta": None},
        {"value_dim": 12},
        {"use_bias": True, "out_features": 5},
    ],
    ids="-".join,
)
def test_packed_equals_alone_with(fields):
    assert_packing_never_shows(layer(**fields))


def test_dense_packed_equals_alone():
    assert_packing_never_shows(DenseAttention(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=12))


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_dense_is_softmax_attention_to_all_that_came_before(implementation):
    module = DenseAttention(num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=None, implementation=implementation)
    x, segment_ids = rows_of([make_documents(21, 50)], 80)
    params = init(module, x, segment_ids)
    query, key, value = (
        jnp.einsum("btf,fhd->bthd", x, params["params"][name]["kernel"]) for name in ("query", "key", "value")
    )
    causal = (segment_ids[:, :, None] == segment_ids[:, None, :]) & jnp.tril(jnp.ones((80, 80), bool))[None]
    output = jax.nn.dot_product_attention(query, key, value, mask=causal[:, None])
    expected = jnp.einsum("bthd,hdf->btf", output, params["params"]["out"]["kernel"])
    # the same sums in float32, in another order
    np.testing.assert_allclose(
        jax.jit(module.apply)(params, x, segment_ids)[:, :71], expected[:, :71], rtol=2e-5, atol=2e-5
    )


@pytest.mark.gpu
def test_dense_without_segment_ids_equals_one_segment():
    module = DenseAttention(num_heads=4, num_kv_heads=2, head_dim=64, dtype=jnp.bfloat16)
    x = jnp.asarray(make_documents(300)[0])[None]
    one = jnp.zeros((1, 300), jnp.int32)
    params = init(module, x, None)
    grads = jax.jit(jax.grad(lambda params, ids: jnp.square(module.apply(params, x, ids)).sum()))
    for got, want in zip(jax.tree.leaves(grads(params, None)), jax.tree.leaves(grads(params, one)), strict=True):
        # weights in bfloat16 (2 ** -8), which add up over 300 tokens
        np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2 * np.abs(want).max())


@pytest.mark.parametrize("separate_keys", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("compression", ["mean", "mlp", Pick()], ids=["mean", "mlp", "custom"])
def test_gradients_reach_every_parameter(compression, separate_keys):
    module = layer(compression=compression, compression_stride=8, separate_keys=separate_keys, use_bias=True)
    x, segment_ids = rows_of([make_documents(40, 60)], 112)
    params = init(module, x, segment_ids)
    weights = jax.random.normal(jax.random.key(2), x.shape)
    grads = jax.jit(jax.grad(lambda params: jnp.vdot(weights, module.apply(params, x, segment_ids))))(params)
    grads = flatten_dict(grads["params"], sep="/")
    # softmax does not feel what all keys share: their bias matters through rotation only, but then it does
    for name, grad in grads.items():
        assert np.isfinite(grad).all(), name
        assert np.abs(grad).max() > 1e-6, name
    expected = {"query", "key", "value", "gate", "out"}
    if compression != "mean":
        expected |= {"compress_key", "compress_value"}
    assert {name.split("/")[0] for name in grads} == expected
    for copy in range(3 if separate_keys else 0):
        assert np.abs(grads["key/kernel"][:, copy]).max() > 1e-6


def test_vmap_over_examples_and_over_parameters():
    module = layer(compression="mlp")
    x, segment_ids = rows_of([make_documents(40, 24)], 64)
    x, segment_ids = jnp.stack([x, 2 * x]), jnp.stack([segment_ids, segment_ids])
    params = init(module, x[0], segment_ids[0])
    params = [params, jax.tree.map(lambda leaf: 2 * leaf, params)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    mapped = jax.jit(jax.vmap(module.apply))(stacked, x, segment_ids)
    alone = jax.jit(module.apply)
    for i in range(2):
        # batched products may round differently
        np.testing.assert_allclose(mapped[i], alone(params[i], x[i], segment_ids[i]), rtol=2e-5, atol=2e-5)


def test_bfloat16_keeps_float32_parameters():
    module = layer(dtype=jnp.bfloat16, compression="mlp")
    x, segment_ids = rows_of([make_documents(64)], 64)
    params = init(module, x, segment_ids)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(module.apply, params, x, segment_ids).dtype == jnp.bfloat16


def test_window_size_zero_drops_the_branch():
    x, segment_ids = rows_of([make_documents(64)], 64)
    with_zero, without = layer(window_size=0), layer(branches=("compressed", "selected"))
    params = init(without, x, segment_ids)
    np.testing.assert_array_equal(with_zero.apply(params, x, segment_ids), without.apply(params, x, segment_ids))


def test_partitioning_names_every_axis():
    module = layer(compression="mlp", separate_keys=True, use_bias=True)
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, FEATURES)))
    specs = flatten_dict(nn.get_partition_spec(boxed)["params"], sep="/")
    shapes = flatten_dict(nn.unbox(boxed)["params"], sep="/")
    assert {name: len(spec) for name, spec in specs.items()} == {name: leaf.ndim for name, leaf in shapes.items()}
    assert specs["key/kernel"] == jax.sharding.PartitionSpec("embed", "branches", "kv_heads", "kv")
    assert specs["out/kernel"] == jax.sharding.PartitionSpec("heads", "kv", "embed")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads: expected a multiple of num_kv_heads=3, got 4"),
        ({"head_dim": 7}, "head_dim: expected a multiple of 4 from 4 to 256, got 7"),
        (
            {"head_dim": None, "num_heads": 5, "num_kv_heads": 1},
            "num_heads: expected a divisor of the 24 features, got 5",
        ),
        ({"branches": ("window",)}, "branches: expected some of .* got 'window'"),
        ({"branches": ("sliding",), "window_size": 0}, "branches: none left"),
        ({"compression": "max"}, "compression: expected 'mean', 'mlp' or a linen module, got 'max'"),
        ({"compression": "mlp", "branches": ("selected",)}, "compression: a learned map needs the compressed branch"),
    ],
)
def test_errors(fields, message):
    module = NativeSparseAttention(**({"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "block_size": 16} | fields))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, FEATURES)))
