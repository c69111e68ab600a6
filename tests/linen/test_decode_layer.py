"""Decoding in layer and model: tokens that come in chunks give what the whole row gives in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_attention_layer import FEATURES, Pick, init, layer
from test_transformer import SMALL

from nsa_jax.linen import DenseAttention, NativeSparseAttention, NSATransformer

T = 70
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, FEATURES)), jnp.float32)
RATIO = 2e-5  # relative root-mean-square error: float32 sums in another order


def ratio(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


def empty(module, x):
    """The cache that init makes, of zeros as it is; no compilation, unlike module.init."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(module.init, jax.random.key(0), x)["cache"]
    )


def stepper(module, params):
    """A jitted function of (cache, tokens, lengths) that gives (output, cache)."""

    @jax.jit
    def step(cache, x, lengths=None):
        output, kept = module.apply({**params, "cache": cache}, x, lengths=lengths, mutable=["cache"])
        return output, kept["cache"]

    return step


def in_chunks(step, cache, x, chunks=(30, *[1] * 10, 30)):
    outputs, at = [], 0
    for size in chunks:
        output, cache = step(cache, x[:, at : at + size])
        outputs.append(output)
        at += size
    assert at == x.shape[1]
    return jnp.concatenate(outputs, axis=1), cache


OVERLAPPING = {"compression_window": 16, "compression_stride": 4}
LAYERS = {
    "shared": {},
    "learned": {"compression": "mlp", **OVERLAPPING},
    "custom": {"compression": Pick(), "use_bias": True, "value_dim": 12},
    "separate": {"separate_keys": True, **OVERLAPPING},
    "separate, learned": {
        "separate_keys": True,
        "compression": "mlp",
        "compression_window": 16,
        "compression_stride": 8,
    },
    "separate, wide window": {"separate_keys": True, "window_size": 50, "rope_theta": None},
    "sliding": {"branches": ("sliding",)},
    "compressed": {"branches": ("compressed",), "compression": "mlp"},
    "selected, sliding": {"branches": ("selected", "sliding"), "separate_keys": True},
}


@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
def test_chunks_give_the_output_of_training(fields):
    module, decoder = layer(**fields), layer(**fields, decode=True)
    params = init(module, X, None)
    output, cache = in_chunks(stepper(decoder, params), empty(decoder, X), X)
    assert ratio(output, jax.jit(module.apply)(params, X)) <= RATIO
    assert cache["state"].length.tolist() == [T, T]


def test_the_sliding_branch_keeps_only_its_window():
    x = jnp.zeros((2, 4096, FEATURES))
    state = empty(layer(separate_keys=True, window_size=20, decode=True), x)["state"]
    assert state.cache.key.shape[1] == 4096 and state.near.key.shape[1] == 32
    assert empty(layer(branches=("sliding",), decode=True), x)["state"].cache is None


@pytest.mark.parametrize(
    "fields", [{"compression": "mlp", **OVERLAPPING}, {"separate_keys": True}], ids=["learned", "ring"]
)
def test_rows_of_lengths_of_their_own(fields):
    module, decoder = layer(**fields), layer(**fields, decode=True)
    params = init(module, X, None)
    expected, step = jax.jit(module.apply)(params, X), stepper(decoder, params)
    cache, taken = empty(decoder, X), np.zeros(2, int)
    for lengths in ([30, 9], [1, 0], [0, 1], [20, 30], [1, 1]):
        size = max(lengths)
        parts = [
            np.pad(X[row, at : at + n], ((0, size - n), (0, 0)), constant_values=9)
            for row, (at, n) in enumerate(zip(taken, lengths, strict=True))
        ]
        output, cache = step(cache, jnp.asarray(np.stack(parts)), jnp.asarray(lengths, jnp.int32))
        for row, n in enumerate(lengths):
            if n:
                assert ratio(output[row, :n], expected[row, taken[row] : taken[row] + n]) <= RATIO
        taken += lengths
    assert cache["state"].length.tolist() == taken.tolist()


def test_without_room_the_output_is_nan():
    for fields in ({}, {"branches": ("sliding",)}):
        decoder = layer(**fields, decode=True)
        params = init(layer(**fields), X, None)
        step = stepper(decoder, params)
        _, cache = step(empty(decoder, X[:, :64]), X[:, :62])
        output, cache = step(cache, X[:, 62:66])
        assert (
            np.isnan(output).all(axis=2).tolist()
            == np.isnan(output).any(axis=2).tolist()
            == [[False] * 2 + [True] * 2] * 2
        )
        assert cache["state"].length.tolist() == [64, 64]


