"""All three branches: the Triton kernels against plain jnp, outputs and every gradient, gates included.

The last tests have the shapes of the original project's test of its parallel_nsa_with_compression.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    assert_close,
    assert_same_bits,
    assert_small_error_ratio,
    branch_gates,
    count_launches,
    normal,
    packing,
    qkv,
    row,
    spans,
    value_and_gradients,
)
from jax.sharding import PartitionSpec as P

import nsa_jax
from nsa_jax import native_sparse_attention
from nsa_jax.gpu import selected

GATES = ("compressed", "selected", "sliding")
DRAWN = "drawn"  # stands for random integers
SMALL = {"block_size": 16, "block_counts": 2, "window_size": 9, "compression_window": 8, "compression_stride": 4}
SMALL |= {"num_init_blocks": 0, "num_local_blocks": 1}  # from the third block on importance decides


def drawn(seed, B, T, N, H, K, V, branches=GATES, stride=None):
    """Arguments by name: query, key, value, the gates of the branches, and with a stride compressed keys and values."""
    arrays = dict(zip(("query", "key", "value"), qkv(seed, B, T, N, H, K, V), strict=True))
    gates = branch_gates(seed, B, T, N)
    arrays |= {f"{name}_gate": gates[f"{name}_gate"] for name in branches}
    if stride:
        arrays["compressed_key"] = normal(seed + 7, B, T // stride, H, K)
        arrays["compressed_value"] = normal(seed + 8, B, T // stride, H, V)
    return arrays


def attention(implementation, **options):
    return functools.partial(native_sparse_attention, implementation=implementation, **options)


def both(arrays, cotangent, **options):
    return (value_and_gradients(attention(name, **options), arrays, cotangent) for name in ("triton", "xla"))


# branches, T, N, H, K, V, packed, stride of compressed keys and values if given, options
CASES = {
    "one pass": (GATES, 33, 3, 1, 16, 8, True, None, {"block_size": 16, "block_counts": 2, "window_size": 16}),
    "l=32 d=16": (
        GATES, 100, 4, 1, 20, 12, False, None,
        SMALL | {"block_size": 32, "window_size": 40, "compression_window": 32, "compression_stride": 16},
    ),
    "row shorter than all": (GATES, 5, 2, 1, 16, 8, True, None, {"block_counts": 3}),
    "only selection needs compressed keys": (("selected", "sliding"), 60, 2, 1, 16, 8, False, 4, SMALL),
    "own compressed keys and values": (("compressed", "sliding"), 33, 2, 1, 16, 8, True, 4, SMALL),
    "counts": (("selected",), 60, 2, 1, 16, 8, False, None, SMALL | {"block_counts": DRAWN, "max_block_count": 2}),
    "indices": (("compressed", "selected"), 33, 2, 1, 16, 8, True, None, SMALL | {"block_indices": DRAWN}),
    "compressed": (("compressed",), 33, 2, 1, 16, 8, False, None, SMALL),
    "sliding": (("sliding",), 20, 2, 1, 16, 8, True, None, {}),
    "window of zero": (("selected", "sliding"), 20, 2, 1, 16, 8, False, None, SMALL | {"window_size": 0}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_reference(case):
    branches, T, N, H, K, V, packed, stride, options = case
    B = 2 if packed else 1
    rng = np.random.default_rng(T)
    shapes = {"block_counts": (B, T, H), "block_indices": (B, T, H, 3)}
    draws = {name: jnp.asarray(rng.integers(-1, 4, shape), jnp.int32) for name, shape in shapes.items()}
    options = {name: draws[name] if value is DRAWN else value for name, value in options.items()}
    arrays = drawn(T, B, T, N, H, K, V, branches, stride)
    actual, expected = both(arrays, normal(9, B, T, N, V), segment_ids=packing(T) if packed else None, **options)
    assert_close(actual, expected)
    if packed:
        for result in actual:
            np.testing.assert_array_equal(result[1], 0.0)  # a row of padding
    if stride and "compressed" not in branches:
        for gradient in actual[1:3]:  # of the compressed keys and values
            np.testing.assert_array_equal(gradient, 0.0)  # selection has none


def test_one_pass_equals_two(monkeypatch):
    T, window_size, asked = 46, 17, []  # of three blocks two are selected

    def never(*sizes):
        asked.append(sizes)
        return False

    arrays, cotangent = drawn(1, 1, T, 2, 1, 16, 8, ("selected", "sliding")), normal(9, 1, T, 2, 8)
    options = {"block_size": 16, "block_counts": 2, "segment_ids": packing(T)[:1], "window_size": window_size}
    assert selected.does_sliding(window_size, 16)
    one, expected = both(arrays, cotangent, **options)
    monkeypatch.setattr(selected, "does_sliding", never)
    two = value_and_gradients(attention("triton", **options), arrays, cotangent)
    assert (window_size, 16) in asked
    assert_close(one, expected)
    assert_close(two, expected)


def test_default_block_counts_window_and_scale():
    arrays = drawn(2, 1, 70, 1, 1, 16, 8)
    explicit = attention(
        "xla", block_size=64, block_counts=16, window_size=512, compression_window=64, compression_stride=64, scale=0.25
    )
    results = [
        jax.jit(lambda arrays, attend=attend: attend(**arrays))(arrays) for attend in (attention("xla"), explicit)
    ]
    assert_same_bits(results[:1], results[1:])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter, warns of maxima of NaN
def test_packed_equals_alone():
    T = 63
    segment_ids = row(T, (-1, 2), (0, 37), (1, 1), (-1, 3), (0, 17), (-1, 3))[None]
    arrays, cotangent = drawn(3, 1, T, 2, 1, 16, 8), normal(9, 1, T, 2, 8)
    padded = np.asarray(segment_ids < 0)

    def poisoned(x):
        return jnp.where(padded.reshape(1, T, *(1,) * (x.ndim - 2)), np.nan, x)

    packed = [
        value_and_gradients(
            attention(name, segment_ids=jnp.asarray(segment_ids), **SMALL),
            jax.tree.map(poisoned, arrays),
            poisoned(cotangent),
        )
        for name in ("triton", "xla")
    ]
    for start, stop in spans(segment_ids[0]):
        alone = jax.tree.map(lambda x: x[:, start:stop], arrays)  # noqa: B023 - used at once
        expected = value_and_gradients(attention("xla", **SMALL), alone, cotangent[:, start:stop])
        for results in packed:
            assert_close([x[:, start:stop] for x in results], expected)
    for x in itertools.chain(*packed):
        np.testing.assert_array_equal(np.asarray(x)[padded], 0.0)


def test_other_segments_keep_their_bits():
    T = 36
    segment_ids = row(T, (0, 9), (1, 18), (2, 9))
    inside = segment_ids == 1
    attend = attention("triton", segment_ids=jnp.asarray(segment_ids[None]), **SMALL)
    everything = jax.jit(lambda arrays, cotangent: value_and_gradients(attend, arrays, cotangent))
    arrays, cotangent = drawn(4, 1, T, 2, 1, 16, 8), normal(9, 1, T, 2, 8)
    changed = jax.tree.map(
        lambda x: jnp.where(inside.reshape(1, T, *(1,) * (x.ndim - 2)), 3 * x + 1, x), (arrays, cotangent)
    )
    before, again, after = (everything(*x) for x in ((arrays, cotangent), (arrays, cotangent), changed))
    assert_same_bits(again, before)
    assert_same_bits([x[:, ~inside] for x in after], [x[:, ~inside] for x in before])
    assert not np.array_equal(after[0], before[0])


def test_segment_ids_do_not_retrace():
    T, traces = 20, []
    arrays = drawn(5, 1, T, 2, 1, 16, 8)

    def attend(implementation, arrays, segment_ids):
        traces.append(implementation)
        return attention(implementation, segment_ids=segment_ids, **SMALL)(**arrays)

    triton, xla = (jax.jit(functools.partial(attend, name)) for name in ("triton", "xla"))
    index = jnp.arange(T, dtype=jnp.int32)[None]
    for segment_ids in (packing(T)[:1], 0 * index, index // 3):
        assert_close([triton(arrays, segment_ids)], [xla(arrays, segment_ids)])
    assert traces == ["triton", "xla"]


def test_vmap_equals_a_loop():
    T = 20
    one = drawn(6, 1, T, 2, 1, 16, 8), normal(9, 1, T, 2, 8), packing(T)[:1]
    two = drawn(7, 1, T, 2, 1, 16, 8), normal(8, 1, T, 2, 8), packing(T)[:1] * 0

    def everything(implementation, arrays, cotangent, segment_ids):
        return value_and_gradients(attention(implementation, segment_ids=segment_ids, **SMALL), arrays, cotangent)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), one, two)
    mapped = jax.vmap(functools.partial(everything, "triton"))(*stacked)
    for i, arguments in enumerate((one, two)):
        assert_close([x[i] for x in mapped], everything("xla", *arguments))


@pytest.mark.parametrize("N", [2, 16])
def test_remat_and_scan(N):
    T = 36  # three blocks, of which two are selected
    arrays = drawn(8, 1, T, N, 1, 16, 8)
    gates = jnp.stack([arrays["sliding_gate"], arrays["sliding_gate"] / 2])
    keep = jax.checkpoint_policies.save_only_these_names(*nsa_jax.CHECKPOINT_NAMES)

    def layers(implementation, wrap):
        attend = wrap(attention(implementation, segment_ids=packing(T)[:1], **SMALL))

        def layer(query, gate):
            return jnp.tile(attend(**arrays | {"query": query, "sliding_gate": gate}), (1, 1, 1, 2)), None

        return jax.value_and_grad(lambda query, gates: jnp.sum(jax.lax.scan(layer, query, gates)[0] ** 2), (0, 1))

    wraps = (lambda attend: attend, functools.partial(jax.checkpoint, policy=keep), jax.checkpoint)
    plain, kept, dropped = (count_launches(layers("triton", wrap), arrays["query"], gates) for wrap in wraps)
    # walks and cleaned keys are not kept: three launches make them anew
    assert plain + 3 == kept < dropped
    actual = jax.jit(layers("triton", wraps[1]))(arrays["query"], gates)
    expected = jax.jit(layers("xla", wraps[0]))(arrays["query"], gates)
    assert_close(jax.tree.leaves(actual), jax.tree.leaves(expected))


def test_shard_map_over_rows():
    T, B = 20, 2
    devices = min(B, len(jax.devices()))
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    segment_ids = packing(T)
    arrays = drawn(9, B, T, 2, 1, 16, 8)
    # the same keys and values for every row: their gradients are sums over the devices
    split = {name: name not in ("key", "value") for name in arrays}
    arrays = {name: x if split[name] else x[: B // devices] for name, x in arrays.items()}
    specs = {name: P("data") if on else P() for name, on in split.items()}

    def attend(arrays, segment_ids):
        return attention("triton", segment_ids=segment_ids, **SMALL)(**arrays)

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))

    def whole(**arrays):
        rows = {name: x if split[name] else jnp.tile(x, (devices, 1, 1, 1)) for name, x in arrays.items()}
        return attention("xla", segment_ids=segment_ids, **SMALL)(**rows)

    cotangent = normal(10, B, T, 2, 8)
    actual = value_and_gradients(lambda **arrays: sharded(arrays, segment_ids), arrays, cotangent)
    assert_close(actual, value_and_gradients(whole, arrays, cotangent))


def float32_reference(arrays, cotangent, *, block_size, block_counts, segment_ids=None, scale=None, **options):
    """Output and gradients in float32 for the blocks that the kernels select: scores that are close may swap."""

    @jax.jit
    def select(query, key, value):
        windows = {"window": block_size, "stride": block_size, "segment_ids": segment_ids}
        key, value = (nsa_jax.compress(x, **windows) for x in (key, value))
        common = {"scale": scale, "implementation": "triton", **windows}
        _, lse = nsa_jax.compressed_attention(query, key, value, return_residual=True, **common)
        counts = {"block_counts": block_counts, "max_block_count": 16}
        return nsa_jax.select_blocks(query, key, lse, block_size=block_size, **counts, **common)

    options = options | {"block_size": block_size, "segment_ids": segment_ids, "scale": scale}
    indices = select(*(arrays[name] for name in ("query", "key", "value")))
    return value_and_gradients(
        attention("xla", block_indices=indices, **options),
        jax.tree.map(lambda x: x.astype(jnp.float32), arrays),
        cotangent.astype(jnp.float32),
    )


def check_error_ratio(T, N, H, D, block_size, window_size, dtype, segment_ids=None):
    branches = GATES if window_size else GATES[:2]
    arrays = jax.tree.map(lambda x: x.astype(dtype), drawn(T, 1, T, N, H, D, D, branches))
    cotangent = normal(9, 1, T, N, D, dtype=dtype)
    counts = jnp.asarray(np.random.default_rng(T).integers(1, 17, (1, T, H)), jnp.int32)
    options = {"block_size": block_size, "block_counts": counts, "window_size": window_size, "scale": 0.1}
    options["segment_ids"] = segment_ids
    actual = value_and_gradients(attention("triton", max_block_count=16, **options), arrays, cotangent)
    assert all(x.dtype == dtype for x in actual)
    assert_small_error_ratio(actual, float32_reference(arrays, cotangent, **options), 0.005)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
    check_error_ratio(40, 2, 1, 16, 16, 16, dtype, jnp.asarray(row(40, (-1, 2), (0, 20), (1, 18))[None]))


@pytest.mark.gpu
@pytest.mark.parametrize("window_size", [0, 32])
@pytest.mark.parametrize("D", [100, 64])
@pytest.mark.parametrize("T", [256, 1024, 2000])
def test_parallel_of_full_size(T, D, window_size):
    check_error_ratio(T, 64, 4, D, 32, window_size, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("window_size", [32, 64])
@pytest.mark.parametrize("D", [100, 64])
@pytest.mark.parametrize("T", [250, 1000, 2048])
def test_parallel_varlen_of_full_size(T, D, window_size):
    segment_ids = row(T, (0, T // 3), (1, T // 5), (2, 17), (3, 1))[None]
    check_error_ratio(T, 64, 4, D, 32, window_size, jnp.bfloat16, jnp.asarray(segment_ids))


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_to_the_31_elements():
    B, T, N, H, D, last = 2, 66000, 64, 4, 256, 400
    assert B * T * N * D > 2**31
    keys = jax.random.split(jax.random.key(0), 7)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def random(key, shape, draw):
        return draw(key, shape, jnp.bfloat16)

    arrays = {
        name: random(key, (B, T, heads, D), jax.random.normal)
        for name, key, heads in zip(("query", "key", "value"), keys[:3], (N, H, H), strict=True)
    }
    arrays |= {
        f"{name}_gate": random(key, (B, T, N), jax.random.uniform) for name, key in zip(GATES, keys[3:6], strict=True)
    }
    cotangent = random(keys[6], (B, T, N, D), jax.random.normal)
    # the last segment of the last row has the highest addresses, and needs nothing before it
    segment_ids = jnp.asarray(np.where(np.arange(T) < T - last, 0, 1), jnp.int32)[None] * jnp.ones((B, 1), jnp.int32)
    options = {"block_size": 64, "window_size": 128}
    actual = value_and_gradients(attention("triton", segment_ids=segment_ids, **options), arrays, cotangent)
    end = jax.tree.map(lambda x: x[-1:, -last:], (arrays, cotangent))
    expected = float32_reference(*end, block_counts=16, **options)
    assert_small_error_ratio([x[-1:, -last:] for x in actual], expected, 0.005)


@pytest.mark.parametrize("packed", [False, True], ids=["one segment", "packed"])
@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_every_block_selected(implementation, packed):
    # that a number selects every block is known beforehand, that an array does is not: the same either way
    T, N, H = 90, 4, 2
    query, key, value, d_output = (normal(i, 1, T, heads, 16) for i, heads in enumerate((N, H, H, N)))
    gates = [jax.nn.sigmoid(normal(4 + i, 1, T, N)) for i in range(2)]
    segment_ids = jnp.repeat(jnp.asarray([3, -1, 4]), jnp.asarray([40, 3, 47]))[None] if packed else None

    def loss(block_counts, query, key, value, gates):
        output = nsa_jax.native_sparse_attention(
            query, key, value, compressed_gate=gates[0], selected_gate=gates[1], sliding_gate=0.5, window_size=20,
            block_counts=block_counts, block_size=16, segment_ids=segment_ids, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(output * d_output), output

    arrays = query, key, value, gates
    differentiate = jax.value_and_grad(loss, argnums=(1, 2, 3, 4), has_aux=True)
    actual = differentiate(6, *arrays)
    expected = differentiate(jnp.full((1, T, H), 6), *arrays)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)
