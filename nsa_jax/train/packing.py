"""Documents to rows of fixed length with segment ids, and rows to batches.

Plain numpy: the rows fit in memory, and a batch that is a function of (seed, step) leaves no iterator state to save.
"""

import bisect
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BEGIN, END, PADDING = 256, 257, 258
VOCAB_SIZE = 259


class Rows(NamedTuple):
    """Packed rows.

    Attributes:
        tokens: int32 [R, T], bytes and BEGIN, END, PADDING.
        segment_ids: int32 [R, T], numbered from 0 in each row, -1 on padding.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray

    def take(self, rows: np.ndarray) -> "Rows":
        """The rows of these numbers."""
        return Rows(self.tokens[rows], self.segment_ids[rows])

    def checksum(self) -> int:
        """CRC-32 of the contents."""
        return zlib.crc32(self.segment_ids, zlib.crc32(self.tokens))


def pack(documents: Sequence[bytes], length: int) -> Rows:
    """Rows [R, length], each a document's BEGIN, bytes, END beside others', then padding.

    A document longer than a row is cut into rows that overlap by one token, so that every byte is predicted once; no
    other crosses rows. What is left of it, and shorter documents, go by best fit, longest first.
    """
    full, rest = [], []
    for document in documents:
        tokens = np.concatenate([[BEGIN], np.frombuffer(document, np.uint8), [END]]).astype(np.int32)
        if len(tokens) >= length:
            whole = np.lib.stride_tricks.sliding_window_view(tokens, length)[:: length - 1]
            full.append(whole)
            tokens = tokens[len(whole) * (length - 1) :]
        if len(tokens) > 1:  # the last token of a full row is no target any more
            rest.append(tokens)
    full = np.concatenate([np.zeros((0, length), np.int32), *full])
    shared = _best_fit(sorted(rest, key=len, reverse=True), length)
    return Rows(
        np.concatenate([full, shared.tokens]), np.concatenate([np.zeros(full.shape, np.int32), shared.segment_ids])
    )


def _best_fit(pieces: Sequence[np.ndarray], length: int) -> Rows:
    """Rows of the pieces, each put where the least room is left over."""
    rows: list[list[np.ndarray]] = []
    room: list[tuple[int, int]] = []  # ascending (tokens free, row)
    for piece in pieces:
        place = bisect.bisect_left(room, (len(piece), 0))
        if place == len(room):
            rows.append([])
            free, row = length, len(rows) - 1
        else:
            free, row = room.pop(place)
        rows[row].append(piece)
        bisect.insort(room, (free - len(piece), row))
    tokens = np.full((len(rows), length), PADDING, np.int32)
    segment_ids = np.full((len(rows), length), -1, np.int32)
    for row, members in enumerate(rows):
        sizes = [len(member) for member in members]
        tokens[row, : sum(sizes)] = np.concatenate(members)
        segment_ids[row, : sum(sizes)] = np.repeat(np.arange(len(members)), sizes)
    return Rows(tokens, segment_ids)


def batch_rows(step: int, batch_size: int, num_rows: int, seed: int) -> np.ndarray:
    """int64 [batch_size]: the row numbers of a step; every epoch takes each row once, in an order of its own."""
    epoch, place = np.divmod(step * batch_size + np.arange(batch_size), num_rows)
    return np.array([_order(seed, int(e), num_rows)[p] for e, p in zip(epoch, place, strict=True)])


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def in_batches(rows: Rows, batch_size: int) -> Iterator[Rows]:
    """All rows in order, the last batch filled up with rows of padding."""
    missing = -len(rows.tokens) % batch_size
    length = rows.tokens.shape[1]
    tokens = np.concatenate([rows.tokens, np.full((missing, length), PADDING, np.int32)])
    segment_ids = np.concatenate([rows.segment_ids, np.full((missing, length), -1, np.int32)])
    for start in range(0, len(tokens), batch_size):
        yield Rows(tokens[start : start + batch_size], segment_ids[start : start + batch_size])
