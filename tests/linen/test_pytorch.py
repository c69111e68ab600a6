"""flash-linear-attention's parameters: the same numbers as its formulas, recomputed here token by token in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from safetensors.numpy import save_file

import nsa_jax.nnx
from nsa_jax.linen import NativeSparseAttention, NSATransformer, config_from_torch, from_torch

LENGTH, FEATURES, HEADS, KV_HEADS, WIDTH, VOCABULARY = 100, 24, 4, 2, 8, 11
BLOCK, COUNT, WINDOW, THETA, EPSILON = 16, 4, 9, 1000.0, 1e-3
CONFIG = {
    "hidden_size": FEATURES,
    "num_hidden_layers": 2,
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "head_dim": WIDTH,
    "intermediate_size": 20,
    "block_size": BLOCK,
    "block_counts": COUNT,
    "window_size": WINDOW,
    "rope_theta": THETA,
    "norm_eps": EPSILON,
    "vocab_size": VOCABULARY,
}


def random_arrays(shapes):
    generator = np.random.default_rng(0)
    return {name: (generator.normal(size=shape) / 2).astype(np.float32) for name, shape in shapes.items()}


def layer_shapes(prefix="", biases=False):
    rows = {"q": HEADS * WIDTH, "k": KV_HEADS * WIDTH, "v": KV_HEADS * WIDTH, "g": 3 * HEADS}
    shapes = {f"{prefix}{name}_proj.weight": (size, FEATURES) for name, size in rows.items()}
    shapes[f"{prefix}o_proj.weight"] = (FEATURES, HEADS * WIDTH)
    return shapes | {f"{prefix}{name}_proj.bias": (rows[name],) for name in "qkv" if biases}


def model_shapes():
    shapes = {"model.embeddings.weight": (VOCABULARY, FEATURES), "model.norm.weight": (FEATURES,)}
    for number in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        shapes |= layer_shapes(f"{prefix}attn.")
        shapes |= {f"{prefix}{name}_norm.weight": (FEATURES,) for name in ("attn", "mlp")}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (20, FEATURES) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (FEATURES, 20)}
    return shapes | {"lm_head.weight": (VOCABULARY, FEATURES)}


def softmax(scores):
    scores = np.exp(scores - scores.max())
    return scores / scores.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rotary(x):
    """Channel i turns with channel i + WIDTH / 2. x [T, heads, WIDTH]."""
    angle = np.arange(len(x))[:, None, None] * THETA ** (-np.arange(0, WIDTH, 2) / WIDTH)
    first, second = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)], axis=-1
    )


def attention(weights, x):
    """x [T, FEATURES] through the layer, one token and head after the other."""

    def project(name, *shape):
        return (x @ weights[f"{name}_proj.weight"].T + weights.get(f"{name}_proj.bias", 0)).reshape(len(x), *shape)

    query, key = rotary(project("q", HEADS, WIDTH)), rotary(project("k", KV_HEADS, WIDTH))
    value, gate = project("v", KV_HEADS, WIDTH), sigmoid(project("g", HEADS, 3))
    blocks = len(x) // BLOCK
    pooled_key, pooled_value = (
        y[: blocks * BLOCK].reshape(blocks, BLOCK, KV_HEADS, WIDTH).mean(1) for y in (key, value)
    )
    output = np.zeros((len(x), HEADS, WIDTH))
    group = HEADS // KV_HEADS
    for t in range(len(x)):
        seen, own = (t + 1) // BLOCK, t // BLOCK
        for h in range(KV_HEADS):
            heads = range(h * group, (h + 1) * group)
            compressed = {n: softmax(pooled_key[:seen, h] @ query[t, n] * WIDTH**-0.5) if seen else [] for n in heads}
            importance = np.zeros(own + 1)
            importance[:seen] = sum(np.asarray(compressed[n]) for n in heads) if seen else 0
            importance[[0, max(own - 1, 0), own]] = np.inf
            chosen = np.argsort(-importance, kind="stable")[:COUNT]
            selected = [s for s in range(t + 1) if s // BLOCK in chosen]
            window = list(range(max(t - WINDOW + 1, 0), t + 1))
            for n in heads:
                if seen:
                    output[t, n] += gate[t, n, 0] * (compressed[n] @ pooled_value[:seen, h])
                for branch, tokens in ((1, selected), (2, window)):
                    weight = softmax(key[tokens, h] @ query[t, n] * WIDTH**-0.5)
                    output[t, n] += gate[t, n, branch] * (weight @ value[tokens, h])
    return output.reshape(len(x), -1) @ weights["o_proj.weight"].T


def norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weight


def language_model(weights, tokens):
    x = weights["model.embeddings.weight"][tokens]
    for number in range(CONFIG["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{number}."): array
            for name, array in weights.items()
            if name.startswith(f"model.layers.{number}.")
        }
        attn = {name.removeprefix("attn."): array for name, array in own.items()}
        x = x + attention(attn, norm(x, own["attn_norm.weight"]))
        y = norm(x, own["mlp_norm.weight"])
        gate = y @ own["mlp.gate_proj.weight"].T
        x = x + (gate * sigmoid(gate) * (y @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights.get("lm_head.weight", weights["model.embeddings.weight"]).T


def in_float64(arrays):
    return {name: array.astype(np.float64) for name, array in arrays.items()}


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_layer_computes_their_formulas(biases):
    weights = random_arrays(layer_shapes(biases=biases))
    x = np.random.default_rng(1).normal(size=(LENGTH, FEATURES)).astype(np.float32)
    fields = {
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": WIDTH,
        "block_size": BLOCK,
        "block_counts": COUNT,
        "window_size": WINDOW,
        "rope_theta": THETA,
        "use_bias": biases,
    }
    variables = from_torch(weights)
    output = jax.jit(NativeSparseAttention(**fields).apply)(variables, x[None])[0]
    expected = attention(in_float64(weights), x.astype(np.float64))
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())  # float32 sums

    module = nsa_jax.nnx.NativeSparseAttention(in_features=FEATURES, **fields, rngs=nnx.Rngs(0))
    nsa_jax.nnx.load_linen(module, variables)
    np.testing.assert_array_equal(nnx.jit(lambda module, x: module(x))(module, x[None])[0], output)


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_model_computes_their_formulas(tied, tmp_path):
    weights = random_arrays(model_shapes())
    if tied:
        del weights["lm_head.weight"]
    save_file(weights | {"model.layers.0.attn.rotary.inv_freq": np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    config = config_from_torch(CONFIG | {"tie_word_embeddings": tied})
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, LENGTH)
    variables = from_torch(tmp_path)
    logits = jax.jit(NSATransformer(config).apply)(variables, jnp.asarray(tokens, jnp.int32)[None])[0]
    expected = language_model(in_float64(weights), tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())  # float32, two layers
    abstract = jax.eval_shape(NSATransformer(config).init, jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    assert jax.tree.map(lambda leaf: leaf.shape, nn.unbox(abstract)) == jax.tree.map(np.shape, variables)


def test_bfloat16_stays(tmp_path):
    weights = {name: array.astype(jnp.bfloat16) for name, array in random_arrays(layer_shapes()).items()}
    save_file(weights, tmp_path / "layer.safetensors")
    params = from_torch(tmp_path / "layer.safetensors")["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_config_defaults_are_theirs():
    config = config_from_torch({"hidden_size": 1024, "num_heads": 32, "num_kv_heads": None}, dtype=jnp.bfloat16)
    assert (config.mlp_size, config.head_dim, config.num_layers, config.num_kv_heads) == (2816, 32, 24, 32)
    assert config.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.embedding.weight": (3,)}, "state_dict: unexpected embedding.weight"),
        ({"model.norm.weight": None}, "state_dict: missing norm.weight"),
        (
            {"model.layers.1.attn_res_norm.weight": (FEATURES,)},
            "state_dict, layers.1.: unexpected attn_res_norm.weight",
        ),
        (
            {"model.layers.1.mlp.down_proj.weight": (FEATURES, 21)},
            "state_dict, layers.1.: wrong shape: mlp.down_proj.weight expected [24, 20], got [24, 21]",
        ),
        ({"model.layers.1.attn.q_proj.weight": None}, "state_dict, layers.1.attn.: missing q_proj.weight"),
        (
            {"model.layers.0.attn.o_proj.weight": (HEADS * WIDTH, FEATURES)},
            "state_dict, layers.0.attn.: wrong shape: o_proj.weight expected [24, 32], got [32, 24]",
        ),
        ({"model.layers.0.attn.q_proj.bias": (32,)}, "state_dict: layers.0.attn.q_proj.bias: the model here has no"),
        ({"model.layers.3.attn_norm.weight": (FEATURES,)}, "state_dict: missing layers.2. of 4 layers"),
    ],
)
def test_errors_name_what_does_not_fit(change, message):
    shapes = {name: shape for name, shape in (model_shapes() | change).items() if shape is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        from_torch({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g_proj.weight": (3 * HEADS + 1, FEATURES)}, "state_dict: expected q_proj [N * K, features]"),
        ({"v_proj.weight": None, "v_proj.kernel": (1,)}, "state_dict: missing v_proj.weight; unexpected v_proj.kernel"),
        ({"q_proj.bias": (32,)}, "state_dict: missing k_proj.bias, v_proj.bias"),
        ({"q_proj.weight": None}, "state_dict: expected a layer (q_proj.weight, ...) or a model (layers.0. ...), got"),
    ],
)
def test_errors_of_a_layer(change, message):
    shapes = {name: shape for name, shape in (layer_shapes() | change).items() if shape is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        from_torch({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


@pytest.mark.parametrize("field", [{"qkv_bias": True}, {"hidden_act": "powlu"}, {"attnres_block_size": 4}])
def test_config_refuses_what_the_model_has_not(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"config: expected {name}="):
        config_from_torch(CONFIG | field)
