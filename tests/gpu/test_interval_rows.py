"""Kernels for an interval: what a query does not see reaches neither its row nor the keys that it does not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_bits, launch_alone, normal

from nsa_jax import tiling
from nsa_jax.runtime import launch

T, C, H = 150, 70, 2
BLIND = [*range(4), *range(60, 70), T - 1]  # queries that see nothing, between segments
NAN_QUERY, SEES_NAN = (30, 1), (90, 2)  # (query, head of the query)


def intervals():
    """key_begin, key_end [1, T], query_begin, query_end [1, C]: queries 4 .. 59 see keys below 30, the rest others."""
    t = np.arange(T)
    second = t >= 70
    end = np.where(second, 30 + (t - 70) // 2 + 1, (t - 4) // 2 + 1 + 2)
    begin = np.where(second, np.maximum(30, end - 20), np.maximum(0, end - 9))
    end = np.minimum(end, np.where(second, C, 30))
    begin[BLIND] = end[BLIND] = 0
    seen = (np.arange(C) >= begin[:, None]) & (np.arange(C) < end[:, None])  # [T, C]
    first, last = seen.argmax(0), T - seen[::-1].argmax(0)
    some = seen.any(0)
    assert all(seen[a:b, c].all() for c, (a, b) in enumerate(zip(first, last, strict=True)) if some[c])
    by_key = np.where(some, first, 0), np.where(some, last, 0)
    return [jnp.asarray(x, jnp.int32)[None] for x in (begin, end, *by_key)]


class Portable:
    """Launches of kernels/interval.py."""

    dtype = jnp.float32

    def __init__(self, group, width, described):
        from nsa_jax.kernels import interval

        self.kernels, self.group, self.width, self.described = interval, group, width, described

    def _sizes(self):
        width = self.width
        return {"T": T, "C": C, "H": H, "G": self.group, "K": width, "V": width, "SCALE": 0.3}

    def _tile_sizes(self):
        parts = tiling.parts(self.width)
        return self._sizes() | {"ROWS": 64, "KEYS": 16, "K_PARTS": parts, "V_PARTS": parts, "PRECISION": "ieee"}

    def _tiles(self, choose, kernel, side, *arrays):
        return choose(kernel, side, *arrays) if self.described else arrays

    def forward(self, query, key, value, begin, end, sight):
        kernel, shape = self.kernels.forward, self.kernels.QueryShape(**self._tile_sizes())
        keys = self._tiles(launch.key_tiles, kernel, 16, key, value)
        outputs = _like(query), jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)
        arrays = query, *keys, begin, end, sight
        return launch_alone(kernel, *arrays, outputs=outputs, programs=shape.TILES * H, SHAPE=shape)

    def backward_query(self, query, key, value, output, d_output, lse, weight, begin, end, before=None):
        kernel, shape = self.kernels.backward_query, self.kernels.QueryShape(**self._tile_sizes())
        keys = self._tiles(launch.key_tiles, kernel, 16, key, value)
        other = query if before is None else before
        arrays = query, *keys, output, d_output, lse, lse, weight, other, begin, end
        options = {"outputs": (_like(query), _like(lse)), "programs": shape.TILES * H, "SHAPE": shape}
        return launch_alone(kernel, *arrays, **options, HAS_D_LSE=False, HAS_BEFORE=before is not None)

    def backward_key_value(self, query, key, value, d_output, lse, delta, weight, query_begin, query_end):
        kernel = self.kernels.backward_key_value
        shape = self.kernels.KeyShape(**self._tile_sizes(), B=1, SPLITS=1, AHEAD=True)
        rows = kernel, 64, self.group, query, d_output
        query, d_output = launch.query_tiles(*rows) if self.described else (query, d_output)
        outputs = tuple(jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in (key, value))
        arrays = query, key, value, d_output, lse, delta, weight, query_begin, query_end
        return launch_alone(kernel, *arrays, outputs=outputs, programs=shape.TILES * H, SHAPE=shape)


class Hopper(Portable):
    """Launches of kernels/sm90/interval.py and interval_keys.py; the pass of dq is that of kernels/interval.py."""

    dtype = jnp.bfloat16

    def __init__(self, group, width):
        super().__init__(group, width, described=True)

    def forward(self, query, key, value, begin, end, sight):
        from nsa_jax.kernels.sm90 import interval as kernels

        from nsa_jax.gpu.sm90 import interval

        stages = interval.forward_stages(self.width, self.width)
        shape = kernels.IntervalShape(**self._sizes(), B=1, MULTIPROCESSORS=2, STAGES=stages, OTHERS=0, KEEP=True)
        arrays = launch.row_pieces(query, self.group), launch.key_pieces(key), launch.key_pieces(value)
        outputs = _like(query), jax.ShapeDtypeStruct(query.shape[:3], jnp.float32), _like(query)
        arrays = *arrays, begin, end, sight, *[begin] * 5
        return launch_alone(kernels.forward, *arrays, outputs=outputs, programs=shape.PROGRAMS, SHAPE=shape)[:2]

    def backward_key_value(self, query, key, value, d_output, lse, delta, weight, query_begin, query_end):
        from nsa_jax.kernels.sm90 import interval_keys as kernels

        from nsa_jax.gpu.sm90 import key_pass

        stages = key_pass.stages(self.width, self.width)
        shape = kernels.IntervalKeyShape(**self._sizes(), B=1, SPLITS=1, STAGES=stages)
        outputs = tuple(jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in (key, value))
        query, d_output = (launch.row_pieces(x, self.group) for x in (query, d_output))
        keys = launch.key_pieces(key), launch.key_pieces(value)
        arrays = query, *keys, d_output, lse, delta, weight, query_begin, query_end
        options = {"outputs": outputs, "programs": shape.TILES * H, "registers": key_pass.REGISTERS}
        return launch_alone(kernels.backward_key_value, *arrays, **options, SHAPE=shape)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@pytest.fixture(params=["pointers", "descriptors", *(pytest.param(g, marks=pytest.mark.gpu) for g in (1, 4, 16, 128))])
def kernels(request):
    if isinstance(request.param, int):
        request.getfixturevalue("hopper")
        return Hopper(request.param, 128 if request.param != 4 else 64)
    return Portable(3, 20, described=False) if request.param == "pointers" else Portable(4, 16, described=True)


def _arrays(kernels):
    """query, key, value, d_output [1, T|C, N|H, D]."""
    N, D = H * kernels.group, kernels.width
    shapes = (1, T, N, D), (1, C, H, D), (1, C, H, D), (1, T, N, D)
    return [normal(i, *shape, dtype=kernels.dtype) for i, shape in enumerate(shapes)]


def _rows(kernels, rows):
    """[1, T, N]: true for the heads (query, head) of `rows`, an int being all heads of a query."""
    which = np.zeros((1, T, H * kernels.group), bool)
    for row in rows:
        query, head = row if isinstance(row, tuple) else (row, slice(None))
        which[0, query, head if isinstance(head, slice) else head % which.shape[2]] = True
    return which


def _sight(kernels):
    sight = np.ones((1, T, H), np.int8)
    sight[:, BLIND] = 0
    query, head = SEES_NAN
    sight[:, query, head // kernels.group % H] = 2
    return jnp.asarray(sight), np.repeat(sight, kernels.group, axis=2) == 2


def _poisoned(x, rows):
    return jnp.where(rows[..., None] if x.ndim == 4 else rows, jnp.nan, x)


def test_forward(kernels):
    query, key, value, _ = _arrays(kernels)
    begin, end, *_ = intervals()
    blind, nan_query = _rows(kernels, BLIND), _rows(kernels, [NAN_QUERY])
    sight, sees_nan = _sight(kernels)
    clean = kernels.forward(query, key, value, begin, end, jnp.minimum(sight, 1))
    assert not any(np.isnan(x).any() for x in clean)
    output, lse = kernels.forward(_poisoned(query, blind | nan_query), key, value, begin, end, sight)
    np.testing.assert_array_equal(np.asarray(output, np.float32)[blind], 0.0)
    np.testing.assert_array_equal(np.asarray(lse)[blind], -np.inf)
    for x in (output, lse):
        assert np.isnan(np.asarray(x, np.float32)[nan_query | sees_nan]).all()
    others = ~(blind | nan_query | sees_nan)
    assert_same_bits([np.asarray(x)[others] for x in (output, lse)], [np.asarray(x)[others] for x in clean])


@pytest.mark.parametrize("before", [False, True])
def test_backward_query(kernels, before):
    query, key, value, d_output = _arrays(kernels)
    begin, end, *_ = intervals()
    blind, nan = _rows(kernels, BLIND), _rows(kernels, [NAN_QUERY, SEES_NAN])
    sight, _ = _sight(kernels)
    output, lse = kernels.forward(query, key, value, begin, end, jnp.minimum(sight, 1))
    weight = normal(7, *lse.shape)
    addend = normal(8, *query.shape, dtype=kernels.dtype) if before else None
    clean = kernels.backward_query(query, key, value, output, d_output, lse, weight, begin, end, addend)
    poisoned = [_poisoned(x, blind) for x in (query, d_output, weight)]
    d_query, delta = kernels.backward_query(
        poisoned[0], key, value, output, poisoned[1], _poisoned(lse, nan), poisoned[2], begin, end, addend
    )
    np.testing.assert_array_equal(np.asarray(d_query)[blind], np.asarray(addend)[blind] if before else 0.0)
    np.testing.assert_array_equal(np.asarray(delta)[blind], 0.0)
    assert np.isnan(np.asarray(d_query, np.float32)[nan]).all()
    others = ~(blind | nan)
    assert_same_bits([np.asarray(x)[others] for x in (d_query, delta)], [np.asarray(x)[others] for x in clean])


@pytest.mark.parametrize("rows", [[], [0], [NAN_QUERY], [*BLIND, NAN_QUERY, SEES_NAN], [*range(T)]], ids=len)
def test_backward_key_value(kernels, rows):
    query, key, value, d_output = _arrays(kernels)
    begin, end, *by_key = intervals()
    dead = _rows(kernels, rows)
    sight, _ = _sight(kernels)
    output, lse = kernels.forward(query, key, value, begin, end, jnp.minimum(sight, 1))
    weight = normal(7, *lse.shape)
    _, delta = kernels.backward_query(query, key, value, output, d_output, lse, weight, begin, end)
    lse = jnp.where(dead, jnp.nan, lse)  # -inf where nothing is seen
    delta, weight = (jnp.where(jnp.isfinite(lse), x, jnp.nan) for x in (delta, weight))
    clean_rows = [jnp.where(dead[..., None], 0.0, x).astype(x.dtype) for x in (query, d_output)]
    clean = kernels.backward_key_value(clean_rows[0], key, value, clean_rows[1], lse, delta, weight, *by_key)
    assert not any(np.isnan(x).any() for x in clean)
    assert any(np.any(x) for x in clean) == (len(rows) < T)
    query, d_output = (_poisoned(x, dead) for x in (query, d_output))
    poisoned = kernels.backward_key_value(query, key, value, d_output, lse, delta, weight, *by_key)
    assert_same_bits(poisoned, clean)