def test_state_in_the_callers_hands():
    module = layer(separate_keys=True)
    params = init(module, X, None)
    bound = module.bind(params)
    state = bound.init_state(2, T, FEATURES, jnp.float32)
    first, state = bound(X[:, :40], state=state)
    second, state = bound(X[:, 40:], state=state)
    assert ratio(jnp.concatenate([first, second], axis=1), module.apply(params, X)) <= RATIO


MODELS = {
    "shared": {},
    "separate, learned": {"separate_keys": True, "compression": "mlp"},
    "dense": {"attention": "dense"},
    "one layer": {"num_layers": 1, "tie_embeddings": True},
}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_logits_of_the_model(fields):
    config = dataclasses.replace(SMALL, **fields)
    model, decoder = NSATransformer(config), NSATransformer(config, decode=True)
    tokens = jax.random.randint(jax.random.key(0), (2, T), 0, config.vocab_size)
    params = jax.tree.map(lambda x: 3 * x, nn.unbox(jax.jit(model.init)(jax.random.key(1), tokens)))
    cache = empty(decoder, tokens)
    jax.tree.map(np.testing.assert_array_equal, cache, decoder.init_cache(2, T))
    output, _ = in_chunks(stepper(decoder, params), cache, tokens)
    assert ratio(output, jax.jit(model.apply)(params, tokens)) <= RATIO


@pytest.mark.parametrize("fields", [{}, {"separate_keys": True, "compression": "mlp"}], ids=["shared", "separate"])
def test_steps_and_layers_copy_no_cache(fields):
    """A scan over steps around the scan over layers, its cache donated."""
    decoder = NSATransformer(dataclasses.replace(SMALL, **fields), decode=True)
    abstract = nn.unbox(jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((2, 4096), jnp.int32)))

    def steps(cache, params, tokens):
        def step(cache, tokens):
            logits, kept = decoder.apply({"params": params, "cache": cache}, tokens, mutable=["cache"])
            return kept["cache"], logits

        return jax.lax.scan(step, cache, tokens)

    tokens = jnp.zeros((5, 2, 1), jnp.int32)
    memory = (
        jax.jit(steps, donate_argnums=0)
        .lower(abstract["cache"], abstract["params"], tokens)
        .compile()
        .memory_analysis()
    )
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract["cache"]))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < abstract["cache"]["state"].cache.key.size  # a quarter of its bytes


@pytest.mark.parametrize(
    ("decode", "arguments", "message"),
    [
        (True, {"segment_ids": jnp.zeros((2, T), jnp.int32)}, "segment_ids: expected None in decoding"),
        (False, {"lengths": jnp.zeros(2, jnp.int32)}, "lengths: expected None without decode=True"),
        (True, {"lengths": jnp.zeros((2, 1), jnp.int32)}, "lengths: expected shape .2., got"),
    ],
)
def test_errors(decode, arguments, message):
    for module in (layer(decode=decode), DenseAttention(num_heads=2, head_dim=8, decode=decode)):
        cache = empty(module, X) if decode else {}
        params = init(module.clone(decode=False), X, None)
        with pytest.raises(ValueError, match=message):
            module.apply({**params, "cache": cache}, X, mutable=["cache"], **arguments)


def test_decode_is_off_unless_asked_for():
    assert not NativeSparseAttention(num_heads=1).decode and not NSATransformer(SMALL).decode


def test_kernels_read_rings_and_layers_in_their_places():
    """A token after a prompt, by kernels for few queries, in a model whose layers have all there is."""
    fields = {"separate_keys": True, "compression": "mlp", "window_size": 20}
    config = dataclasses.replace(SMALL, **fields)
    tokens = jax.random.randint(jax.random.key(0), (2, 52), 0, config.vocab_size)
    decoder = NSATransformer(config, decode=True)
    params = nn.unbox(jax.jit(NSATransformer(config).init)(jax.random.key(1), tokens))
    params = jax.tree.map(lambda x: 3 * x, params)
    expected, cache = in_chunks(stepper(decoder, params), decoder.init_cache(2, 64), tokens[:, :51], (51,))
    expected, _ = stepper(decoder, params)(cache, tokens[:, 51:])
    kernels = NSATransformer(dataclasses.replace(config, implementation="triton"), decode=True)
    output, _ = stepper(kernels, params)(cache, tokens[:, 51:])
    assert ratio(output, expected) <= RATIO
