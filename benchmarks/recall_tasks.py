"""Tasks that ask for what stands far back in a row, drawn on the device.

A row holds several segments of one length, so that one compiled step serves a curriculum over lengths. Letters: L
tokens of a segment, Q questions in it, A tokens of an answer.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

FILLERS = 256  # bytes of text
NOTE, ASK = FILLERS, FILLERS + 1
KEYS = FILLERS + 2
_SLOT = 4  # tokens of text that a needle stands in
_ENTRY = 8  # tokens of an entry of the phone book
_DIGITS = 10


class Symbols(NamedTuple):
    """How many keys and how many values there are; they follow the fillers."""

    keys: int
    values: int

    @property
    def vocab_size(self) -> int:
        return KEYS + self.keys + self.values

    @property
    def first_value(self) -> int:
        return KEYS + self.keys


class Segment(NamedTuple):
    """tokens int32 [L]; int32 [Q, A]: where answers are predicted, what they are, and where in the segment they are."""

    tokens: Array
    positions: Array
    targets: Array
    sources: Array


class Batch(NamedTuple):
    """Rows [B, T]; `answers` is the token to predict, -1 where none is. The others [B, segments, Q, A], `positions` in
    the row and `sources` in the segment."""

    tokens: Array
    segment_ids: Array
    answers: Array
    positions: Array
    targets: Array
    sources: Array


def associative_recall(key: Array, symbols: Symbols, length: int, count: int, depth: Array) -> Segment:
    """Multi-query associative recall: `count` keys, each followed by its value, side by side within the first 3/8 of
    the segment, and each key again in the second half, where its value is asked. All else is noise.

    Source: Arora et al. 2023, arXiv 2312.04927, section 3.
    """
    draws = jax.random.split(key, 5)
    names = KEYS + jax.random.permutation(draws[0], symbols.keys)[:count]
    values = symbols.first_value + jax.random.randint(draws[1], (count,), 0, symbols.values)
    begin = jax.random.randint(draws[2], (), 0, 3 * length // 8 - 2 * count + 1)
    sources = begin + 2 * jnp.arange(count) + 1
    positions = length // 2 + jax.random.permutation(draws[3], length // 2)[:count]
    tokens = jax.random.randint(draws[4], (length,), 0, FILLERS)
    tokens = tokens.at[sources - 1].set(names).at[sources].set(values).at[positions].set(names)
    return Segment(tokens, positions[:, None], values[:, None], sources[:, None])


def needle(key: Array, symbols: Symbols, length: int, count: int, depth: Array, *, text: Array) -> Segment:
    """`count` lines (note, key, value) hidden in `text`, all asked at the end; the first stands at `depth`.

    Args:
        depth: from 0, the segment's begin, to 1, its end; anywhere if negative.
        text: uint8 [n], n >= length.
    """
    draws = jax.random.split(key, 4)
    names = KEYS + jax.random.permutation(draws[0], symbols.keys)[:count]
    values = symbols.first_value + jax.random.randint(draws[1], (count,), 0, symbols.values)
    begin = jax.random.randint(draws[2], (), 0, text.size - length + 1)
    tokens = jax.lax.dynamic_slice(text, (begin,), (length,)).astype(jnp.int32)
    tail = length - 2 * count
    drawn = jax.random.permutation(draws[3], tail // _SLOT)[: count + 1]
    slots = drawn[:count]
    first = jnp.where(depth < 0, slots[0], jnp.round(depth * (tail // _SLOT - 1)).astype(slots.dtype))
    slots = jnp.where(slots == first, drawn[count], slots).at[0].set(first)
    sources = _SLOT * slots + 2
    positions = tail + 2 * jnp.arange(count) + 1
    tokens = tokens.at[sources - 2].set(NOTE).at[sources - 1].set(names).at[sources].set(values)
    tokens = tokens.at[positions - 1].set(ASK).at[positions].set(names)
    return Segment(tokens, positions[:, None], values[:, None], sources[:, None])


def phone_book(key: Array, symbols: Symbols, length: int, count: int, depth: Array) -> Segment:
    """A book of entries (note, first name, last name, four digits, end of line) as long as the segment; `count` of its
    numbers are asked at the end.

    Source: Jelassi et al. 2024, arXiv 2402.01032, section 4.
    """
    entries, names = length // _ENTRY - count, symbols.keys // 2
    draws = jax.random.split(key, 3)
    pairs = jax.random.permutation(draws[0], names * names)[:entries]  # no two alike
    digits = symbols.first_value + jax.random.randint(draws[1], (entries, 4), 0, _DIGITS)
    asked = jax.random.permutation(draws[2], entries)[:count]
    first, last = KEYS + pairs // names, KEYS + names + pairs % names

    def lines(mark: int, of: Array) -> Array:
        columns = (jnp.full_like(of, mark), first[of], last[of], *digits[of].T, jnp.full_like(of, ord("\n")))
        return jnp.stack(columns, axis=1)

    tokens = jnp.concatenate([lines(NOTE, jnp.arange(entries)), lines(ASK, asked)])
    positions = _ENTRY * (entries + jnp.arange(count))[:, None] + jnp.arange(2, 6)[None]
    tokens = jnp.pad(tokens.reshape(-1), (0, length % _ENTRY))
    return Segment(tokens, positions, digits[asked], _ENTRY * asked[:, None] + jnp.arange(3, 7)[None])


TASKS: dict[str, Callable] = {"mqar": associative_recall, "needle": needle, "phone-book": phone_book}


@functools.partial(jax.jit, static_argnums=0, static_argnames=("symbols", "rows", "row_length", "length", "count"))
def make_batch(
    task: str,
    key: Array,
    text: Array | None = None,
    *,
    symbols: Symbols,
    rows: int,
    row_length: int,
    length: int,
    count: int,
    depth: Array,
) -> Batch:
    """A Batch of a task, a function of the key; text, depth: see `needle`."""
    segments = row_length // length
    make = TASKS[task] if text is None else functools.partial(TASKS[task], text=text)
    keys = jax.random.split(key, rows * segments)
    drawn = jax.vmap(lambda key: make(key, symbols, length, count, depth))(keys)
    answers = jnp.full((rows * segments, length), -1, jnp.int32)
    answers = jax.vmap(lambda row, place, target: row.at[place].set(target))(answers, drawn.positions, drawn.targets)
    begin = length * jnp.arange(segments, dtype=jnp.int32)
    shape = (rows, segments, *drawn.positions.shape[1:])
    positions, targets, sources = (x.reshape(shape).astype(jnp.int32) for x in drawn[1:])
    return Batch(
        drawn.tokens.reshape(rows, row_length).astype(jnp.int32),
        jnp.broadcast_to(jnp.repeat(jnp.arange(segments, dtype=jnp.int32), length), (rows, row_length)),
        answers.reshape(rows, row_length),
        positions + begin[None, :, None, None],
        targets,
        sources,
    )
