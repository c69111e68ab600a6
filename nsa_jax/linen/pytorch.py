"""Parameters and configurations of flash-linear-attention's NSA layer and language model (PyTorch), for linen.

Its names and layouts: fla/layers/nsa.py, fla/models/nsa/, fla/modules/mlp.py, and the same in native-sparse-attention.
A linear layer there holds [out, in]; rotary positions, RMSNorm, SwiGLU, the order of heads and of the branches'
gates (compressed, selected, sliding) are the same as here.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from nsa_jax.layers import parameters
from nsa_jax.linen.config import TransformerConfig

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
#: A buffer that some versions saved; it follows from rope_theta.
_BUFFER = re.compile(r"(?:.*\.)?rotary\.inv_freq")


def from_torch(state_dict: Mapping[str, Any] | str | os.PathLike) -> dict[str, Any]:
    """The variables of a linen module with the parameters of flash-linear-attention's `NativeSparseAttention`,
    `NSAModel` or `NSAForCausalLM`; which of them, its names tell.

    A layer's are for `NativeSparseAttention`, with num_heads, num_kv_heads and head_dim as there, and `use_bias=True`
    if it has biases: those that it lacks (of the gates and of the output) are 0 then. A model's are for
    `NSATransformer` with `config_from_torch`; a head that is not there is the tied embedding.

    Not mapped: block attention residuals (`attnres_block_size`), and biases in a model (`qkv_bias`), which the model
    here has not. `rotary.inv_freq` is left out: it follows from rope_theta.

    Args:
        state_dict: arrays by name, of NumPy or convertible to it; or the path of a `.safetensors` file, or of a folder
            with such files, for which the package safetensors is needed.

    Returns:
        {"params": ...}, NumPy arrays of the same dtypes, for `apply`.

    Raises:
        ValueError: names are missing or not expected, or shapes do not agree.
        ImportError: a path is given and safetensors is not installed.
    """
    arrays = state_dict if isinstance(state_dict, Mapping) else _read(Path(state_dict))
    arrays = {name: np.asarray(array) for name, array in arrays.items() if not _BUFFER.fullmatch(name)}
    params = _layer(arrays, "") if "q_proj.weight" in arrays else _model(arrays)
    return {"params": unflatten_dict(params, sep="/")}


def config_from_torch(config: Mapping[str, Any] | str | os.PathLike, **overrides: Any) -> TransformerConfig:
    """The `TransformerConfig` of an `NSAConfig`.

    Args:
        config: the fields of an `NSAConfig`, or the path of a model's `config.json`. Missing fields have that class's
            defaults; fields of training and generation are not read.
        **overrides: fields of the result, such as dtype.

    Raises:
        ValueError: the model has something that `NSATransformer` has not.
    """
    if not isinstance(config, Mapping):
        config = json.loads(Path(config).read_text())
    for name, plain in (("hidden_act", "swish"), ("qkv_bias", False), ("attnres_block_size", None)):
        if config.get(name, plain) != plain:
            raise ValueError(f"config: expected {name}={plain!r}, which NSATransformer computes, got {config[name]!r}")
    hidden_size = config.get("hidden_size", 2048)
    mlp_size = config.get("intermediate_size")
    if mlp_size is None:
        mlp_size = -(-int(hidden_size * (config.get("hidden_ratio") or 4) * 2 / 3) // 256) * 256
    num_heads = config.get("num_heads", 64)
    fields = {
        "vocab_size": config.get("vocab_size", 32_000),
        "hidden_size": hidden_size,
        "num_layers": config.get("num_hidden_layers", 24),
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_kv_heads", 4) or num_heads,
        "head_dim": config.get("head_dim", 32),
        "mlp_size": mlp_size,
        "block_size": config.get("block_size", 64),
        "block_counts": config.get("block_counts", 16),
        "window_size": config.get("window_size", 512) or 0,
        "rope_theta": config.get("rope_theta", 10_000.0),
        "norm_epsilon": config.get("norm_eps", 1e-6),
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }
    return TransformerConfig(**fields | overrides)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError("state_dict: reading a file needs the package safetensors") from error
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"state_dict: expected a folder with .safetensors files, got {path}")
    return {name: array for file in files for name, array in load_file(file).items()}


def _model(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters of `NSATransformer` by name; those of its layers stacked."""
    arrays = {name.removeprefix("model."): array for name, array in arrays.items()}
    layers: dict[int, dict[str, np.ndarray]] = {}
    rest = {}
    for name, array in arrays.items():
        if found := _LAYER.fullmatch(name):
            layers.setdefault(int(found[1]), {})[found[2]] = array
        else:
            rest[name] = array
    if not layers:
        names = ", ".join(sorted(rest)[:4])
        raise ValueError(f"state_dict: expected a layer (q_proj.weight, ...) or a model (layers.0. ...), got {names}")
    if sorted(layers) != list(range(len(layers))):
        missing = next(number for number in range(max(layers)) if number not in layers)
        raise ValueError(f"state_dict: missing layers.{missing}. of {max(layers) + 1} layers")

    embedding = rest.get("embeddings.weight", np.zeros((0, 0)))
    width = embedding.shape[-1]
    expected = {"embeddings.weight": embedding.shape, "norm.weight": (width,)}
    if "lm_head.weight" in rest:
        expected["lm_head.weight"] = embedding.shape
    parameters.match("state_dict", expected, _shapes(rest))
    params = {"embed/embedding": embedding, "norm/scale": rest["norm.weight"]}
    if "lm_head.weight" in rest:
        params["head/kernel"] = rest["lm_head.weight"].T
    mapped = [_block(layers[number], width, f"layers.{number}.") for number in range(len(layers))]
    for number, layer in enumerate(mapped):
        parameters.match(f"state_dict, layers.{number} beside layers.0", _shapes(mapped[0]), _shapes(layer))
    return params | {f"layers/{name}": np.stack([layer[name] for layer in mapped]) for name in mapped[0]}


