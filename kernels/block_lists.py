"""The blocks that a tile of neighbouring tokens goes through, its walk: each once, with the tokens that want it."""

import dataclasses

import triton
import triton.language as tl

NOWHERE = tl.constexpr(2**31 - 1)  # stands for "no block"
SHARED = tl.constexpr(1 << 30)  # bit of a member: both tiles of a pair want the block, at the same step


@dataclasses.dataclass(frozen=True, kw_only=True)
class WalkShape:
    """The shape of `walk` and `walk_in_pairs`, where a tile is a pair of tiles.

    Attributes:
        T: queries.
        H: kv heads.
        S: blocks that a query wants at most, of which it may have selected the first CHOSEN.
        BLOCK: keys of a block.
        WINDOW: keys of the sliding window; 0 for none.
        TOKENS: tokens of a tile.
        PER_PROGRAM: tiles that a program does.
        WIDE: whether keys of 64 bits are sorted.
        SORTED: whether the kernel gets them sorted.
    """

    T: int
    H: int
    S: int
    CHOSEN: int
    BLOCK: int
    WINDOW: int
    TOKENS: int
    PER_PROGRAM: int
    WIDE: bool
    SORTED: bool

    @property
    def TILES(self) -> int:
        return -(-self.T // self.TOKENS)

    @property
    def ENTRIES(self) -> int:
        """The most blocks of a tile's walk."""
        return self.TOKENS * self.S

    @property
    def TOKENS_SIDE(self) -> int:
        return 1 << (self.TOKENS - 1).bit_length()

    @property
    def S_SIDE(self) -> int:
        return 1 << (self.S - 1).bit_length()

    @property
    def SIDE(self) -> int:
        """Entries of a tile as it is held, a power of two."""
        return self.TOKENS_SIDE * self.S_SIDE

    @property
    def ROUNDS(self) -> int:
        return self.SIDE.bit_length() - 1

    @property
    def NO_KEY(self) -> int:
        """What stands for no key while keys are sorted: more than every other."""
        return 2**62 if self.WIDE else 2**31 - 1


@triton.aggregate
class Tiles:
    """The tiles of a program, [PER_PROGRAM], of one batch row and head.

    Attributes:
        batch, head: scalars.
        tile: which tiles.
        inside: whether there is such a tile.
    """

    batch: tl.tensor
    head: tl.tensor
    tile: tl.tensor
    inside: tl.tensor


@triton.jit
def _exchange(x, TILES: tl.constexpr, SIDE: tl.constexpr, APART: tl.constexpr, RUN: tl.constexpr):
    """A round of a bitonic sort of x [TILES, SIDE]: of two entries APART apart the smaller first, in odd runs last."""
    pair = tl.reshape(x, [TILES * SIDE // (2 * APART), 2, APART])
    other = tl.reshape(tl.sum(pair, 1)[:, None, :] - pair, [TILES, SIDE])
    entry = tl.arange(0, SIDE)
    smaller = ((entry & APART) == 0) == ((entry & RUN) == 0)
    return tl.where(smaller[None, :], tl.minimum(x, other), tl.maximum(x, other))


@triton.jit
def _sort(x, TILES: tl.constexpr, SIDE: tl.constexpr, ROUNDS: tl.constexpr):
    """x [TILES, SIDE], SIDE = 2 ** ROUNDS, ascending along its rows."""
    for i in tl.static_range(1, ROUNDS + 1):
        for j in tl.static_range(i):
            x = _exchange(x, TILES, SIDE, 2 ** (i - 1 - j), 2**i)
    return x


@triton.jit
def _tiles(SHAPE: tl.constexpr):
    """The `Tiles` of this program."""
    groups: tl.constexpr = (SHAPE.TILES + SHAPE.PER_PROGRAM - 1) // SHAPE.PER_PROGRAM
    program = tl.program_id(0)
    tile = program % groups * SHAPE.PER_PROGRAM + tl.arange(0, SHAPE.PER_PROGRAM)
    batch = (program // (groups * SHAPE.H)).to(tl.int64)
    head = program // groups % SHAPE.H
    return Tiles(batch, head, tile, tile < SHAPE.TILES)


@triton.jit
def _first_tile(tiles, SHAPE: tl.constexpr):
    """Where the tiles of this batch row and head begin among all, [B, H, TILES]."""
    return (tiles.batch * SHAPE.H + tiles.head) * SHAPE.TILES


@triton.jit
def _sorted_keys(first_keys, tiles, SHAPE: tl.constexpr):
    """[PER_PROGRAM, SIDE], ascending: a first key, then in the lower bits token and whether its window touches the
    block; and the entry before each. Beyond the last NO_KEY."""
    entry = tl.arange(0, SHAPE.SIDE)
    local = entry // SHAPE.S_SIDE
    pick = entry % SHAPE.S_SIDE
    token = tiles.tile[:, None] * SHAPE.TOKENS + local[None, :]
    wanted = tl.load(
        first_keys + ((tiles.batch * SHAPE.T + token) * SHAPE.H + tiles.head) * SHAPE.S + pick[None, :],
        mask=((local < SHAPE.TOKENS) & (pick < SHAPE.S))[None, :] & (token < SHAPE.T),
        other=NOWHERE,
    )
    low = local * 2 + (pick >= SHAPE.CHOSEN).to(tl.int32)
    key = (wanted.to(tl.int64) if SHAPE.WIDE else wanted) * (2 * SHAPE.TOKENS_SIDE) + low[None, :]
    key = _sort(tl.where(wanted < NOWHERE, key, SHAPE.NO_KEY), SHAPE.PER_PROGRAM, SHAPE.SIDE, SHAPE.ROUNDS)
    before = tl.broadcast_to(tl.maximum(entry - 1, 0)[None, :], [SHAPE.PER_PROGRAM, SHAPE.SIDE])
    return key, tl.gather(key, before, 1)


@triton.jit
def _union(first_keys, begins, members, tiles, SHAPE: tl.constexpr):
    """The blocks of the tiles, ascending, NOWHERE after the last, and their members: [PER_PROGRAM, SIDE], by way of
    memory. Also how many they are, [PER_PROGRAM], and where in begins and members the tiles' ENTRIES stand.
    """
    LOW: tl.constexpr = 2 * SHAPE.TOKENS_SIDE
    entry = tl.arange(0, SHAPE.SIDE)
    at = (_first_tile(tiles, SHAPE) + tiles.tile)[:, None] * SHAPE.ENTRIES
    inside = tiles.inside[:, None]
    if SHAPE.SORTED:
        here = inside & (entry < SHAPE.ENTRIES)[None, :]
        key = tl.load(first_keys + at + entry[None, :], mask=here, other=SHAPE.NO_KEY)
        before = tl.load(first_keys + at + entry[None, :] - 1, mask=here & (entry > 0)[None, :], other=0)
    else:
        key, before = _sorted_keys(first_keys, tiles, SHAPE)
    is_first = (entry == 0)[None, :]
    is_real = key < SHAPE.NO_KEY
    low = (key % LOW).to(tl.int32)
    bit = tl.where(is_real & (is_first | (key != before)), 1 << (low // 2 + low % 2 * 16), 0)
    begin = (key // LOW).to(tl.int32)
    opens = is_real & (is_first | (begin != (before // LOW).to(tl.int32)))  # the first entry of a block
    count = tl.sum(opens.to(tl.int32), 1)

    to = at + tl.cumsum(opens.to(tl.int32), 1) - 1
    tl.store(begins + to, begin, mask=opens & inside)
    tl.store(members + to, tl.cumsum(bit, 1) - bit, mask=opens & inside)  # the bits before, modulo 2 ** 32
    tl.debug_barrier()
    used = inside & (entry[None, :] < count[:, None])
    ahead = used & (entry[None, :] + 1 < count[:, None])
    begin = tl.load(begins + at + entry[None, :], mask=used, other=NOWHERE)
    member = tl.load(members + at + entry[None, :] + 1, mask=ahead, other=0)
    member = tl.where(ahead, member, tl.sum(bit, 1)[:, None])
    member -= tl.load(members + at + entry[None, :], mask=used, other=0)
    tl.debug_barrier()
    return begin, tl.where(used, member, 0), count, at


@triton.jit
def _of_tokens(values, other, tiles, SHAPE: tl.constexpr):
    """Values [B, T] of each tile's tokens, [PER_PROGRAM, TOKENS_SIDE]; `other` where there is no token."""
    local = tl.arange(0, SHAPE.TOKENS_SIDE)
    token = tiles.tile[:, None] * SHAPE.TOKENS + local[None, :]
    real = (local < SHAPE.TOKENS)[None, :] & (token < SHAPE.T)
    return tl.load(values + tiles.batch * SHAPE.T + token, mask=real, other=other)


@triton.jit
def _first_place(place, tiles, SHAPE: tl.constexpr):
    """The earliest place of each tile's tokens."""
    return tl.min(_of_tokens(place, NOWHERE, tiles, SHAPE), 1)


@triton.jit
def _may_share(place, start, tiles, SHAPE: tl.constexpr):
    """Whether the two tiles of each pair are of one segment, by where their tokens' starts, and the first tile's tokens
    stand nowhere behind the second's."""
    first = tl.arange(0, SHAPE.TOKENS_SIDE)[None, :] < SHAPE.TOKENS // 2
    earliest, latest = _of_tokens(start, NOWHERE, tiles, SHAPE), _of_tokens(start, -1, tiles, SHAPE)
    of_first = tl.where(first, _of_tokens(place, -1, tiles, SHAPE), -1)
    of_second = tl.where(first, NOWHERE, _of_tokens(place, NOWHERE, tiles, SHAPE))
    return (tl.min(earliest, 1) >= tl.max(latest, 1)) & (tl.max(of_first, 1) <= tl.min(of_second, 1))


@triton.jit
def walk(first_keys, place, begins, members, counts, plain_counts, SHAPE: tl.constexpr):
    """The walks of tiles of TOKENS (up to 16) tokens.

    first_keys [B, T, H, S]: the first key of every block that a token wants, or NOWHERE; any order, with repeats. The
    first CHOSEN are blocks it selected, the others blocks that its sliding window touches. If SORTED, [B, H, TILES,
    ENTRIES]: what `_sorted_keys` would give.
    begins [B, H, TILES, ENTRIES]: the tile's blocks, ascending, without repeats, NOWHERE after the counts [B, H, TILES]
    real ones, of which the first plain_counts lie before every token's place [B, T] and window. members: bit i tells
    whether the tile's i-th token selected the block, bit 16 + i whether its window touches it.
    """
    tiles = _tiles(SHAPE)
    begin, member, count, at = _union(first_keys, begins, members, tiles, SHAPE)
    entry = tl.arange(0, SHAPE.SIDE)
    mask = tiles.inside[:, None] & (entry < SHAPE.ENTRIES)[None, :]
    tl.store(begins + at + entry[None, :], begin, mask=mask)
    tl.store(members + at + entry[None, :], member, mask=mask)
    edge = _first_place(place, tiles, SHAPE) + (1 - SHAPE.BLOCK - SHAPE.WINDOW)
    plain = tl.sum((begin <= tl.minimum(edge, NOWHERE - 1)[:, None]).to(tl.int32), 1)
    tl.store(counts + _first_tile(tiles, SHAPE) + tiles.tile, count, mask=tiles.inside)
    tl.store(plain_counts + _first_tile(tiles, SHAPE) + tiles.tile, plain, mask=tiles.inside)


@triton.jit
def walk_in_pairs(first_keys, place, start, begins, members, counts, edges, SHAPE: tl.constexpr):
    """The walks of pairs of tiles, TOKENS (up to 32) tokens a pair; TILES pairs a batch row.

    first_keys and SORTED as in `walk`, all CHOSEN. Both tiles of a pair take the counts [B, H, TILES] steps at the same
    time, and what both want at the same step: begins [B, H, TILES, 2, ENTRIES / 2]. members: bit i tells whether the
    i-th token of the tile wants the block, SHARED whether the other tile does too; 0 at a step that is the other tile's
    alone. Entries after the counts are not written. Blocks up to the edges [B, H, TILES] lie before the place [B, T] of
    every token of the pair.

    The order in which a token goes through its blocks decides how sums are rounded, so nothing that a token cannot see
    may change it. The first tile goes through its blocks as they stand in the row; the second follows it, with its own
    blocks where the first has some that the second does not want. Tiles of several segments (start [B, T]), or whose
    tokens do not stand one after the other, share nothing, and each goes through its blocks as they stand.
    """
    SIDE: tl.constexpr = SHAPE.SIDE
    OTHER: tl.constexpr = SHAPE.ENTRIES // 2  # from an entry of the first tile to the second tile's
    tiles = _tiles(SHAPE)
    begin, member, _, at = _union(first_keys, begins, members, tiles, SHAPE)
    inside = tiles.inside[:, None]
    ALL: tl.constexpr = (1 << (SHAPE.TOKENS // 2)) - 1
    first = member & ALL
    second = (member >> (SHAPE.TOKENS // 2)) & ALL
    shared = (first != 0) & (second != 0) & _may_share(place, start, tiles, SHAPE)[:, None]
    one = (first != 0) & ~shared
    other = (second != 0) & ~shared
    ones = tl.sum(one.to(tl.int32), 1)[:, None]
    others = tl.sum(other.to(tl.int32), 1)[:, None]
    shares = tl.sum(shared.to(tl.int32), 1)[:, None]
    number = tl.cumsum(one.to(tl.int32), 1) - 1  # among the first tile's own
    step = number + tl.cumsum(shared.to(tl.int32), 1)
    other_number = tl.cumsum(other.to(tl.int32), 1) - 1
    # the second tile's n-th own block goes where the first tile has its n-th, found by way of memory
    tl.store(begins + at + number, step, mask=one & inside)
    tl.debug_barrier()
    beside = other & (other_number < ones)
    other_step = tl.load(begins + at + other_number, mask=beside & inside, other=0)
    other_step = tl.where(beside, other_step, shares + other_number)
    tl.debug_barrier()

    tag = tl.where(shared, SHARED, 0)
    zero = tl.zeros([SHAPE.PER_PROGRAM, SIDE], tl.int32)
    tl.store(begins + at + step, begin, mask=(one | shared) & inside)
    tl.store(members + at + step, first | tag, mask=(one | shared) & inside)
    tl.store(begins + at + OTHER + step, begin, mask=shared & inside)
    tl.store(members + at + OTHER + step, second | tag, mask=shared & inside)
    tl.store(begins + at + OTHER + other_step, begin, mask=other & inside)
    tl.store(members + at + OTHER + other_step, second, mask=other & inside)
    # steps of one tile alone
    alone = one & (number >= others)
    tl.store(begins + at + OTHER + step, zero, mask=alone & inside)
    tl.store(members + at + OTHER + step, zero, mask=alone & inside)
    alone = other & (other_number >= ones)
    tl.store(begins + at + other_step, zero, mask=alone & inside)
    tl.store(members + at + other_step, zero, mask=alone & inside)
    edge = _first_place(place, tiles, SHAPE) + (1 - SHAPE.BLOCK)
    pair = _first_tile(tiles, SHAPE) + tiles.tile
    tl.store(counts + pair[:, None], shares + tl.maximum(ones, others), mask=inside)
    tl.store(edges + pair, edge, mask=tiles.inside)
