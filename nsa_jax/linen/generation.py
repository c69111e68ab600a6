"""Generation: tokens that a language model gives after a prompt."""

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nsa_jax import checks
from nsa_jax.linen.transformer import NSATransformer

Array = jax.Array


class Generated(NamedTuple):
    """What a model gives after a prompt.

    Attributes:
        tokens: int32 [B, num_tokens], 0 behind the end.
        lengths: int32 [B], how many there are, a stop token that ends them included.
    """

    tokens: Array
    lengths: Array


class Sampling(NamedTuple):
    """How a token is drawn from logits.

    Attributes:
        temperature: float32 [], divides the logits; 0 takes the most probable token.
        top_p: float32 [], or None: tokens are drawn from the fewest that together have this probability.
        key: a PRNG key, to which the number of the token is folded in.
    """

    temperature: Array
    top_p: Array | None
    key: Array


class Progress(NamedTuple):
    """Where a generation stands.

    Attributes:
        cache: the model's, which has seen all tokens but the last.
        token: int32 [B], the last.
        number: int32 [], tokens generated so far.
        is_done: bool [B], rows that a stop token has ended.
    """

    cache: Any
    token: Array
    number: Array
    is_done: Array


def generate(
    model: NSATransformer,
    params: dict,
    prompt: Array,
    *,
    num_tokens: int,
    lengths: Array | None = None,
    key: Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    chunk_size: int = 2048,
) -> Generated:
    """Tokens that follow a prompt, each drawn by the model that has seen those before.

    The prompt goes into the model's cache in chunks, then one token a step. Compiled once for each shape, model,
    num_tokens, top_k, stop_tokens and chunk_size; key, temperature and top_p may change.

    Args:
        model: an `NSATransformer`.
        params: its parameters.
        prompt: integers [B, P], P >= 1.
        num_tokens: tokens to generate.
        lengths: integers [B] from 1 to P, the tokens of each row's prompt; P unless given.
        key: a PRNG key; needed unless temperature is 0.
        temperature: divides the logits; 0 takes the most probable token, of equal ones the first.
        top_k: draws from so many of the most probable tokens; from all unless given.
        top_p: draws from the fewest most probable tokens that together have this probability, from above 0 to 1.
        stop_tokens: tokens that end a row.
        chunk_size: tokens of a chunk of the prompt.

    Returns:
        The tokens; rows stop early at a stop token, and the loop when all have.

    Raises:
        ValueError, TypeError: an argument is out of range or of a wrong shape or type.
    """
    model = decoding(model)
    prompt, lengths = _checked_prompt(prompt, lengths)
    num_tokens = checks.integer("num_tokens", num_tokens, 1, checks.MOST_INT)
    chunk_size = checks.integer("chunk_size", chunk_size, 1, checks.MOST_INT)
    top_k = None if top_k is None else checks.integer("top_k", top_k, 1)
    stop_tokens = tuple(checks.integer("stop_tokens", token, 0, checks.MOST_INT) for token in stop_tokens)
    return _generate(
        model,
        params,
        prompt,
        lengths,
        sampling(key, temperature, top_p),
        num_tokens=num_tokens,
        top_k=top_k,
        stop_tokens=stop_tokens,
        chunk_size=chunk_size,
    )


@functools.partial(jax.jit, static_argnames=("model", "num_tokens", "top_k", "stop_tokens", "chunk_size"))
def _generate(model, params, prompt, lengths, how, *, num_tokens, top_k, stop_tokens, chunk_size) -> Generated:
    capacity = prompt.shape[1] + num_tokens - 1
    progress = prefill(model, params, prompt, lengths, capacity=capacity, chunk_size=chunk_size)
    return advance(model, params, progress, how, num_tokens=num_tokens, top_k=top_k, stop_tokens=stop_tokens)[0]


def decoding(model: NSATransformer) -> NSATransformer:
    """The model with its cache."""
    if not isinstance(model, NSATransformer):
        raise TypeError(f"model: expected an NSATransformer, got {type(model).__name__}")
    return model.clone(decode=True)


def sampling(key: Array | None, temperature: float, top_p: float | None) -> Sampling:
    """Checked arguments of `generate`."""
    temperature = _number("temperature", temperature)
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature}")
    if key is None:
        if temperature > 0:
            raise ValueError("key: expected a PRNG key, as temperature is not 0, got None")
        key = jax.random.key(0)
    if top_p is not None:
        top_p = _number("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a probability above 0 and up to 1, got {top_p}")
        top_p = jnp.float32(top_p)
    return Sampling(jnp.float32(temperature), top_p, key)


