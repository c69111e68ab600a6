"""Walks of tiles of tokens and their inverse, against plain Python."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import packing

from nsa_jax import tiling
from nsa_jax.inverse import Items, invert, more_items
from nsa_jax.segments import Blocks
from nsa_jax.walk import NOWHERE, Walks, choose, walks, walks_in_pairs

B, H, BLOCK = 2, 2, 16


def drawn(T, S, seed=0):
    """Block indices [B, T, H, S]: unsorted, with repeats, some negative, some beyond the query's own block, some T."""
    rng = np.random.default_rng(seed)
    own = np.arange(T).reshape(1, T, 1, 1) // BLOCK
    indices = rng.integers(-1, own + 2, (B, T, H, S))
    return np.where(rng.random(indices.shape) < 0.1, T, indices).astype(np.int32)


def segment_ids_of(kind, T):
    return {"whole": None, "packed": packing(T), "single": jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))}[kind]


def places(segment_ids, T):
    """[B][T] of (first token of the run, whether it is real); runs of padding count as runs."""
    if segment_ids is None:
        return [[(0, True)] * T] * B
    table = []
    for ids in np.asarray(segment_ids):
        starts = [0] * T
        for t in range(1, T):
            starts[t] = starts[t - 1] if ids[t] == ids[t - 1] else t
        table.append([(start, ids[t] >= 0) for t, start in enumerate(starts)])
    return table


