"""What the two sides of selection on Hopper (sm_90) hand over: probabilities of windows, summed over a group's heads.

Two warpgroups have scores [KEYS, ROWS] of a unit, keys as rows. They write sums [token, WINDOWS] to shared memory; the
warps that keep the lists of the unit's tokens read them, and add them up over blocks.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .ptx import load_floats, shared_address, store_pairs
from .ring import Ring

ROWS = gl.constexpr(128)  # query rows of a warpgroup
GROUPS = gl.constexpr(2)  # warpgroups that multiply
UNIT = gl.constexpr(256)  # query rows of both warpgroups
KEYS = gl.constexpr(64)  # windows that are multiplied at once
PARTS = gl.constexpr(4)  # parts of KEYS windows that a chunk has
WINDOWS = gl.constexpr(256)  # windows of a chunk
CHUNKS = gl.constexpr(2)  # chunks in shared memory


@gluon.constexpr_function
def neighbours(group):
    """Tokens that lie side by side in a tile's columns, and heads of each that do: eight query rows."""
    tokens = min(4, ROWS.value // group)
    return tokens, 8 // tokens


@gluon.jit
def column_of(n, G: gl.constexpr):
    """Token and head of the group of a tile's column."""
    TOKENS: gl.constexpr = neighbours(G)[0]
    HEADS: gl.constexpr = neighbours(G)[1]
    return n // (TOKENS * G) * TOKENS + n % 8 // HEADS, n % (TOKENS * G) // 8 * HEADS + n % HEADS


@gluon.jit
def _over_group(score, row_lse, FACTOR: gl.constexpr, G: gl.constexpr):
    """The probability of each window of score [KEYS, ROWS], summed over the heads of the group: [KEYS, M, tokens that
    lie side by side]."""
    TOKENS: gl.constexpr = neighbours(G)[0]
    HEADS: gl.constexpr = neighbours(G)[1]
    p = gl.exp2(score * FACTOR - row_lse[None, :])
    return gl.sum(gl.sum(gl.reshape(p, [KEYS, ROWS // (TOKENS * G), G // HEADS, TOKENS, HEADS]), 4), 2)


@gluon.jit
def _index(token, window, G: gl.constexpr):
    """Index of a window's sum: the eight windows of tokens side by side lie in different banks."""
    return token * WINDOWS + (window ^ token % neighbours(G)[0] * 8)


@gluon.aggregate
class SumRing(Ring):
    """Chunks of sums, float32 [CHUNKS * UNIT // G * WINDOWS]."""

    sums: gl.shared_memory_descriptor

    @gluon.jit
    def hand_over(
        self, score, row_lse, part, is_last, chunk, GROUP: gl.constexpr, FACTOR: gl.constexpr, G: gl.constexpr
    ):
        """Adds the sums of a part's score [KEYS, ROWS] to a chunk; the number of the chunk to go on with."""
        TOKENS: gl.constexpr = neighbours(G)[0]
        PIECES: gl.constexpr = ROWS // (TOKENS * G)
        p = _over_group(score, row_lse, FACTOR, G)
        layout: gl.constexpr = gl.SliceLayout(1, p.type.layout)
        local = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
        token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout))
        if part == 0:
            self.wait_empty(chunk)
        first = (self.slot(chunk) * GROUPS + GROUP) * (ROWS // G)
        index = _index(first + token[None, :], part * KEYS + local[:, None], G)
        store_pairs(shared_address(self.sums) + 4 * index, p, PIECES, 4 * WINDOWS * TOKENS)
        if is_last:
            self.fill(chunk)
            chunk += 1
        return chunk

    @gluon.jit
    def chunk(self, n, token, seen, G: gl.constexpr, HIDE: gl.constexpr):
        """The n-th chunk, once it is there."""
        self.wait_full(n)
        base = shared_address(self.sums) + self.slot(n) * (4 * UNIT // G * WINDOWS)
        return Chunk(base, token, seen, G, HIDE)


@gluon.aggregate
class Chunk:
    """The sums of a chunk of windows.

    Attributes:
        base: their address.
        token: of the unit, [TOKENS, 1, 1].
        seen: the windows before it are seen, [TOKENS, 1, 1].
        G: query heads of a kv head.
        HIDE: whether windows that are not seen must be hidden.
    """

    base: gl.tensor
    token: gl.tensor
    seen: gl.tensor
    G: gl.constexpr
    HIDE: gl.constexpr

    @gluon.jit
    def _window(self, window):
        """The sums of windows, all [TOKENS|1, M, 32]; with HIDE 0 for those that are not seen."""
        p = load_floats(self.base + 4 * _index(self.token, gl.maximum(window, 0), self.G))
        return gl.where(window < self.seen, p, 0.0) if self.HIDE else p

    @gluon.jit
    def to_next(self, block, shape):
        """What the windows of blocks give to the blocks after them."""
        STRIDES: gl.constexpr = shape.BLOCK_STRIDES
        total = 0.0
        for i in gl.static_range(STRIDES - shape.WINDOW_STRIDES + 1, STRIDES):
            total += (i + shape.WINDOW_STRIDES - STRIDES) * self._window(block * STRIDES + i)
        return total

    @gluon.jit
    def importance(self, block, carry, shape):
        """[TOKENS, M, 32]: the importance of blocks of the chunk. carry: what the chunk before gives to the first.

        The i-th window of a block shares min(WINDOW_STRIDES, BLOCK_STRIDES - i) strides with it, the rest with the next
        block.
        """
        STRIDES: gl.constexpr = shape.BLOCK_STRIDES
        total = min(shape.WINDOW_STRIDES, STRIDES) * self._window(block * STRIDES)
        for i in gl.static_range(1, STRIDES):
            total += min(shape.WINDOW_STRIDES, STRIDES - i) * self._window(block * STRIDES + i)
        if shape.WINDOW_STRIDES > 1:
            total += gl.where(block == 0, carry, self.to_next(block - 1, shape))
        return total
