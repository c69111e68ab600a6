"""The blocks that a tile of neighbouring tokens walks: each once, in ascending order, with the tokens that want it."""

import triton
import triton.language as tl

NOWHERE = tl.constexpr(2**31 - 1)  # stands for "no block"


@triton.jit
def walk(
    first_keys, place, begins, members, counts, plain_counts,
    T: tl.constexpr, H: tl.constexpr, S: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    TOKENS: tl.constexpr, UNITS: tl.constexpr, TILES: tl.constexpr, TOKENS_SIDE: tl.constexpr, S_SIDE: tl.constexpr,
):  # fmt: skip
    """The walks of tiles of TOKENS (up to 16) tokens, UNITS tiles a program.

    first_keys [B, T, H, S]: the first key of every block that a token wants, or NOWHERE; any order, with repeats. The
    first CHOSEN are blocks it selected, the others blocks that its sliding window touches.
    begins [B, H, TILES, TOKENS * S]: the tile's blocks, ascending, without repeats, NOWHERE after the counts [B, H,
    TILES] real ones, of which the first plain_counts lie before every token's place [B, T] and window. members: bit i
    tells whether the tile's i-th token selected the block, bit 16 + i whether its window touches it.
    """
    groups: tl.constexpr = (TILES + UNITS - 1) // UNITS
    program = tl.program_id(0)
    head = program // groups % H
    row = (program // (groups * H)).to(tl.int64)
    tile = program % groups * UNITS + tl.arange(0, UNITS)  # [UNITS]
    local = tl.arange(0, TOKENS_SIDE)  # [TOKENS_SIDE]
    entry = tl.arange(0, S_SIDE)  # [S_SIDE]
    token = tile[:, None] * TOKENS + local[None, :]
    inside = (local < TOKENS)[None, :] & (token < T)
    wanted = tl.load(
        first_keys + ((row * T + token) * H + head)[:, :, None] * S + entry[None, None, :],
        mask=inside[:, :, None] & (entry < S)[None, None, :],
        other=NOWHERE,
    )  # [UNITS, TOKENS_SIDE, S_SIDE]

    edge = tl.load(place + row * T + token, mask=inside, other=NOWHERE) + (1 - BLOCK - WINDOW)
    edge = tl.min(edge, 1)  # [UNITS]

    target = ((row * H + head) * TILES + tile) * (TOKENS * S)
    count = tl.zeros([UNITS], dtype=tl.int32)
    plain = tl.zeros([UNITS], dtype=tl.int32)
    begin = tl.full([UNITS], -1, dtype=tl.int32)
    for i in range(TOKENS * S):
        later = tl.where(wanted > begin[:, None, None], wanted, NOWHERE)
        begin = tl.min(tl.min(later, 2), 1)
        hit = (wanted == begin[:, None, None]).to(tl.int32)
        member = tl.max(tl.where(entry[None, None, :] < CHOSEN, hit, 0), 2) << local[None, :]  # [UNITS, TOKENS_SIDE]
        if CHOSEN < S:
            member += tl.max(tl.where(entry[None, None, :] < CHOSEN, 0, hit), 2) << (local[None, :] + 16)
        tl.store(begins + target + i, begin, mask=tile < TILES)
        tl.store(members + target + i, tl.sum(member, 1), mask=tile < TILES)
        count += (begin < NOWHERE).to(tl.int32)
        plain += (begin <= edge).to(tl.int32)
    tl.store(counts + (row * H + head) * TILES + tile, count, mask=tile < TILES)
    tl.store(plain_counts + (row * H + head) * TILES + tile, plain, mask=tile < TILES)
