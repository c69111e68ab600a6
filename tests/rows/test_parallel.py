"""Shares of rows: who holds which tokens, and the way between shares and rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax.rows.parallel import Shares


@pytest.mark.parametrize(("length", "shares"), [(2, 1), (24, 3), (64, 8)])
def test_zigzag_shares_are_a_piece_from_either_end(length, shares):
    order = nsa_jax.zigzag_indices(length, shares)
    assert order.dtype == np.int32
    pieces = [list(range(length))[i * length // (2 * shares) :][: length // (2 * shares)] for i in range(2 * shares)]
    expected = [token for i in range(shares) for token in pieces[i] + pieces[2 * shares - 1 - i]]
    assert order.tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((20, 8), ValueError, "length: expected a multiple of 16 tokens, two pieces for each share, got 20"),
        ((0, 8), ValueError, "length: expected at least 1, got 0"),
        ((16, 0), ValueError, "shares: expected at least 1, got 0"),
        ((16.0, 2), TypeError, r"length: expected an int, got 16.0 \(float\)"),
    ],
)
def test_bad_zigzag_indices(arguments, error, message):
    with pytest.raises(error, match=message):
        nsa_jax.zigzag_indices(*arguments)


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "any"])
@pytest.mark.parametrize("count", [1, 3])
def test_shares_make_up_rows(order, count):
    batch, length, rng = 2, 24, np.random.default_rng(0)
    if order == "any":
        places = np.stack([rng.permutation(length) for _ in range(batch)])
    else:
        whole = np.arange(length) if order == "contiguous" else nsa_jax.zigzag_indices(length, count)
        places = np.tile(whole, (batch, 1))
    places = places.reshape(batch, count, -1).swapaxes(0, 1)  # [n, B, t]
    shares = Shares(count, length, order) if order != "any" else Shares.of(jnp.asarray(places, jnp.int32))
    for device in range(count):
        np.testing.assert_array_equal(shares.standing(jnp.int32(device), batch), places[device])
    row = rng.standard_normal((batch, length, 3)).astype(np.float32)
    parts = np.stack([[row[b, places[i, b]] for b in range(batch)] for i in range(count)])
    np.testing.assert_array_equal(shares.from_row(jnp.asarray(row)), parts)
    np.testing.assert_array_equal(shares.to_row(jnp.asarray(parts)), row)


def test_a_place_without_a_token_is_filled():
    shares = Shares.of(jnp.asarray([[[3, -1]], [[0, 4]]], jnp.int32))  # nobody stands at 1 and 2
    row = shares.to_row(jnp.asarray([[[1.0, 2.0]], [[3.0, 4.0]]]), jnp.nan)
    np.testing.assert_array_equal(row, [[3.0, np.nan, np.nan, 1.0]])
    np.testing.assert_array_equal(shares.from_row(jax.lax.iota(jnp.int32, 4)[None] + 1), [[[4, 0]], [[1, 0]]])
