"""Cleaned keys and values, and who sees those that were not finite."""

import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.gpu import cleaning
from nsa_jax.rows.intervals import Intervals

B, H = 2, 3


# queries, keys, share of keys that are not finite
@pytest.mark.parametrize("case", [(5, 1, 1.0), (129, 1025, 0.0), (130, 70, 0.3), (300, 2500, 0.001)], ids=str)
def test_who_sees_what_is_not_finite(case):
    queries, keys, share = case
    rng = np.random.default_rng(0)
    unclean = (rng.random((B, H, keys)) < share).astype(np.int8)
    begin = rng.integers(0, keys, (B, queries)).astype(np.int32)
    end = np.minimum(keys, begin + rng.integers(0, keys + 1, (B, queries))).astype(np.int32)
    end[rng.random((B, queries)) < 0.2] = 0
    no_matter = jnp.zeros((B, keys), jnp.int32)
    intervals = Intervals(jnp.asarray(begin), jnp.asarray(end), no_matter, no_matter)
    sight = np.asarray(cleaning.of_intervals(jnp.asarray(unclean), intervals))
    for b, t in np.ndindex(B, queries):
        seen = unclean[b, :, begin[b, t] : end[b, t]]
        assert sight[b, t].tolist() == (1 + seen.max(axis=1) if seen.size else np.zeros(H)).tolist()


@pytest.mark.parametrize("with_key", [False, True])
def test_rows_that_are_not_finite_are_cleared(with_key):
    rng = np.random.default_rng(0)
    key, value = (rng.normal(size=(B, 37, H, width)).astype(np.float32) for width in (20, 36))
    key[0, 3, 1, 7], key[1, 36, 2, 19], value[1, 36, 2, 0], value[1, 0, 0, 35] = np.nan, -np.inf, np.nan, np.inf
    bad = ~(np.isfinite(key).all(axis=-1) & np.isfinite(value).all(axis=-1))
    cleaned = cleaning.clean(jnp.asarray(key), jnp.asarray(value), with_key)
    np.testing.assert_array_equal(np.asarray(cleaned.unclean), np.moveaxis(bad, 1, 2))
    assert bad.sum() == 3
    for actual, given in zip(cleaned[:2], (key, value), strict=True):
        expected = given if given is key and not with_key else np.where(bad[..., None], 0, given)
        np.testing.assert_array_equal(np.asarray(actual), expected)
