"""The blocks that a tile of neighbouring tokens walks: each once, with the tokens that want it."""

import triton
import triton.language as tl

NOWHERE = tl.constexpr(2**31 - 1)  # stands for "no block"
SHARED = tl.constexpr(1 << 30)  # of a member, in pairs of tiles: both want the block, at the same step


@triton.jit
def _exchange(x, UNITS: tl.constexpr, N: tl.constexpr, APART: tl.constexpr, RUN: tl.constexpr):
    """A round of a bitonic sort of x [UNITS, N]: of two entries APART apart the smaller first, in odd runs last."""
    pair = tl.reshape(x, [UNITS * N // (2 * APART), 2, APART])
    other = tl.reshape(tl.sum(pair, 1)[:, None, :] - pair, [UNITS, N])
    entry = tl.arange(0, N)
    smaller = ((entry & APART) == 0) == ((entry & RUN) == 0)
    return tl.where(smaller[None, :], tl.minimum(x, other), tl.maximum(x, other))


@triton.jit
def _sort(x, UNITS: tl.constexpr, N: tl.constexpr, ROUNDS: tl.constexpr):
    """x [UNITS, N], N = 2 ** ROUNDS, ascending along its rows."""
    for i in tl.static_range(1, ROUNDS + 1):
        for j in tl.static_range(i):
            x = _exchange(x, UNITS, N, 2 ** (i - 1 - j), 2**i)
    return x


@triton.jit
def _place(H: tl.constexpr, UNITS: tl.constexpr, TILES: tl.constexpr):
    """The row, the head and the tiles [UNITS] of this program."""
    groups: tl.constexpr = (TILES + UNITS - 1) // UNITS
    program = tl.program_id(0)
    tile = program % groups * UNITS + tl.arange(0, UNITS)
    return (program // (groups * H)).to(tl.int64), program // groups % H, tile


@triton.constexpr_function
def _none(wide):
    """What stands for no key: more than every other."""
    return 2**62 if wide else NOWHERE.value


@triton.jit
def _sorted_keys(
    first_keys, row, head, tile,
    T: tl.constexpr, H: tl.constexpr, S: tl.constexpr, CHOSEN: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr,
    TOKENS_SIDE: tl.constexpr, S_SIDE: tl.constexpr, ROUNDS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[UNITS, N], ascending: a first key, then in the lower bits token and whether its window touches the block; and of
    each entry the one before. Beyond the last `_none`."""
    N: tl.constexpr = TOKENS_SIDE * S_SIDE
    entry = tl.arange(0, N)
    local = entry // S_SIDE
    pick = entry % S_SIDE
    token = tile[:, None] * TOKENS + local[None, :]
    wanted = tl.load(
        first_keys + ((row * T + token) * H + head) * S + pick[None, :],
        mask=((local < TOKENS) & (pick < S))[None, :] & (token < T),
        other=NOWHERE,
    )
    low = local * 2 + (pick >= CHOSEN).to(tl.int32)
    key = (wanted.to(tl.int64) if WIDE else wanted) * (2 * TOKENS_SIDE) + low[None, :]
    key = _sort(tl.where(wanted < NOWHERE, key, _none(WIDE)), UNITS, N, ROUNDS)
    return key, tl.gather(key, tl.broadcast_to(tl.maximum(entry - 1, 0)[None, :], [UNITS, N]), 1)


@triton.jit
def _union(
    first_keys, begins, members, row, head, tile,
    T: tl.constexpr, H: tl.constexpr, S: tl.constexpr, CHOSEN: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr,
    TILES: tl.constexpr, TOKENS_SIDE: tl.constexpr, S_SIDE: tl.constexpr, ROUNDS: tl.constexpr, WIDE: tl.constexpr,
    SORTED: tl.constexpr,
):  # fmt: skip
    """The blocks of the tiles, ascending, NOWHERE after the last, and their members: [UNITS, N], by way of memory.

    Also how many they are, [UNITS], and where in begins and members the tiles' TOKENS * S entries stand.
    """
    N: tl.constexpr = TOKENS_SIDE * S_SIDE
    LOW: tl.constexpr = 2 * TOKENS_SIDE
    entry = tl.arange(0, N)
    at = ((row * H + head) * TILES + tile)[:, None] * (TOKENS * S)
    inside = (tile < TILES)[:, None]
    if SORTED:
        here = inside & (entry < TOKENS * S)[None, :]
        key = tl.load(first_keys + at + entry[None, :], mask=here, other=_none(WIDE))
        before = tl.load(first_keys + at + entry[None, :] - 1, mask=here & (entry > 0)[None, :], other=0)
    else:
        key, before = _sorted_keys(
            first_keys, row, head, tile, T, H, S, CHOSEN, TOKENS, UNITS, TOKENS_SIDE, S_SIDE, ROUNDS, WIDE
        )
    is_first = (entry == 0)[None, :]
    is_real = key < _none(WIDE)
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
def _first_place(place, row, tile, T: tl.constexpr, TOKENS: tl.constexpr, TOKENS_SIDE: tl.constexpr):
    """The earliest place of each tile's tokens."""
    local = tl.arange(0, TOKENS_SIDE)
    token = tile[:, None] * TOKENS + local[None, :]
    return tl.min(tl.load(place + row * T + token, mask=(local < TOKENS)[None, :] & (token < T), other=NOWHERE), 1)


@triton.jit
def walk(
    first_keys, place, begins, members, counts, plain_counts,
    T: tl.constexpr, H: tl.constexpr, S: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    TOKENS: tl.constexpr, UNITS: tl.constexpr, TILES: tl.constexpr, TOKENS_SIDE: tl.constexpr, S_SIDE: tl.constexpr,
    ROUNDS: tl.constexpr, WIDE: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """The walks of tiles of TOKENS (up to 16) tokens, UNITS tiles a program.

    first_keys [B, T, H, S]: the first key of every block that a token wants, or NOWHERE; any order, with repeats. The
    first CHOSEN are blocks it selected, the others blocks that its sliding window touches. If SORTED, [B, H, TILES,
    TOKENS * S]: what `_sorted_keys` would give.
    begins [B, H, TILES, TOKENS * S]: the tile's blocks, ascending, without repeats, NOWHERE after the counts [B, H,
    TILES] real ones, of which the first plain_counts lie before every token's place [B, T] and window. members: bit i
    tells whether the tile's i-th token selected the block, bit 16 + i whether its window touches it.
    """
    row, head, tile = _place(H, UNITS, TILES)
    begin, member, count, at = _union(
        first_keys, begins, members, row, head, tile,
        T, H, S, CHOSEN, TOKENS, UNITS, TILES, TOKENS_SIDE, S_SIDE, ROUNDS, WIDE, SORTED,
    )  # fmt: skip
    entry = tl.arange(0, TOKENS_SIDE * S_SIDE)
    mask = (tile < TILES)[:, None] & (entry < TOKENS * S)[None, :]
    tl.store(begins + at + entry[None, :], begin, mask=mask)
    tl.store(members + at + entry[None, :], member, mask=mask)
    edge = _first_place(place, row, tile, T, TOKENS, TOKENS_SIDE) + (1 - BLOCK - WINDOW)
    plain = tl.sum((begin <= tl.minimum(edge, NOWHERE - 1)[:, None]).to(tl.int32), 1)
    tl.store(counts + (row * H + head) * TILES + tile, count, mask=tile < TILES)
    tl.store(plain_counts + (row * H + head) * TILES + tile, plain, mask=tile < TILES)


@triton.jit
def walk_in_pairs(
    first_keys, place, begins, members, counts, edges,
    T: tl.constexpr, H: tl.constexpr, S: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    UNITS: tl.constexpr, TILES: tl.constexpr, TOKENS_SIDE: tl.constexpr, S_SIDE: tl.constexpr, ROUNDS: tl.constexpr,
    WIDE: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """The walks of pairs of tiles, TOKENS (up to 32) tokens a pair, UNITS pairs a program; TILES pairs a row.

    first_keys and SORTED as in `walk`, all CHOSEN. Both tiles of a pair take the counts [B, H, TILES] steps at the same
    time, and what both want at the same step: begins [B, H, TILES, 2, TOKENS * S / 2]. members: bit i tells whether the
    i-th token of the tile wants the block, SHARED whether the other tile does too; 0 at a step that is the other tile's
    alone. What is behind the counts is left over. Blocks up to the edges [B, H, TILES] lie before the place [B, T] of
    every token of the pair.
    """
    N: tl.constexpr = TOKENS_SIDE * S_SIDE
    row, head, tile = _place(H, UNITS, TILES)
    begin, member, _, at = _union(
        first_keys, begins, members, row, head, tile,
        T, H, S, CHOSEN, TOKENS, UNITS, TILES, TOKENS_SIDE, S_SIDE, ROUNDS, WIDE, SORTED,
    )  # fmt: skip
    entry = tl.arange(0, N)[None, :]
    inside = (tile < TILES)[:, None]
    ALL: tl.constexpr = (1 << (TOKENS // 2)) - 1
    first = member & ALL
    second = (member >> (TOKENS // 2)) & ALL
    both = (first != 0) & (second != 0)
    ones = (first != 0) & (second == 0)
    others = (first == 0) & (second != 0)
    shared = tl.sum(both.to(tl.int32), 1)[:, None]
    most = tl.maximum(tl.sum(ones.to(tl.int32), 1), tl.sum(others.to(tl.int32), 1))[:, None]
    steps = (shared + most).to(tl.int64 if N > 65536 else tl.int32)  # products of two such numbers follow
    # what is shared is spread evenly among the rest, so that copying and multiplying alternate
    number = tl.cumsum(both.to(tl.int32), 1)
    step = (number * steps + shared - 1) // tl.maximum(shared, 1) - 1
    tl.store(begins + at + step, begin, mask=both & inside)
    tl.store(members + at + step, first | SHARED, mask=both & inside)
    tl.store(begins + at + TOKENS * S // 2 + step, begin, mask=both & inside)
    tl.store(members + at + TOKENS * S // 2 + step, second | SHARED, mask=both & inside)
    for i in tl.static_range(2):
        mine = others if i else ones
        bits = second if i else first
        to = at + i * (TOKENS * S // 2)
        step = (tl.cumsum(mine.to(tl.int32), 1) - 1) * steps // tl.maximum(most, 1)
        tl.store(begins + to + step, begin, mask=mine & inside)
        tl.store(members + to + step, bits, mask=mine & inside)
        idle = (entry >= tl.sum(mine.to(tl.int32), 1)[:, None]) & (entry < most) & inside
        step = entry * steps // tl.maximum(most, 1)
        tl.store(begins + to + step, tl.zeros([UNITS, N], tl.int32), mask=idle)
        tl.store(members + to + step, tl.zeros([UNITS, N], tl.int32), mask=idle)
    edge = _first_place(place, row, tile, T, TOKENS, TOKENS_SIDE) + (1 - BLOCK)
    tl.store(counts + (row * H + head) * TILES + tile[:, None], shared + most, mask=inside)
    tl.store(edges + (row * H + head) * TILES + tile, edge, mask=tile < TILES)