def prefill(
    model: NSATransformer, params: dict, prompt: Array, lengths: Array, *, capacity: int, chunk_size: int
) -> Progress:
    """A model that has seen all but the last token of prompts [B, P] of lengths int32 [B].

    capacity: the tokens that a row's cache has room for.
    """
    batch, length = prompt.shape
    cache = model.init_cache(batch, capacity)
    last = jnp.take_along_axis(prompt, lengths[:, None] - 1, axis=1)[:, 0]
    if length > 1:
        size = min(chunk_size, length - 1)
        chunks = -(-(length - 1) // size)
        parts = jnp.pad(prompt[:, :-1], ((0, 0), (0, chunks * size - (length - 1))))
        parts = parts.reshape(batch, chunks, size).swapaxes(0, 1)
        firsts = size * jnp.arange(chunks, dtype=jnp.int32)

        def chunk(cache, part):
            tokens, first = part
            return _see(model, params, cache, tokens, jnp.clip(lengths - 1 - first, 0, size))[1], None

        cache, _ = jax.lax.scan(chunk, cache, (parts, firsts))
    return Progress(cache, last, jnp.zeros((), jnp.int32), jnp.zeros(batch, bool))


def advance(
    model: NSATransformer,
    params: dict,
    progress: Progress,
    how: Sampling,
    *,
    num_tokens: int,
    top_k: int | None,
    stop_tokens: tuple[int, ...],
) -> tuple[Generated, Progress]:
    """The next tokens, and where the generation stands then."""
    batch = progress.token.shape[0]

    def goes_on(carry):
        step, progress, _, _ = carry
        return (step < num_tokens) & ~progress.is_done.all() if stop_tokens else step < num_tokens

    def body(carry):
        step, progress, tokens, lengths = carry
        goes = ~progress.is_done
        logits, cache = _see(model, params, progress.cache, progress.token[:, None], goes.astype(jnp.int32))
        key = jax.random.fold_in(how.key, progress.number)
        token = jnp.where(goes, draw(logits[:, 0], how, key, top_k=top_k), 0)
        stops = jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32))
        progress = Progress(cache, token, progress.number + 1, progress.is_done | stops)
        return step + 1, progress, tokens.at[:, step].set(token), lengths + goes.astype(jnp.int32)

    tokens, lengths = jnp.zeros((batch, num_tokens), jnp.int32), jnp.zeros(batch, jnp.int32)
    carry = jnp.zeros((), jnp.int32), progress, tokens, lengths
    _, progress, tokens, lengths = jax.lax.while_loop(goes_on, body, carry)
    return Generated(tokens, lengths), progress


def _see(model, params, cache, tokens, lengths) -> tuple[Array, Any]:
    """Logits behind the first lengths, int32 [B], of tokens [B, T], and the cache that has seen them."""
    variables = {"params": params, "cache": cache}
    logits, kept = model.apply(variables, tokens, lengths=lengths, mutable=["cache"])
    return logits, kept["cache"]


def draw(logits: Array, how: Sampling, key: Array, *, top_k: int | None) -> Array:
    """int32 [B], a token by logits [B, vocab_size]; -1 where they are not finite, as without room in the cache."""
    greedy = jnp.argmax(logits, axis=-1)
    scaled = logits / jnp.where(how.temperature > 0, how.temperature, 1.0)
    if top_k is not None and top_k < logits.shape[1]:
        least = jax.lax.top_k(scaled, top_k)[0][:, -1:]
        scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
    if how.top_p is not None:
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.min(ordered, axis=-1, keepdims=True, where=before < how.top_p, initial=jnp.inf)
        scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
    token = jnp.where(how.temperature > 0, jax.random.categorical(key, scaled, axis=-1), greedy)
    return jnp.where(jnp.isnan(logits).any(axis=-1), -1, token).astype(jnp.int32)


def _checked_prompt(prompt: Array, lengths: Array | None) -> tuple[Array, Array]:
    batch, length = checks.token_ids("prompt", prompt)
    if length < 1:
        raise ValueError(f"prompt: expected at least one token, got {list(prompt.shape)}")
    if lengths is None:
        return jnp.asarray(prompt, jnp.int32), jnp.full(batch, length, jnp.int32)
    lengths = checks.row_lengths("lengths", lengths, batch)
    if not isinstance(lengths, jax.core.Tracer) and not ((lengths >= 1) & (lengths <= length)).all():
        raise ValueError(
            f"lengths: expected 1 to the {length} tokens of prompt, got {lengths.min()} to {lengths.max()}"
        )
    return jnp.asarray(prompt, jnp.int32), lengths


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a Python number, got {type(value).__name__}")
    return float(value)
