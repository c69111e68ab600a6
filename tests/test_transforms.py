"""The ops under jit, vmap, remat, scan and shard_map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, assert_same_bits, count_launches, packing, qkv, run
from jax.sharding import PartitionSpec as P

import nsa_jax

B, T, N, H, K, V = 2, 40, 2, 1, 16, 8
SEGMENT_IDS = packing(T)

# name -> (op of (query, key, value, segment_ids), keys in a row); the op returns (output, lse)
OPS = {
    "sliding": (functools.partial(nsa_jax.sliding_window_attention, window_size=9), T),
    "compressed": (functools.partial(nsa_jax.compressed_attention, window=4, stride=2), T // 2),
}


@pytest.fixture(params=OPS)
def op(request):
    """(attention of (query, key, value, segment_ids) in Triton, its arrays)."""
    function, C = OPS[request.param]

    def attention(query, key, value, segment_ids):
        return function(query, key, value, segment_ids=segment_ids, implementation="triton", return_residual=True)

    return attention, (*qkv(0, B, T, N, H, K, V, C=C), SEGMENT_IDS)


def gradients(attention, arrays, segment_ids):
    return run(lambda *arrays: attention(*arrays, segment_ids), arrays)


def test_jit_equals_eager(op):
    attention, arrays = op
    assert_same_bits(jax.jit(attention)(*arrays), attention(*arrays))


def test_segment_ids_do_not_retrace(op):
    attention, arrays = op
    traces = []

    @jax.jit
    def counted(*arrays):
        traces.append(None)
        return attention(*arrays)

    first = counted(*arrays)
    second = counted(*arrays[:3], jnp.zeros_like(SEGMENT_IDS))
    assert len(traces) == 1
    assert not np.array_equal(first[0], second[0])


@pytest.mark.parametrize("in_axes", [(0, 0, 0, 0), (0, None, None, None), (None, 1, None, 0)], ids=str)
def test_vmap_equals_a_loop(op, in_axes):
    attention, arrays = op

    def stack(x, axis):
        varied = jnp.roll(x, 1, axis=0) if jnp.issubdtype(x.dtype, jnp.integer) else 2 * x - 1
        return x if axis is None else jnp.stack([x, varied], axis=axis)

    stacked = [stack(x, axis) for x, axis in zip(arrays, in_axes, strict=True)]

    def everything(*arrays):
        return gradients(attention, arrays[:3], arrays[3])

    mapped = jax.vmap(everything, in_axes)(*stacked)
    for i in range(2):
        single = [x if axis is None else jnp.take(x, i, axis) for x, axis in zip(stacked, in_axes, strict=True)]
        assert_close([x[i] for x in mapped], everything(*single))


def test_nested_vmap(op):
    attention, arrays = op
    query = jnp.stack([arrays[0], -arrays[0]])
    key = jnp.stack([arrays[1], 2 * arrays[1]])
    over_keys = jax.vmap(attention, (None, 0, None, None))
    output, lse = jax.vmap(over_keys, (0, None, None, None))(query, key, *arrays[2:])
    for i, j in np.ndindex(2, 2):
        assert_close([output[i, j], lse[i, j]], attention(query[i], key[j], *arrays[2:]))


def test_remat_keeps_named_residuals(op):
    attention, arrays = op
    query, key, value, segment_ids = arrays

    def loss(wrap):
        def of(query, key, value):
            output, lse = wrap(lambda *x: attention(*x, segment_ids))(query * 2, key, value)
            return jnp.sum(output**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

        return jax.value_and_grad(of, (0, 1, 2))

    keep = functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*nsa_jax.CHECKPOINT_NAMES)
    )
    plain, kept, dropped = (loss(wrap) for wrap in (lambda f: f, keep, jax.checkpoint))
    counts = [count_launches(function, query, key, value) for function in (plain, kept, dropped)]
    # clean, see, forward, dq, dk and dv; clean anew for the backward pass; without the policy all of forward anew
    assert counts == [5, 6, 8]
    assert_close(jax.tree.leaves(kept(query, key, value)), jax.tree.leaves(plain(query, key, value)))


def test_scan(op):
    attention, (query, key, value, segment_ids) = op
    scales = jnp.array([1.0, 0.5], jnp.float32)

    def total(query, key, value, over):
        def step(carry, scale):
            return carry + jnp.sum(attention(query * scale, key, value, segment_ids)[0] ** 2), None

        return over(step)

    def scanned(step):
        return jax.lax.scan(step, jnp.zeros((), jnp.float32), scales)[0]

    def unrolled(step):
        carry = jnp.zeros((), jnp.float32)
        for scale in scales:
            carry, _ = step(carry, scale)
        return carry

    results = [
        jax.jit(jax.value_and_grad(functools.partial(total, over=over), (0, 1, 2)))(query, key, value)
        for over in (scanned, unrolled)
    ]
    assert_close(*(jax.tree.leaves(result) for result in results))


# which of query, key, value, segment_ids are split along B; the others are replicated
SHARDED = {
    "all": (True, True, True, True),
    "query": (True, False, False, True),
    "key": (False, True, False, True),
    "segment ids": (False, False, False, True),
}


@pytest.mark.parametrize("split", SHARDED.values(), ids=SHARDED)
def test_shard_map_over_rows(op, split):
    attention, arrays = op
    devices = min(B, len(jax.devices()))
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    # a replicated array holds one shard's rows
    arrays = [x if on else x[: B // devices] for x, on in zip(arrays, split, strict=True)]

    def rows(*arrays):
        return [x if on else jnp.tile(x, (devices, *(1,) * (x.ndim - 1))) for x, on in zip(arrays, split, strict=True)]

    sharded = jax.shard_map(
        attention, mesh=mesh, in_specs=tuple(P("data") if on else P() for on in split), out_specs=P("data")
    )
    actual = gradients(sharded, arrays[:3], arrays[3])
    expected = gradients(lambda *arrays: attention(*rows(*arrays)), arrays[:3], arrays[3])
    assert_close(actual, expected)
