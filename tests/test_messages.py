"""Every argument of every public op with every kind of wrong thing: the message is short and names the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax

B, T, N, H, K, V, S = 2, 64, 8, 4, 16, 32, 3


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


class Torchlike:
    """Has a shape and a dtype, is no array, and prints at length."""

    shape, ndim, dtype = (B, T, N, K), 4, "torch.float32"

    def __repr__(self):
        return f"tensor([{'0., ' * 9999}])"


PLACES = {"segment_ids": None, "query_indices": None}
COMMON = {"scale": None, **PLACES, "implementation": "xla"}
ROW = {"query": zeros(B, T, N, K), "key": zeros(B, T, H, K), "value": zeros(B, T, H, V)}
WINDOWS = {"window": 32, "stride": 16}
PICKED = {"block_counts": 2, "max_block_count": 2, "num_init_blocks": 1, "num_local_blocks": 1, "block_size": 32}
COMPRESSED = {"compressed_key": zeros(B, 4, H, K), "compressed_value": zeros(B, 4, H, V)}
INDICES = zeros(B, T, H, S, dtype=jnp.int32)
GATES = {name: zeros(B, T, N) for name in ("compressed_gate", "selected_gate", "sliding_gate")}
OPS = {
    nsa_jax.sliding_window_attention: {**ROW, "window_size": 8, **COMMON},
    nsa_jax.compressed_attention: {"query": ROW["query"], **COMPRESSED, **WINDOWS, "key_length": T, **COMMON},
    nsa_jax.select_blocks: {
        "query": ROW["query"], "compressed_key": COMPRESSED["compressed_key"], "lse": zeros(B, T, N), **PICKED,
        **WINDOWS, "key_length": T, **COMMON,
    },
    nsa_jax.selected_attention: {**ROW, "block_indices": INDICES, "block_counts": None, "block_size": 32, **COMMON},
    nsa_jax.native_sparse_attention: {
        **ROW, **GATES, **COMPRESSED, **PICKED, "block_indices": INDICES, "window_size": 8, "compression_window": 32,
        "compression_stride": 16, **COMMON,
    },
    nsa_jax.compress: {"x": ROW["key"], **WINDOWS, "segment_ids": None},
    nsa_jax.gather_windows: {"x": ROW["key"], **WINDOWS, "segment_ids": None},
    nsa_jax.segment_ids_from_cu_seqlens: {"cu_seqlens": np.array([0, 3]), "length": 8},
}  # fmt: skip

HUGE = 10**400
# what no argument takes
WRONG = {
    "list": [[0.0] * 9] * 999,
    "tuple": (1,) * 999,
    "bytes": b"x" * 999,
    "text": "x" * 999,
    "dictionary": {i: i for i in range(999)},
    "object": object(),
    "function": len,
    "complex": 1j,
    "shape and dtype": jax.ShapeDtypeStruct((B, T, N, K), jnp.float32),
    "torch": Torchlike(),
    "too many axes": zeros(*[1] * 30),
    "objects": np.array([None]),
    "letters": np.array(["a"]),
    "random key": jax.random.key(0),
    "NumPy array of float64": np.zeros((B, T, N, K)),
    "float8": zeros(B, T, N, K, dtype=jnp.float8_e4m3fn),
    "bool": True,
    "NumPy bool": np.bool_(True),
}
INTS = {"window_size", "window", "stride", "compression_window", "compression_stride"}
INTS |= {"key_length", "length", "block_size", "num_init_blocks", "num_local_blocks", "max_block_count"}
# what only some take
NUMBERS = {"int": 3, "float": 1.5, "NumPy float": np.float32(2), "NaN": np.nan, "infinity": np.inf}
NUMBERS |= {"huge": HUGE, "less than nothing": -HUGE, "none": None}


def takes(name, kind, default):
    """Whether some argument may be such a number; what is then done with it is another test's."""
    if kind == "none":
        return default is None or name in (*GATES, *INTS, "block_counts", "block_indices", "implementation")
    if name in (*INTS, "block_counts"):
        return kind in ("int", "huge")
    return name in GATES or (name == "scale" and kind in ("int", "float", "NumPy float"))


CASES = [(op, name) for op, arguments in OPS.items() for name in arguments]


@pytest.mark.parametrize(("op", "name"), CASES, ids=[f"{op.__name__}-{name}" for op, name in CASES])
def test_a_wrong_argument_is_named(op, name):
    arguments, faults = OPS[op], []
    for kind, value in (WRONG | NUMBERS).items():
        optional = kind in NUMBERS and takes(name, kind, arguments[name])
        if kind in ("NumPy array of float64", "float8"):
            value = np.zeros(getattr(arguments[name], "shape", (B, T, N, K)), getattr(value, "dtype", None))
        try:
            jax.eval_shape(lambda value=value: op(**{**arguments, name: value}))
        except (TypeError, ValueError) as error:
            message = str(error)
            named = [*arguments] if optional else [name]
            if not message.startswith(tuple(f"{argument}: expected" for argument in named)):
                faults.append(f"{kind}: {message[:160]!r}")
            if len(message) > 300 or "\n" in message or "expected an array, got an array" in message:
                faults.append(f"{kind}: {len(message)} characters, {message[:80]!r}")
        except Exception as error:
            faults.append(f"{kind}: {type(error).__name__} {str(error)[:160]!r}")
        else:
            if not optional:
                faults.append(f"{kind}: accepted")
    assert not faults, "\n".join(faults)


def test_wrong_query_indices_are_named_before_a_lacking_key_length():
    for op in (nsa_jax.compressed_attention, nsa_jax.select_blocks):
        arguments = OPS[op] | {"key_length": None, "query_indices": [[0] * T] * B}
        with pytest.raises(TypeError, match="query_indices: expected an array"):
            op(**arguments)


@pytest.mark.parametrize("op", [op for op, arguments in OPS.items() if "value" in arguments])
def test_values_are_needed(op):
    with pytest.raises(TypeError, match="value: expected an array"):
        op(**OPS[op] | {"value": None})


def test_compressed_values_are_needed():
    with pytest.raises(TypeError, match="compressed_value: expected an array"):
        nsa_jax.compressed_attention(**OPS[nsa_jax.compressed_attention] | {"compressed_value": None})