def wanted(indices, counts, segment_ids, window_size):
    """{(b, h, t): (first keys of the blocks it selected, first keys of those its window touches)}."""
    T, H, S = indices.shape[1:]
    table = {}
    for b, row in enumerate(places(segment_ids, T)):
        for t, (start, real) in enumerate(row):
            for h in range(H):
                entries = indices[b, t, h, : S if counts is None else max(counts[b, t, h], 0)].tolist() if real else []
                window = range(max(start, t - window_size + 1), t + 1) if real and window_size else []
                table[b, h, t] = (
                    {start + j * BLOCK for j in entries if 0 <= j <= (t - start) // BLOCK},
                    {start + (key - start) // BLOCK * BLOCK for key in window},
                )
    return table


def chosen(kind, T, S, window_size, counted=False):
    """(the Choice, what every token wants by plain Python) of drawn indices."""
    segment_ids, indices = segment_ids_of(kind, T), drawn(T, S)
    counts = np.random.default_rng(1).integers(-1, S + 2, (B, T, H), np.int32) if counted else None
    choice = choose(jnp.asarray(indices), jnp.asarray(counts) if counted else None, segment_ids, BLOCK, window_size)
    return choice, wanted(indices, counts, segment_ids, window_size)


# T, S, tokens in a tile, window_size, segments, whether counts are given
WALKS = [
    (1, 1, 1, 0, "whole", False),
    (17, 5, 1, 17, "packed", True),
    (40, 3, 3, 1, "single", False),
    (63, 1, 5, 33, "packed", True),
    (63, 3, 8, 0, "whole", False),
    (100, 1, 16, 17, "packed", False),
]


@pytest.fixture(params=["sorted by the kernel", "in 64 bits", "by XLA"])
def made_long(request, monkeypatch):
    """Makes a choice one of a row so long, or of so many entries, that walks are sorted in that way."""
    if request.param == "by XLA":
        monkeypatch.setattr(tiling, "WALK_SORTS", 0)

    def made(choice):
        if request.param != "in 64 bits":
            return choice
        number = np.broadcast_to(np.int32(0), (B, 2**30))  # only its shape counts
        return choice._replace(blocks=choice.blocks._replace(number=number))

    return made


@pytest.mark.parametrize("case", WALKS, ids=str)
def test_walks(made_long, case):
    T, S, tokens, window_size, kind, counted = case
    choice, table = chosen(kind, T, S, window_size, counted)
    begins, members, counts, plain_counts = map(np.asarray, walks(made_long(choice), tokens, BLOCK, window_size))
    tiles = -(-T // tokens)
    assert begins.shape == members.shape == (B, H, tiles, tokens * (S + choice.touched.shape[2]))
    assert counts.shape == plain_counts.shape == (B, H, tiles)
    for b, h, tile in np.ndindex(B, H, tiles):
        bits = collections.Counter()
        for i, t in enumerate(range(tile * tokens, min(T, (tile + 1) * tokens))):
            for shift, blocks in zip((i, 16 + i), table[b, h, t], strict=True):
                bits.update(dict.fromkeys(blocks, 1 << shift))
        count = counts[b, h, tile]
        assert begins[b, h, tile, :count].tolist() == sorted(bits)
        assert members[b, h, tile, :count].view(np.uint32).tolist() == [bits[begin] for begin in sorted(bits)]
        assert (begins[b, h, tile, count:] == NOWHERE).all()
        plain = [begin for begin in bits if begin + BLOCK + window_size <= tile * tokens + 1]
        assert plain_counts[b, h, tile] == len(plain)


# T, S, tokens in a tile, segments, whether counts are given
PAIRS = [
    (1, 1, 1, "whole", False),
    (17, 5, 1, "packed", True),
    (40, 3, 2, "single", False),
    (63, 3, 4, "packed", True),
    (64, 1, 8, "whole", False),
    (100, 2, 16, "packed", False),
]


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_walks_in_pairs(made_long, case):
    T, S, tokens, kind, counted = case
    choice, table = chosen(kind, T, S, 0, counted)
    begins, members, counts, edges = map(np.asarray, walks_in_pairs(made_long(choice), tokens, BLOCK))
    pairs = -(-T // (2 * tokens))
    assert begins.shape == members.shape == (B, H, pairs, 2, tokens * S)
    assert counts.shape == edges.shape == (B, H, pairs)
    for b, h, pair in np.ndindex(B, H, pairs):
        bits = [collections.Counter(), collections.Counter()]
        for i, t in enumerate(range(2 * pair * tokens, min(T, 2 * (pair + 1) * tokens))):
            bits[i // tokens].update(dict.fromkeys(table[b, h, t][0], 1 << i % tokens))
        shared = set(bits[0]) & set(bits[1])
        steps = counts[b, h, pair]
        assert steps == max(map(len, bits))
        walked = begins[b, h, pair, :, :steps].tolist()
        wanted_by = members[b, h, pair, :, :steps].tolist()
        for tile in range(2):
            found = {begin: bit for begin, bit in zip(walked[tile], wanted_by[tile], strict=True) if bit}
            assert found == {begin: bit | (2**30 if begin in shared else 0) for begin, bit in bits[tile].items()}
            assert sum(bit > 0 for bit in wanted_by[tile]) == len(bits[tile])
        steps_of_both = zip(zip(*walked, strict=True), zip(*wanted_by, strict=True), strict=True)
        at_once = [begins for begins, bits in steps_of_both if max(bits) >= 2**30]
        assert at_once == [(begin, begin) for begin in sorted(shared)]
        begun = [begin for both in bits for begin in both]
        before = {
            begin for begin in begun if begin + BLOCK <= min(choice.place[b, 2 * pair * tokens :][: 2 * tokens]) + 1
        }
        assert before == {begin for begin in begun if begin <= edges[b, h, pair]}


def test_what_is_shared_is_spread_evenly():
    indices = np.array([0, 1, 2, 3, 4, 6, 8, 10, 0, 1, 2, 3, 5, 7, 9, 11], np.int32).reshape(1, 2, 1, 8)
    first_keys = jnp.asarray(indices * BLOCK)
    choice = choose(jnp.asarray(indices[:, :, :, :1] * 0), None, None, BLOCK)._replace(
        selected=first_keys, blocks=choose(jnp.zeros((1, 12 * BLOCK, 1, 1), jnp.int32), None, None, BLOCK).blocks
    )
    members = walks_in_pairs(choice, 1, BLOCK).members
    shared = (members[0, 0, 0, :, :8] >= 2**30).tolist()
    assert shared == [[False, True] * 4] * 2


def test_blocks_hold_every_token_once():
    T = 63
    for kind in ("whole", "packed", "single"):
        segment_ids = segment_ids_of(kind, T)
        blocks = choose(jnp.asarray(drawn(T, 1)), None, segment_ids, BLOCK).blocks
        for b, row in enumerate(places(segment_ids, T)):
            expected = [(start, start + (t - start) // BLOCK) for t, (start, _) in enumerate(row)]
            held = [range(*bounds) for bounds in zip(blocks.begin[b].tolist(), blocks.end[b].tolist(), strict=True)][
                : int(blocks.count[b])
            ]
            assert [t for tokens in held for t in tokens] == list(range(T))
            assert len(held) == len(set(expected))
            assert all(t in held[m] for t, m in enumerate(blocks.number[b].tolist()))


# T, S, chunk, stretch, window_size, segments
ITEMS = [
    (1, 1, 4, 1, 0, "whole"),
    (17, 3, 4, 5, 18, "packed"),
    (63, 3, 1, 40, 0, "packed"),
    (40, 2, 1000, 1000, 9, "single"),
    (100, 2, 7, 33, 33, "whole"),
    (100, 3, 1000, 8, 0, "packed"),
]


@pytest.mark.parametrize("case", ITEMS, ids=str)
def test_inverse(case):
    T, S, chunk, stretch, window_size, kind = case
    choice, table = chosen(kind, T, S, window_size)
    token_walks = walks(choice, 1, BLOCK, window_size)
    items = Items(*map(np.asarray, invert(token_walks, choice.blocks, BLOCK, chunk, stretch)))
    begin, count = np.asarray(choice.blocks.begin), np.asarray(choice.blocks.count)
    widest = token_walks.begins.shape[3]
    assert items.choosers.shape == (B * H * T * widest,)

    for b, h in np.ndindex(B, H):
        total = items.total[b, h]
        assert total - count[b] <= more_items(T, widest, BLOCK, chunk, stretch)
        assert count[b] <= total <= items.block.shape[2]
        stretches, held = [], {m: [] for m in range(count[b])}
        for i in range(total):
            m, first, number = (x[b, h, i] for x in (items.block, items.first, items.count))
            tokens = items.choosers[first : first + number] >> 1
            assert number <= chunk
            assert len(set(tokens // stretch)) <= 1  # all in one stretch
            assert items.rank[b, h, i] == sum(len(earlier) for _, earlier in held[m])
            stretches.append(tokens[0] // stretch if number else begin[b, m] // stretch)
            held[m].append((items.place[b, h, i], items.choosers[first : first + number].tolist()))
        assert stretches == sorted(stretches)

        place = 0
        for m in range(count[b]):
            expected = []
            for t in range(T):
                selected, touched = table[b, h, t]
                if begin[b, m] in selected | touched:
                    expected.append(2 * t + (begin[b, m] in selected))
            assert [chooser for _, choosers in held[m] for chooser in choosers] == expected
            assert items.further[b, h, m] == place
            assert [at for at, _ in held[m]] == [-1, *range(place, place + len(held[m]) - 1)]
            place += len(held[m]) - 1
        assert (items.further[b, h, count[b] :] == place).all()


def test_too_many_blocks_for_32_bits():
    rows, T = 2**15, 2**16
    long = jax.ShapeDtypeStruct((rows, 1, T, 1), jnp.int32)
    each = jax.ShapeDtypeStruct((rows, T), jnp.int32)
    with pytest.raises(
        ValueError,
        match="block_indices: 32768 rows x 1 heads x 65536 blocks x 1 stretches of the row do not fit 32-bit",
    ):
        jax.eval_shape(
            lambda walks, blocks: invert(walks, blocks, 64, 16, T),
            Walks(long, long, *[jax.ShapeDtypeStruct((rows, 1, T), jnp.int32)] * 2),
            Blocks(each, each, each, jax.ShapeDtypeStruct((rows,), jnp.int32)),
        )
