"""The cache under JAX's transformations: donated, in loops, mapped, sharded, saved."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cases import assert_small_error_ratio
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_decode import OPTIONS, RATIO, B, H, K, N, V, empty, in_chunks, inputs, whole

import nsa_jax

GATES = {"compressed_gate": 0.5, "selected_gate": 0.5, "sliding_gate": 0.5}


def step(cache, arrays):
    """(cache, output), as a scan wants it."""
    query, key, value = arrays
    cache = nsa_jax.extend_cache(cache, key, value)
    return cache, nsa_jax.cached_attention(query, cache, implementation="xla", **GATES, **OPTIONS)


def arrays_of(tokens, *leading):
    shapes = ((B, tokens, N, K), (B, tokens, H, K), (B, tokens, H, V))
    return tuple(jnp.ones((*leading, *shape), jnp.float32) for shape in shapes)


def loop(cache, arrays):
    """Three tokens, one after another, as long as no output is NaN."""
    query, key, value = arrays

    def body(carry):
        number, cache, _ = carry
        cache, output = step(cache, (query[number], key[number], value[number]))
        return number + 1, cache, output

    def goes_on(carry):
        return (carry[0] < 3) & ~jnp.isnan(carry[2]).any()

    _, cache, output = jax.lax.while_loop(goes_on, body, (0, cache, jnp.zeros((B, 1, N, V))))
    return cache, output


@pytest.mark.parametrize(
    ("function", "leading", "paged"),
    [(step, (), False), (functools.partial(jax.lax.scan, step), (3,), True), (loop, (3,), False)],
    ids=["step", "scan, pages", "while_loop"],
)
def test_a_donated_cache_is_changed_in_place(function, leading, paged):
    cache = empty(16, 16, paged, capacity=4096)
    compiled = jax.jit(function, donate_argnums=0).lower(cache, arrays_of(1, *leading)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(cache) if x.dtype == jnp.float32)
    # scores and copies of compressed keys, which are few, but none of the keys or values
    assert memory.temp_size_in_bytes < cache.value.nbytes


def test_scan_and_while_loop_decode():
    *arrays, gates = inputs(50)
    gates = {name: jnp.full_like(gate, 0.5) for name, gate in gates.items()}
    expected = whole(*arrays, gates, 16, 8)
    cache, _ = in_chunks(empty(16, 8), [47], *(x[:, :47] for x in arrays), {n: g[:, :47] for n, g in gates.items()})
    tokens = tuple(x[:, 47:].swapaxes(0, 1)[:, :, None] for x in arrays)
    scanned, outputs = jax.jit(functools.partial(jax.lax.scan, step))(cache, tokens)
    looped, last = jax.jit(loop)(cache, tokens)
    assert_small_error_ratio([outputs[:, :, 0].swapaxes(0, 1), last], [expected[:, 47:], expected[:, 49:]], RATIO)
    assert scanned.length.tolist() == looped.length.tolist() == [50] * B


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_vmap(paged):
    caches = [empty(16, 8, paged), empty(16, 8, paged)]
    caches[1] = jax.jit(nsa_jax.extend_cache)(caches[1], *arrays_of(20)[1:])
    query, key, value, _ = inputs(4 * B)
    arrays = tuple(x.reshape(2, B, -1, *x.shape[2:]) for x in (query, key, value))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    new, outputs = jax.jit(jax.vmap(step))(stacked, arrays)
    alone = [jax.jit(step)(cache, tuple(x[i] for x in arrays)) for i, cache in enumerate(caches)]
    assert new.length.tolist() == [[4] * B, [24] * B]
    assert_small_error_ratio([outputs], [jnp.stack([output for _, output in alone])], RATIO)


@pytest.mark.parametrize(
    ("rows", "heads", "kind", "tokens"),
    [
        ("x", None, AxisType.Auto, 1),
        ("x", None, AxisType.Explicit, 40),
        (None, "x", AxisType.Auto, 40),
        (None, "x", AxisType.Explicit, 1),
    ],
)
def test_sharded(rows, heads, kind, tokens):
    """No device gathers what belongs to the cache."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    cache, arrays = empty(16, 8, capacity=256), arrays_of(tokens)
    arrays = tuple(jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(arrays))
    expected = jax.jit(step)(cache, arrays)[1]

    def put(x):
        return jax.device_put(x, NamedSharding(mesh, P(rows, None, heads) if x.ndim == 4 else P(rows)))

    with jax.set_mesh(mesh):
        sharded = jax.tree.map(put, (cache, arrays))
        compiled = jax.jit(step, donate_argnums=0).lower(*sharded).compile()
        new, output = compiled(*sharded)
    for x in (new.key, new.compressed_value, output):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, P(rows, None, heads)), x.ndim)
    assert_small_error_ratio([jax.device_get(output)], [expected], RATIO)
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", compiled.as_text())
    sizes = [np.prod([int(size) for size in shape.split(",") if size], dtype=int) for shape in gathered]
    blocks = B * H * tokens * (256 // 16)  # XLA sorts a block's scores on all devices
    assert all(size <= blocks for size in sizes)


def test_orbax_saves_and_restores(tmp_path):
    cache, _ = jax.jit(step)(jax.tree.map(jnp.zeros_like, empty(16, 8, paged=True)), arrays_of(3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", cache)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "cache", jax.tree.map(ocp.utils.to_shape_dtype_struct, cache))
    assert isinstance(restored, nsa_jax.KVCache)
    jax.tree.map(np.testing.assert_array_equal, restored, cache)
