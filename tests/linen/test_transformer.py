"""The language model: its parameter tree, scan and remat, shapes of the presets, compilations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from nsa_jax.linen import PRESETS, NSATransformer, TransformerConfig, transformer

SMALL = TransformerConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_size=24,
    block_size=16,
    block_counts=2,
    window_size=8,
)
TOKENS = jax.random.randint(jax.random.key(0), (1, 48), 0, 32)
SEGMENT_IDS = jnp.repeat(jnp.array([0, 1, -1], jnp.int32), jnp.array([20, 24, 4]), total_repeat_length=48)[None]

TREE = {
    "embed/embedding": (32, 16),
    "layers/attention/compress_key/down/bias": (2, 8),
    "layers/attention/compress_key/down/kernel": (2, 16, 8),
    "layers/attention/compress_key/position": (2, 16, 8),
    "layers/attention/compress_key/up/bias": (2, 16),
    "layers/attention/compress_key/up/kernel": (2, 128, 16),
    "layers/attention/compress_value/down/bias": (2, 8),
    "layers/attention/compress_value/down/kernel": (2, 16, 8),
    "layers/attention/compress_value/position": (2, 16, 8),
    "layers/attention/compress_value/up/bias": (2, 16),
    "layers/attention/compress_value/up/kernel": (2, 128, 16),
    "layers/attention/gate/kernel": (2, 16, 3, 2),
    "layers/attention/key/kernel": (2, 16, 3, 1, 8),
    "layers/attention/out/kernel": (2, 2, 8, 16),
    "layers/attention/query/kernel": (2, 16, 2, 8),
    "layers/attention/value/kernel": (2, 16, 3, 1, 8),
    "layers/attention_norm/scale": (2, 16),
    "layers/mlp/down/kernel": (2, 24, 16),
    "layers/mlp/gate/kernel": (2, 16, 24),
    "layers/mlp/up/kernel": (2, 16, 24),
    "layers/mlp_norm/scale": (2, 16),
    "norm/scale": (16,),
    "head/kernel": (16, 32),
}
SHARED_MEAN = {name: shape for name, shape in TREE.items() if "compress" not in name} | {
    "layers/attention/key/kernel": (2, 16, 1, 8),
    "layers/attention/value/kernel": (2, 16, 1, 8),
}


def abstract_params(config):
    variables = jax.eval_shape(NSATransformer(config).init, jax.random.key(0), jnp.zeros((1, 64), jnp.int32))
    return nn.unbox(variables)["params"]


def shapes(config):
    return {name: leaf.shape for name, leaf in flatten_dict(abstract_params(config), sep="/").items()}


def test_the_parameter_tree_is_stable():
    assert shapes(dataclasses.replace(SMALL, compression="mlp", separate_keys=True)) == TREE
    assert shapes(SMALL) == SHARED_MEAN


def test_tied_embeddings_have_no_head():
    tied = shapes(dataclasses.replace(SMALL, tie_embeddings=True))
    assert tied == {name: shape for name, shape in SHARED_MEAN.items() if name != "head/kernel"}


def test_dense_attention_has_the_same_tree_without_gates():
    dense = shapes(dataclasses.replace(SMALL, attention="dense"))
    assert dense == {name: shape for name, shape in SHARED_MEAN.items() if "attention/gate" not in name}


def test_the_340m_preset_by_shapes_alone():
    params = abstract_params(PRESETS["340m"])
    flat = flatten_dict(params, sep="/")
    assert flat["layers/attention/query/kernel"].shape == (24, 1024, 32, 64)
    assert flat["layers/attention/key/kernel"].shape == (24, 1024, 2, 64)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in flat.values())
    # embedding and head, then per layer: query and out, key and value, gates, SwiGLU, two norms
    layer = 2 * 1024 * 2048 + 2 * 1024 * 128 + 1024 * 96 + 3 * 1024 * 2816 + 2 * 1024
    assert sum(leaf.size for leaf in flat.values()) == 2 * 32_000 * 1024 + 24 * layer + 1024


def value_and_grad(config, params):
    def loss(params):
        logits = NSATransformer(config).apply({"params": params}, TOKENS, SEGMENT_IDS)
        return jnp.square(logits).mean()

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def params():
    return nn.unbox(jax.jit(NSATransformer(SMALL).init)(jax.random.key(0), TOKENS))["params"]


def test_remat_changes_no_value_and_no_gradient(params):
    plain, grads = value_and_grad(dataclasses.replace(SMALL, remat=False), params)(params)
    again, grads_again = value_and_grad(SMALL, params)(params)
    # one fusion more or less: float32 rounding
    np.testing.assert_allclose(plain, again, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), grads, grads_again)


def test_remat_keeps_outputs_and_lse_of_the_kernels(params, monkeypatch):
    def stacked_lse():
        """How often float32 [L, B, T, N], what a scan over layers hands on of an lse, stands in the derivative."""
        model = NSATransformer(dataclasses.replace(SMALL, implementation="triton"))
        loss = jax.grad(lambda params: model.apply({"params": params}, TOKENS, SEGMENT_IDS).sum())
        return str(jax.make_jaxpr(loss)(params)).count("f32[2,1,48,2]")

    assert stacked_lse() >= 3
    monkeypatch.setattr(transformer, "remat_policy", lambda: jax.checkpoint_policies.nothing_saveable)
    assert stacked_lse() == 0


def test_scanned_layers_equal_layers_one_by_one(params):
    x = jnp.take(params["embed"]["embedding"], TOKENS, axis=0)
    for number in range(SMALL.num_layers):
        own = jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"])
        x, _ = transformer.Layer(SMALL).apply({"params": own}, x, SEGMENT_IDS)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + SMALL.norm_epsilon)
    logits = x * params["norm"]["scale"][None, None] @ params["head"]["kernel"]
    scanned = NSATransformer(SMALL).apply({"params": params}, TOKENS, SEGMENT_IDS)
    # compiled as one and op by op: float32 rounding
    np.testing.assert_allclose(scanned, logits, rtol=1e-4, atol=1e-5)


def test_logits_are_causal(params):
    apply = jax.jit(NSATransformer(SMALL).apply)
    before = apply({"params": params}, TOKENS)
    after = apply({"params": params}, TOKENS.at[0, 30].add(1))
    np.testing.assert_array_equal(before[:, :30], after[:, :30])
    assert not np.array_equal(before[:, 30:], after[:, 30:])


def test_logical_axes_shard_over_a_mesh():
    variables = jax.eval_shape(NSATransformer(SMALL).init, jax.random.key(0), TOKENS)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
    specs = nn.get_partition_spec(variables)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, [("heads", "model"), ("mlp", "model"), ("vocab", "model")])
    flat = flatten_dict(shardings["params"], sep="/")
    assert flat["layers/attention/query/kernel"].spec == jax.sharding.PartitionSpec(None, None, "model", None)
    assert flat["layers/mlp/down/kernel"].spec == jax.sharding.PartitionSpec(None, "model", None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_heads", 3, "num_heads: expected a multiple of num_kv_heads=2, got 3"),
        ("head_dim", 6, "head_dim: expected a multiple of 4, got 6"),
        ("hidden_size", 0, "hidden_size: expected a positive number, got 0"),
        ("attention", "flash", "attention: expected 'nsa' or 'dense', got 'flash'"),
    ],
)
def test_config_errors(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, num_kv_heads=2, **({"num_heads": 2} | {field: value}))
