"""Bad arguments of the public ops: each message names the argument, what was expected and what came."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import checks
from nsa_jax.runtime import device

B, T, N, H, K, V, S = 2, 64, 8, 4, 16, 32, 3
ARRAYS = {
    "query": jnp.zeros((B, T, N, K)),
    "key": jnp.zeros((B, T, H, K)),
    "value": jnp.zeros((B, T, H, V)),
    "compressed_key": jnp.zeros((B, T // 16, H, K)),
    "compressed_value": jnp.zeros((B, T // 16, H, V)),
    "lse": jnp.zeros((B, T, N)),
    "block_indices": jnp.zeros((B, T, H, S), jnp.int32),
}
GATES = {name: jnp.zeros((B, T, N)) for name in ("compressed_gate", "selected_gate", "sliding_gate")}
WINDOW = {"window": 32, "stride": 16}

# op -> (its arrays, its keywords)
OPS = {
    nsa_jax.sliding_window_attention: (("query", "key", "value"), {"window_size": 8}),
    nsa_jax.compressed_attention: (("query", "compressed_key", "compressed_value"), WINDOW),
    nsa_jax.select_blocks: (("query", "compressed_key", "lse"), WINDOW | {"block_size": 32, "block_counts": 2}),
    nsa_jax.selected_attention: (("query", "key", "value", "block_indices"), {"block_size": 32}),
    nsa_jax.native_sparse_attention: (("query", "key", "value"), {"block_size": 32, **GATES}),
}


def call(op, **changes):
    names, keywords = OPS[op]
    arrays = [changes.pop(name, ARRAYS[name]) for name in names]
    return op(*arrays, **{**keywords, **changes})


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


EVERY = tuple(OPS)
SLIDING, COMPRESSED, SELECT, SELECTED, NATIVE = EVERY
FULL = (SLIDING, SELECTED, NATIVE)  # those that take key and value
WINDOWED = (COMPRESSED, SELECT)
BLOCKED = (SELECT, SELECTED, NATIVE)

# ops, changed arguments, exception, message
CASES = [
    (EVERY, {"query": zeros(T, N, K)}, ValueError, "query: expected shape [B, Tq, N, K], got [64, 8, 16]"),
    (EVERY, {"query": [1.0]}, TypeError, "query: expected an array of JAX or NumPy, got [1.0] (list)"),
    (EVERY, {"query": zeros(B, 0, N, K)}, ValueError, "query: expected at least one token and one head"),
    (EVERY, {"query": zeros(B, T, 6, K)}, ValueError, "query: expected N heads, a multiple of the H = 4 heads of "),
    (EVERY, {"query": zeros(B, T, N, 18)}, ValueError, "query: expected K to be a multiple of 4 from 4 to 256, got 18"),
    (
        EVERY,
        {"query": zeros(B, T, N, 260)},
        ValueError,
        "query: expected K to be a multiple of 4 from 4 to 256, got 260",
    ),
    (FULL, {"key": zeros(B, 63, H, K)}, ValueError, "key: expected shape [2, 64, H, 16], got [2, 63, 4, 16]"),
    (FULL, {"key": zeros(B, T, H, 20)}, ValueError, "key: expected shape [2, 64, H, 16], got [2, 64, 4, 20]"),
    (FULL, {"value": zeros(B, T, 2, V)}, ValueError, "value: expected shape [2, 64, 4, V], got [2, 64, 2, 32]"),
    (FULL, {"value": zeros(B, T, H, 6)}, ValueError, "value: expected V to be a multiple of 4 from 4 to 256, got 6"),
    (
        FULL,
        {"key": zeros(B, T, H, K, dtype=jnp.bfloat16)},
        TypeError,
        "key: expected the dtype of query, float32, got bfloat16",
    ),
    (
        FULL,
        {"value": zeros(B, T, H, V, dtype=jnp.float16)},
        TypeError,
        "value: expected the dtype of query, float32, got float16",
    ),
    (
        WINDOWED,
        {"compressed_key": zeros(B, T, H, K)},
        ValueError,
        "compressed_key: expected shape [2, 4, H, 16], got [2, 64, 4, 16]",
    ),
    (
        (COMPRESSED,),
        {"compressed_value": zeros(B, 3, H, V)},
        ValueError,
        "compressed_value: expected shape [2, 4, 4, V], got [2, 3, 4, 32]",
    ),
    (
        EVERY,
        {"query": np.zeros((B, T, N, K))},
        TypeError,
        "query: expected dtype bfloat16, float16 or float32, got float64",
    ),
    (EVERY, {"segment_ids": zeros(B, T)}, TypeError, "segment_ids: expected an integer dtype, got float32"),
    (
        EVERY,
        {"segment_ids": zeros(T, dtype=jnp.int32)},
        ValueError,
        "segment_ids: expected shape [2, 64], got [64]",
    ),
    (EVERY, {"scale": np.inf}, ValueError, "scale: expected a finite number, got inf"),
    (
        EVERY,
        {"scale": jnp.ones(())},
        TypeError,
        "scale: expected a Python number or None, got jaxlib._jax.ArrayImpl of float32[]",
    ),
    (EVERY, {"scale": "1"}, TypeError, "scale: expected a Python number or None, got '1' (str)"),
    (EVERY, {"implementation": "cuda"}, ValueError, "implementation: expected None, 'triton' or 'xla', got 'cuda'"),
    ((SLIDING, NATIVE), {"window_size": -1}, ValueError, "window_size: expected at least 0, got -1"),
    ((SLIDING, NATIVE), {"window_size": 8.0}, TypeError, "window_size: expected an int, got 8.0 (float)"),
    ((SLIDING, NATIVE), {"window_size": True}, TypeError, "window_size: expected an int, got True (bool)"),
    (WINDOWED, {"window": 40}, ValueError, "stride: expected a divisor of window = 40, got 16"),
    (WINDOWED, {"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
    (WINDOWED, {"window": 0}, ValueError, "window: expected at least 1, got 0"),
    ((SELECT,), {"window": 64}, ValueError, "window: expected at most block_size = 32, got 64"),
    ((SELECT,), {"stride": 24, "window": 24}, ValueError, "stride: expected a divisor of block_size = 32, got 24"),
    (BLOCKED, {"block_size": 48}, ValueError, "block_size: expected a power of two from 16 to 128, got 48"),
    (BLOCKED, {"block_size": 8}, ValueError, "block_size: expected a power of two from 16 to 128, got 8"),
    (BLOCKED, {"block_size": 32.0}, TypeError, "block_size: expected an int, got 32.0 (float)"),
    (BLOCKED, {"block_counts": -1}, ValueError, "block_counts: expected at least 0, got -1"),
    (BLOCKED, {"block_counts": zeros(B, T, H)}, TypeError, "block_counts: expected an integer dtype, got float32"),
    (
        BLOCKED,
        {"block_counts": zeros(B, T, dtype=jnp.int32)},
        ValueError,
        "block_counts: expected shape [2, 64, 4], got [2, 64]",
    ),
    (
        (SELECTED, NATIVE),
        {"block_indices": zeros(B, T, H, S)},
        TypeError,
        "block_indices: expected an integer dtype, got float32",
    ),
    (
        (SELECTED, NATIVE),
        {"block_indices": zeros(B, T, S, dtype=jnp.int32)},
        ValueError,
        "block_indices: expected shape [2, 64, 4, S], got [2, 64, 3]",
    ),
    ((SELECT,), {"lse": zeros(B, T, H)}, ValueError, "lse: expected shape [2, 64, 8], got [2, 64, 4]"),
    ((SELECT,), {"lse": zeros(B, T, N, dtype=jnp.bfloat16)}, TypeError, "lse: expected dtype float32, got bfloat16"),
    ((SELECT, NATIVE), {"num_init_blocks": -1}, ValueError, "num_init_blocks: expected at least 0, got -1"),
    ((SELECT, NATIVE), {"num_local_blocks": 0}, ValueError, "num_local_blocks: expected at least 1, got 0"),
    (
        (NATIVE,),
        {"sliding_gate": zeros(B, T, H)},
        ValueError,
        "sliding_gate: expected shape [2, 64, 8], got [2, 64, 4]",
    ),
    (
        (NATIVE,),
        {"compressed_gate": zeros(B, T, N, dtype=jnp.int32)},
        TypeError,
        "compressed_gate: expected dtype bfloat16, float16 or float32, got int32",
    ),
    (
        (NATIVE,),
        {"compression_window": 64},
        ValueError,
        "compression_window: expected at most block_size = 32, got 64",
    ),
    (
        (NATIVE,),
        {"compression_stride": 24},
        ValueError,
        "compression_stride: expected a divisor of compression_window = 32, got 24",
    ),
    (
        (NATIVE,),
        {"compressed_key": zeros(B, 2, H, K)},
        ValueError,
        "compressed_value: expected an array, as compressed_key is given, got None",
    ),
    (
        (NATIVE,),
        {"compressed_value": zeros(B, 2, H, V)},
        ValueError,
        "compressed_key: expected an array, as compressed_value is given, got None",
    ),
    (
        (NATIVE,),
        {"compressed_key": zeros(B, 3, H, K), "compressed_value": zeros(B, 2, H, V)},
        ValueError,
        "compressed_key: expected shape [2, 2, H, 16], got [2, 3, 4, 16]",
    ),
    ((SELECT, NATIVE), {"max_block_count": -1}, ValueError, "max_block_count: expected at least 0, got -1"),
]


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"),
    [
        pytest.param(op, changes, error, message, id=f"{op.__name__}-{i}")
        for i, (ops, changes, error, message) in enumerate(CASES)
        for op in ops
    ],
)
def test_message(op, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(op, **changes)


def test_no_gate():
    message = "compressed_gate, selected_gate, sliding_gate: expected at least one gate, got None for all three"
    with pytest.raises(ValueError, match=message):
        call(NATIVE, compressed_gate=None, selected_gate=None, sliding_gate=None)


def test_traced_scale():
    with pytest.raises(TypeError, match=r"scale: expected a Python number or None, got .*Tracer.* of float32\[\]"):
        jax.jit(lambda scale: call(SLIDING, scale=scale))(1.0)


def test_good_arguments_pass():
    query = ARRAYS["query"]
    assert checks.scale(None, query) == 0.25
    assert checks.scale(np.float32(0.5), query) == 0.5
    assert checks.windows(np.int64(32), 16, 64) == (32, 16)
    assert checks.block_counts(0, query, ARRAYS["key"]) == 0
    assert checks.segment_ids(None, B, T) is None
    assert checks.segment_ids(np.zeros((B, T), np.int64), B, T).dtype == jnp.int32


def test_implementation_follows_the_device(monkeypatch):
    monkeypatch.setattr(device, "triton_missing", lambda: None)
    for on_gpu, chosen in ((True, "triton"), (False, "xla")):
        monkeypatch.setattr(device, "on_nvidia_gpu", lambda on_gpu=on_gpu: on_gpu)
        assert checks.resolve_implementation(None) == chosen
        assert checks.resolve_implementation("triton") == "triton"
        assert checks.resolve_implementation("xla") == "xla"


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(device, "triton_missing", lambda: "jax_triton not installed; pip install it")
    monkeypatch.setattr(device, "on_nvidia_gpu", lambda: True)
    assert checks.resolve_implementation(None) == "xla"
    with pytest.raises(ImportError, match="implementation='triton': jax_triton not installed; pip install it"):
        call(SLIDING, implementation="triton")
