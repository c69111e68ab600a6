"""The NNX layer: equal to the linen layer, packing, gradients, a training step, logical axes, the bridge, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import nsa_jax.linen
from nsa_jax.nnx import NativeSparseAttention, load_linen, to_linen

FEATURES = 24
FIELDS = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "block_size": 16,
    "block_counts": 2,
    "window_size": 9,
    "num_local_blocks": 1,
    "num_init_blocks": 0,
}
LEARNED = {"compression": "mlp", "compression_stride": 8, "separate_keys": True, "use_bias": True}
VARIANTS = [
    {},
    LEARNED,
    {"branches": ("sliding", "compressed"), "value_dim": 12, "rope_theta": None, "out_features": 5},
    {"window_size": 0, "dtype": jnp.bfloat16},
]
X = jax.random.normal(jax.random.key(0), (2, 112, FEATURES))
SEGMENT_IDS = jnp.repeat(jnp.array([[0, 1, -1], [5, 3, 4]]), jnp.array([21, 70, 21]), axis=1, total_repeat_length=112)

apply = nnx.jit(lambda module, *arrays: module(*arrays))
over_variants = pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: "-".join(fields) or "default")


def layer(**fields):
    return NativeSparseAttention(in_features=FEATURES, **(FIELDS | fields), rngs=nnx.Rngs(0))


def randomised(module):
    """The module, none of its parameters zero."""
    generator = np.random.default_rng(1)
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape) / 4, x.dtype), state))
    return module


def by_name(module):
    return {"/".join(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


@over_variants
def test_equals_the_linen_layer_bit_for_bit_both_ways(fields):
    linen = nsa_jax.linen.NativeSparseAttention(**(FIELDS | fields))
    module = randomised(layer(**fields))
    variables = to_linen(module)
    output = apply(module, X, SEGMENT_IDS)
    np.testing.assert_array_equal(output, jax.jit(linen.apply)(nn.unbox(variables), X, SEGMENT_IDS))
    assert np.abs(output).max() > 0.01

    other = layer(**fields)
    assert not np.array_equal(apply(other, X, SEGMENT_IDS), output)
    load_linen(other, variables)
    np.testing.assert_array_equal(apply(other, X, SEGMENT_IDS), output)


@over_variants
def test_parameters_and_axis_names_are_those_of_the_linen_layer(fields):
    linen = nsa_jax.linen.NativeSparseAttention(**(FIELDS | fields))
    expected = jax.eval_shape(linen.init, jax.random.key(0), X)
    got = jax.eval_shape(lambda: to_linen(layer(**fields)))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert jax.tree.leaves(got) == jax.tree.leaves(expected)
    assert nn.get_partition_spec(got) == nn.get_partition_spec(expected)


def test_packing_never_shows():
    module = randomised(layer(**LEARNED))
    packed = apply(module, X, SEGMENT_IDS)
    x = jnp.pad(X[:1, 21:91], ((0, 0), (0, 42), (0, 0)))
    alone = apply(module, x, jnp.where(jnp.arange(112) < 70, 0, -1)[None])
    # the same sums in float32, in an order that depends on the place in the row
    np.testing.assert_allclose(packed[0, 21:91], alone[0, :70], rtol=2e-5, atol=2e-6)


def test_gradients_reach_every_parameter():
    module = randomised(layer(**LEARNED))
    weights = jax.random.normal(jax.random.key(2), X.shape)
    grads = nnx.jit(nnx.grad(lambda module: jnp.vdot(weights, module(X, SEGMENT_IDS))))(module)
    grads = {"/".join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(grads)}
    assert set(grads) == set(by_name(module))
    for name, grad in grads.items():
        assert np.isfinite(grad).all(), name
        assert np.abs(grad).max() > 1e-6, name


def test_a_training_step_lowers_the_loss():
    module = layer()
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)
    target = jnp.roll(X, 1, axis=1)

    @nnx.jit
    def step(module, optimizer):
        loss, grads = nnx.value_and_grad(lambda module: jnp.square(module(X, SEGMENT_IDS) - target).mean())(module)
        optimizer.update(module, grads)
        return loss

    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    with jax.numpy_dtype_promotion("standard"):  # for Adam's own arithmetic
        losses = [float(step(module, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    after = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)))


@pytest.mark.parametrize("fields", [{}, LEARNED], ids=["plain", "learned"])
def test_decoding_gives_what_the_whole_text_gives(fields):
    x = X[:, :70]
    module = randomised(layer(**fields))
    whole = apply(module, x)
    decoder = layer(**fields, decode=True)
    load_linen(decoder, to_linen(module))
    decoder.init_cache(x.shape)
    assert set(by_name(decoder)) == set(by_name(module))
    pieces = [apply(decoder, x[:, begin : begin + 35]) for begin in (0, 35)]
    # the same sums in float32, in another order
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=2e-4, atol=2e-5)
    assert jax.tree.leaves(nnx.state(decoder, nnx.Cache))


def test_decoding_wants_a_cache_and_no_segments():
    decoder = layer(decode=True)
    with pytest.raises(ValueError, match="decode: expected a cache, which init_cache makes, got none"):
        decoder(X)
    with pytest.raises(ValueError, match="segment_ids: expected None in decoding"):
        decoder(X, SEGMENT_IDS)
    with pytest.raises(ValueError, match="lengths: expected None without decode=True"):
        layer()(X, lengths=jnp.array([3, 4]))


def test_a_custom_map_is_made_for_keys_and_for_values():
    class Pick(nnx.Module):
        def __init__(self, window, width, *, rngs):
            self.weights = nnx.Param(jax.random.normal(rngs.params(), (window,)))
            self.offset = nnx.Param(jnp.ones((width,)))

        def __call__(self, windows):
            picked = jnp.einsum("bclhd,l->bchd", windows, jax.nn.softmax(self.weights[...]))
            return picked + self.offset[...][None, None, None]

    module = layer(compression=Pick, value_dim=12)
    assert module.compress_key.offset.shape == (8,)
    assert module.compress_value.offset.shape == (12,)
    assert not np.array_equal(module.compress_key.weights[...], module.compress_value.weights[...])
    assert apply(module, X, SEGMENT_IDS).shape == X.shape


def test_axis_names_without_a_mesh_and_placement_inside_one():
    specs = nnx.get_partition_spec(nnx.state(layer(separate_keys=True)))
    assert specs["key"]["kernel"].get_value() == jax.P("embed", "branches", "kv_heads", "kv")
    assert specs["out"]["kernel"].get_value() == jax.P("heads", "kv", "embed")

    rules = [("embed", None), ("branches", None), ("kv", None), ("heads", "model"), ("kv_heads", "model")]
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert layer().query.kernel[...].sharding.is_fully_replicated  # a mesh alone gives the names no meaning
        with nnx.logical_axis_rules(rules):
            module = nnx.jit(layer)()
    assert module.query.kernel[...].sharding.spec == jax.P(None, "model")
    assert nnx.get_partition_spec(nnx.state(module))["query"]["kernel"].get_value() == jax.P("embed", "heads", "kv")


def test_the_bridge_takes_either_layer_without_a_mesh():
    x, segment_ids = X[:, :48], SEGMENT_IDS[:, :48]
    module = randomised(layer())
    linen = nsa_jax.linen.NativeSparseAttention(**FIELDS)
    apply_linen = jax.jit(linen.apply)
    wrapped = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x)
    load_linen(wrapped, to_linen(module))
    np.testing.assert_array_equal(
        apply(wrapped, x, segment_ids), apply_linen(nn.unbox(to_linen(module)), x, segment_ids)
    )

    as_linen = nnx.bridge.ToLinen(functools.partial(NativeSparseAttention, in_features=FEATURES, **FIELDS))
    variables = as_linen.init(jax.random.key(0), x)
    assert nn.get_partition_spec(variables) == nn.get_partition_spec(to_linen(module))
    output = jax.jit(as_linen.apply)(variables, x, segment_ids)
    np.testing.assert_array_equal(output, apply_linen(nn.unbox(variables), x, segment_ids))


def test_loading_names_what_does_not_fit():
    variables = nn.unbox(to_linen(layer()))
    gate = variables["params"].pop("gate")
    variables["params"] |= {"door": gate, "query": {"kernel": jnp.zeros((FEATURES, 4, 12))}}
    message = (
        r"variables: missing gate/kernel; unexpected door/kernel; "
        r"wrong shape: query/kernel expected \[24, 4, 8\], got \[24, 4, 12\]"
    )
    module = layer()
    before = np.asarray(module.query.kernel[...])
    with pytest.raises(ValueError, match=message):
        load_linen(module, variables)
    np.testing.assert_array_equal(module.query.kernel[...], before)
    with pytest.raises(ValueError, match=r"variables: expected {'params': ...}, got the keys \['out'\]"):
        load_linen(module, {"out": gate})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads: expected a multiple of num_kv_heads=3, got 4"),
        ({"branches": ("window",)}, "branches: expected some of .* got 'window'"),
        ({"compression": "max"}, "compression: expected 'mean', 'mlp' or a function that makes an NNX module, got"),
        ({"compression": "mlp", "compression_window": 24}, "compression_stride: expected"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        layer(**fields)
    with pytest.raises(ValueError, match=r"x: expected \[B, T, in_features=24\], got \[1, 32, 8\]"):
        layer()(jnp.zeros((1, 32, 8)))
