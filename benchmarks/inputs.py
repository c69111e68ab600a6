"""The arrays of a case, from fixed seeds."""

import functools
from typing import NamedTuple

import jax
import selections
from plan import Case

import nsa_jax


class Inputs(NamedTuple):
    """query [B, T, N, D]; key, value [B, T, H, D]; gates: three of [B, T, N]; d_output like query."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    gates: tuple[jax.Array, jax.Array, jax.Array]
    d_output: jax.Array


@functools.lru_cache(maxsize=1)
def make(case: Case) -> Inputs:
    """The Inputs of a case; the last case's are kept."""
    keys = jax.random.split(jax.random.key(0), 5)

    def normal(key, heads):
        return jax.random.normal(key, (case.B, case.T, heads, case.D), case.dtype)

    if case.selection == "realistic":
        drift = selections.drift_for(case.overlap, case.T, case.block_size, case.S)
        query = selections.drifting_queries(keys[0], case, drift)
    else:
        query = normal(keys[0], case.N)
    gates = tuple(jax.random.uniform(k, (case.B, case.T, case.N), case.dtype) for k in jax.random.split(keys[4], 3))
    return Inputs(query, normal(keys[1], case.H), normal(keys[2], case.H), gates, normal(keys[3], case.N))


@functools.lru_cache(maxsize=1)
def blocks(case: Case) -> tuple[jax.Array, float]:
    """(int32 [B, T, H, S], measured overlap): the case's selection, found by jnp whatever is measured."""
    if case.selection == "random":
        chosen = selections.random_blocks(jax.random.key(1), case)
    else:
        chosen = jax.jit(_top_blocks, static_argnums=2)(*make(case)[:2], case)
    return chosen, float(selections.measured_overlap(chosen))


def _top_blocks(query: jax.Array, key: jax.Array, case: Case) -> jax.Array:
    window = {"window": case.window, "stride": case.stride, "implementation": "xla"}
    compressed = nsa_jax.compress(key, window=case.window, stride=case.stride)
    _, lse = nsa_jax.compressed_attention(query, compressed, compressed, return_residual=True, **window)
    return nsa_jax.select_blocks(query, compressed, lse, block_counts=case.S, block_size=case.block_size, **window)
