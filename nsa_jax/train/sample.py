"""Text from a trained model."""

import jax
import jax.numpy as jnp

from nsa_jax import linen
from nsa_jax.linen import NSATransformer
from nsa_jax.train.packing import BEGIN, END, PADDING

Array = jax.Array

#: Tokens that are no bytes, and so end a text.
STOP_TOKENS = (BEGIN, END, PADDING)


def generate(model: NSATransformer, params: dict, key: Array, *, num_bytes: int, temperature: float = 0.7) -> str:
    """A document's first bytes, sampled one by one, as text; shorter if the document ends.

    Args:
        model: the model.
        params: its parameters.
        key: a PRNG key.
        num_bytes: bytes to sample.
        temperature: divides the logits.
    """
    if num_bytes == 0:
        return ""
    prompt = jnp.full((1, 1), BEGIN, jnp.int32)
    options = {"num_tokens": num_bytes, "temperature": temperature, "stop_tokens": STOP_TOKENS}
    tokens, lengths = jax.device_get(linen.generate(model, params, prompt, key=key, **options))
    return to_bytes(tokens[0, : lengths[0]]).decode("utf-8", errors="replace")


def to_bytes(tokens) -> bytes:
    """The bytes of tokens, a NumPy array of integers [n], without a stop token at the end."""
    return tokens[(tokens >= 0) & (tokens < BEGIN)].astype("uint8").tobytes()