def _block(arrays: dict[str, np.ndarray], width: int, prefix: str) -> dict[str, np.ndarray]:
    """One layer of the model: attention, SwiGLU and their norms."""
    attention = {name: array for name, array in arrays.items() if name.startswith("attn.")}
    rest = {name: array for name, array in arrays.items() if name not in attention}
    size = rest["mlp.gate_proj.weight"].shape[0] if "mlp.gate_proj.weight" in rest else 0
    norms = {f"{name}_norm.weight": (width,) for name in ("attn", "mlp")}
    projections = {f"mlp.{name}_proj.weight": (size, width) for name in ("gate", "up")}
    expected = norms | projections | {"mlp.down_proj.weight": (width, size)}
    parameters.match(f"state_dict, {prefix}", expected, _shapes(rest))
    mapped = {f"mlp/{name}/kernel": rest[f"mlp.{name}_proj.weight"].T for name in ("gate", "up", "down")}
    mapped |= {"attention_norm/scale": rest["attn_norm.weight"], "mlp_norm/scale": rest["mlp_norm.weight"]}
    biases = [name for name in attention if name.endswith(".bias")]
    if biases:
        raise ValueError(f"state_dict: {prefix}{biases[0]}: the model here has no biases, only the layer has")
    attention = {name.removeprefix("attn."): array for name, array in attention.items()}
    return mapped | {f"attention/{name}": array for name, array in _layer(attention, f"{prefix}attn.").items()}


def _layer(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Parameters of `NativeSparseAttention` by name."""
    argument = f"state_dict, {prefix}" if prefix else "state_dict"
    expected = {f"{name}_proj.weight": () for name in "qkvgo"}
    if any(name.endswith(".bias") for name in arrays):
        expected |= {f"{name}_proj.bias": () for name in "qkv"}
    names = dict.fromkeys(arrays, ())
    parameters.match(argument, expected, names)

    query, key, gate = (arrays[f"{name}_proj.weight"] for name in "qkg")
    features = query.shape[-1]
    heads = gate.shape[0] // 3
    if not heads or gate.shape[0] % 3 or query.shape[0] % heads or key.shape[0] % (query.shape[0] // heads):
        raise ValueError(
            f"{argument}: expected q_proj [N * K, features], k_proj [H * K, features] and g_proj [N * 3, features], "
            f"got {list(query.shape)}, {list(key.shape)} and {list(gate.shape)}"
        )
    width = query.shape[0] // heads
    kv_heads = key.shape[0] // width
    rows = {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width, "g": 3 * heads}
    shapes = {f"{name}_proj.weight": (size, features) for name, size in rows.items()}
    shapes |= {"o_proj.weight": (features, heads * width)}
    shapes |= {f"{name}_proj.bias": (rows[name],) for name in "qkv" if f"{name}_proj.bias" in expected}
    parameters.match(argument, shapes, _shapes(arrays))

    def split(name: str, *shape: int) -> np.ndarray:
        """[heads * width, features] -> [features, heads, width]."""
        return arrays[f"{name}_proj.weight"].T.reshape(features, *shape)

    params = {
        "query/kernel": split("q", heads, width),
        "key/kernel": split("k", kv_heads, width),
        "value/kernel": split("v", kv_heads, width),
        "gate/kernel": split("g", heads, 3).swapaxes(1, 2),  # [features, branches, N]
        "out/kernel": arrays["o_proj.weight"].T.reshape(heads, width, features),
    }
    if "q_proj.bias" in expected:
        dtype = arrays["q_proj.bias"].dtype
        params |= {
            "query/bias": arrays["q_proj.bias"].reshape(heads, width),
            "key/bias": arrays["k_proj.bias"].reshape(kv_heads, width),
            "value/bias": arrays["v_proj.bias"].reshape(kv_heads, width),
            "gate/bias": np.zeros((3, heads), dtype),
            "out/bias": np.zeros((features,), dtype),
        }
    return params


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}
