"""Text from a trained model."""

from functools import partial

import jax
import jax.numpy as jnp

from nsa_jax.linen import NSATransformer
from nsa_jax.train.packing import BEGIN

Array = jax.Array


def generate(model: NSATransformer, params: dict, key: Array, *, num_bytes: int, temperature: float = 0.7) -> str:
    """A document's first bytes, sampled one by one, as text; shorter if the document ends.

    Args:
        model: the model.
        params: its parameters.
        key: a PRNG key.
        num_bytes: bytes to sample.
        temperature: divides the logits.
    """
    tokens = jax.device_get(_generate(model, params, key, temperature, num_bytes=num_bytes))[1:]
    ends = (tokens >= BEGIN).argmax() if (tokens >= BEGIN).any() else len(tokens)
    return tokens[:ends].astype("uint8").tobytes().decode("utf-8", errors="replace")


@partial(jax.jit, static_argnames=("model", "num_bytes"))
def _generate(model, params, key, temperature, *, num_bytes: int) -> Array:
    """int32 [1 + num_bytes]: BEGIN and what follows it."""
    # whole blocks; what comes after a token has no part in predicting the next
    length = -(-(num_bytes + 1) // model.config.block_size) * model.config.block_size

    def step(place, tokens):
        logits = model.apply({"params": params}, tokens[None])[0, place]
        token = jax.random.categorical(jax.random.fold_in(key, place), logits / temperature)
        return tokens.at[place + 1].set(token.astype(jnp.int32))

    tokens = jnp.full((length,), BEGIN, jnp.int32)
    return jax.lax.fori_loop(0, num_bytes, step, tokens)[: num_bytes + 1]
