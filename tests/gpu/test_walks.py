"""Walks of tiles of tokens and their inverse, against plain Python."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import packing

from nsa_jax.gpu import walks as walks_module
from nsa_jax.gpu.inverse import Items, invert, more_items
from nsa_jax.gpu.walks import NOWHERE, Walks, choose, walks, walks_in_pairs
from nsa_jax.rows.blocks import Blocks, blocks
from nsa_jax.rows.queries import locate

B, H, BLOCK = 2, 2, 16


def drawn(places, S, seed=0):
    """Block indices [B, Tq, H, S]: unsorted, with repeats, negative, beyond the query's own block, or far."""
    rng = np.random.default_rng(seed)
    own = np.maximum(places, 0)[:, :, None, None] // BLOCK
    indices = rng.integers(-1, own + 2, (*places.shape, H, S))
    return np.where(rng.random(indices.shape) < 0.1, 1000, indices).astype(np.int32)


def segment_ids_of(kind, T):
    return {"whole": None, "packed": packing(T), "single": jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))}[kind]


def places_of(kind, T):
    """Query indices [B, Tq]; None for a query at every token."""
    rng = np.random.default_rng(T)
    kinds = {
        "all": lambda: None,
        "slice": lambda: np.tile(np.arange(T // 2, T), (B, 1)),
        "any": lambda: rng.integers(-3, T + 3, (B, T + 9)),
        "one": lambda: np.array([[T - 1], [T]]),
    }
    return kinds[kind]()


def starts_of(segment_ids, T):
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


def wanted(indices, counts, segment_ids, places, T, window_size):
    """{(b, h, i): (first keys of the blocks that query i selected, first keys of those its window touches)}."""
    Tq, H, S = indices.shape[1:]
    table, starts = {}, starts_of(segment_ids, T)
    for b, i, h in np.ndindex(B, Tq, H):
        t = places[b, i]
        start, real = starts[b][t] if 0 <= t < T else (0, False)
        entries = indices[b, i, h, : S if counts is None else max(counts[b, i, h], 0)].tolist() if real else []
        window = range(max(start, t - window_size + 1), t + 1) if real and window_size else []
        table[b, h, i] = (
            {start + j * BLOCK for j in entries if 0 <= j <= (t - start) // BLOCK},
            {start + (key - start) // BLOCK * BLOCK for key in window},
        )
    return table


def chosen(kind, T, S, window_size, queries="all", counted=False):
    """(the Choice, what every query wants by plain Python) of drawn indices."""
    segment_ids, places = segment_ids_of(kind, T), places_of(queries, T)
    row = locate(segment_ids, None if places is None else jnp.asarray(places, jnp.int32), B, T)
    places = np.tile(np.arange(T), (B, 1)) if places is None else places
    indices = drawn(places, S)
    counts = np.random.default_rng(1).integers(-1, S + 2, indices.shape[:3], np.int32) if counted else None
    choice = choose(row, jnp.asarray(indices), jnp.asarray(counts) if counted else None, BLOCK, window_size)
    return choice, wanted(indices, counts, segment_ids, places, T, window_size)


# T, S, tokens in a tile, window_size, segments, queries, whether counts are given
WALKS = [
    (1, 1, 1, 0, "whole", "all", False),
    (17, 5, 1, 17, "packed", "all", True),
    (40, 3, 3, 1, "single", "any", False),
    (63, 1, 5, 33, "packed", "any", True),
    (63, 3, 8, 0, "whole", "slice", False),
    (100, 1, 16, 17, "packed", "all", False),
    (100, 2, 4, 9, "packed", "one", False),
]


@pytest.fixture(params=["sorted by the kernel", "in 64 bits", "by XLA"])
def made_long(request, monkeypatch):
    """Makes a choice one of a row so long, or of so many entries, that walks are sorted in that way."""
    if request.param == "by XLA":
        monkeypatch.setattr(walks_module, "MOST_SORTED", 0)

    def made(choice):
        if request.param != "in 64 bits":
            return choice
        start = np.broadcast_to(np.int32(0), (B, 2**30))  # only its shape counts
        return choice._replace(row=dataclasses.replace(choice.row, tokens=choice.row.tokens._replace(start=start)))

    return made


@pytest.mark.parametrize("case", WALKS, ids=str)
def test_walks(made_long, case):
    T, S, tokens, window_size, kind, queries, counted = case
    choice, table = chosen(kind, T, S, window_size, queries, counted)
    place, T = np.asarray(choice.row.queries.place), choice.selected.shape[1]
    begins, members, counts, plain_counts = map(np.asarray, walks(made_long(choice), tokens, BLOCK, window_size))
    tiles = -(-T // tokens)
    assert begins.shape == members.shape == (B, H, tiles, tokens * choice.wanted)
    assert counts.shape == plain_counts.shape == (B, H, tiles)
    for b, h, tile in np.ndindex(B, H, tiles):
        bits = collections.Counter()
        for i, t in enumerate(range(tile * tokens, min(T, (tile + 1) * tokens))):
            for shift, first_keys in zip((i, 16 + i), table[b, h, t], strict=True):
                bits.update(dict.fromkeys(first_keys, 1 << shift))
        count = counts[b, h, tile]
        assert begins[b, h, tile, :count].tolist() == sorted(bits)
        assert members[b, h, tile, :count].view(np.uint32).tolist() == [bits[begin] for begin in sorted(bits)]
        assert (begins[b, h, tile, count:] == NOWHERE).all()
        nearest = place[b, tile * tokens :][:tokens].min()
        plain = [begin for begin in bits if begin + BLOCK + window_size <= nearest + 1]
        assert plain_counts[b, h, tile] == len(plain)


# T, S, tokens in a tile, segments, queries, whether counts are given
PAIRS = [
    (1, 1, 1, "whole", "all", False),
    (17, 5, 1, "packed", "all", True),
    (40, 3, 2, "single", "any", False),
    (63, 3, 4, "packed", "any", True),
    (64, 1, 8, "whole", "slice", False),
    (100, 2, 16, "packed", "all", False),
]


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_walks_in_pairs(made_long, case):
    T, S, tokens, kind, queries, counted = case
    choice, table = chosen(kind, T, S, 0, queries, counted)
    place, start = (np.asarray(x) for x in (choice.row.queries.place, choice.row.queries.start))
    T = choice.selected.shape[1]
    begins, members, counts, edges = map(np.asarray, walks_in_pairs(made_long(choice), tokens, BLOCK))
    pairs = -(-T // (2 * tokens))
    assert begins.shape == members.shape == (B, H, pairs, 2, tokens * S)
    assert counts.shape == edges.shape == (B, H, pairs)
    for b, h, pair in np.ndindex(B, H, pairs):
        bits = [collections.Counter(), collections.Counter()]
        for i, t in enumerate(range(2 * pair * tokens, min(T, 2 * (pair + 1) * tokens))):
            bits[i // tokens].update(dict.fromkeys(table[b, h, t][0], 1 << i % tokens))
        shared = set(bits[0]) & set(bits[1])
        places = place[b, 2 * pair * tokens :][: 2 * tokens].tolist()
        in_turn = max(places[:tokens]) <= min(places[tokens:], default=T)
        if len(set(start[b, 2 * pair * tokens :][: 2 * tokens].tolist())) > 1 or not in_turn:
            shared = set()  # what a token cannot see must not change the order of its blocks
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
        for tile in range(1 if shared else 2):
            order = [begin for begin, bit in zip(walked[tile], wanted_by[tile], strict=True) if bit]
            assert order == sorted(order)
        begun = [begin for both in bits for begin in both]
        nearest = place[b, 2 * pair * tokens :][: 2 * tokens].min()
        before = {begin for begin in begun if begin + BLOCK <= nearest + 1}
        assert before == {begin for begin in begun if begin <= edges[b, h, pair]}


def test_the_second_tile_of_a_pair_follows_the_first():
    indices = np.array([0, 2, 3, 5, 7, 8, 1, 2, 4, 6, 7, 9], np.int32).reshape(1, 2, 1, 6)
    row = locate(None, jnp.full((1, 2), 10 * BLOCK - 1, jnp.int32), 1, 10 * BLOCK)
    walked = walks_in_pairs(choose(row, jnp.asarray(indices), None, BLOCK), 1, BLOCK)
    steps = walked.counts[0, 0, 0]
    assert (walked.begins[0, 0, 0, :, :steps] // BLOCK).tolist() == [[0, 2, 3, 5, 7, 8], [1, 2, 4, 6, 7, 9]]
    shared = (walked.members[0, 0, 0, :, :steps] >= 2**30).tolist()
    assert shared == [[False, True, False, False, True, False]] * 2


# T, S, chunk, stretch, window_size, segments, queries
ITEMS = [
    (1, 1, 4, 1, 0, "whole", "all"),
    (17, 3, 4, 5, 18, "packed", "all"),
    (63, 3, 1, 40, 0, "packed", "any"),
    (40, 2, 1000, 1000, 9, "single", "any"),
    (100, 2, 7, 33, 33, "whole", "all"),
    (100, 2, 7, 13, 33, "whole", "slice"),
    (100, 3, 1000, 8, 0, "packed", "all"),
    (100, 3, 1000, 8, 0, "packed", "any"),
    (100, 3, 2, 8, 0, "packed", "one"),
]


@pytest.mark.parametrize("case", ITEMS, ids=str)
def test_inverse(case):
    T, S, chunk, stretch, window_size, kind, queries = case
    choice, table = chosen(kind, T, S, window_size, queries)
    row, Tq = choice.row, choice.selected.shape[1]
    query_walks = walks(choice.in_order(), 1, BLOCK, window_size)
    in_blocks = blocks(row, BLOCK, window_size)
    widest = query_walks.begins.shape[3]
    more = more_items(Tq, T, widest, BLOCK, chunk, stretch, row.sliced)
    items = Items(*map(np.asarray, invert(query_walks, in_blocks, chunk, stretch, more)))
    begin, count, first_query = map(np.asarray, (in_blocks.begin, in_blocks.count, in_blocks.first))
    number = jnp.broadcast_to(jnp.arange(Tq, dtype=jnp.int32), (B, Tq))
    order = np.asarray(row.queries.in_order(number))  # of the query that is i-th by place
    place_of = np.asarray(row.queries.in_order(row.queries.place))
    assert items.choosers.shape == (B * H * Tq * widest,)

    for b, h in np.ndindex(B, H):
        total = items.total[b, h]
        assert total - count[b] <= more
        assert count[b] <= total <= items.block.shape[2]
        stretches, held = [], {m: [] for m in range(count[b])}
        for i in range(total):
            m, first, many = (x[b, h, i] for x in (items.block, items.first, items.count))
            choosers = items.choosers[first : first + many] >> 1
            assert many <= chunk
            assert len(set(choosers // stretch)) <= 1  # all in one stretch
            assert items.rank[b, h, i] == sum(len(earlier) for _, earlier in held[m])
            stretches.append((choosers[0] if many else min(first_query[b, m], Tq - 1)) // stretch)
            held[m].append((items.place[b, h, i], items.choosers[first : first + many].tolist()))
        assert stretches == sorted(stretches)

        place = 0
        for m in range(count[b]):
            expected = []
            for t in range(Tq):
                selected, touched = table[b, h, order[b, t]]
                if begin[b, m] in selected | touched:
                    assert place_of[b, t] >= begin[b, m]
                    expected.append(2 * t + (begin[b, m] in selected))
            assert [chooser for _, choosers in held[m] for chooser in choosers] == expected
            assert items.further[b, h, m] == place
            assert [at for at, _ in held[m]] == [-1, *range(place, place + len(held[m]) - 1)]
            place += len(held[m]) - 1
        assert (items.further[b, h, count[b] :] == place).all()


@pytest.mark.parametrize("sliced", [False, True])
def test_more_items_bounds_the_worst_choice(sliced):
    # every query of one long segment chooses the blocks before it that are cut into most items
    T, S, chunk, stretch = 96, 6, 4, 8
    Tq = 40 if sliced else T
    places = np.tile(np.arange(T - Tq, T), (B, 1))
    row = locate(None, jnp.asarray(places, jnp.int32) if sliced else None, B, T)
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation(6)[:S] for _ in range(B * Tq * H)]).reshape(B, Tq, H, S)
    choice = choose(row, jnp.asarray(indices, jnp.int32), None, BLOCK)
    more = more_items(Tq, T, S, BLOCK, chunk, stretch, row.sliced)
    items = invert(walks(choice.in_order(), 1, BLOCK), blocks(row, BLOCK), chunk, stretch, more)
    assert (np.asarray(items.total) <= T // BLOCK + more).all()


def test_too_many_blocks_for_32_bits():
    rows, T = 2**15, 2**16
    long = jax.ShapeDtypeStruct((rows, 1, T, 1), jnp.int32)
    each, one = jax.ShapeDtypeStruct((rows, T), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    with pytest.raises(ValueError, match="block_indices: 32768 rows x 1 heads x 65536 blocks x 1 stretches of the"):
        jax.eval_shape(
            lambda walks, blocks: invert(walks, blocks, 64, 2**20, T),
            Walks(long, long, *[jax.ShapeDtypeStruct((rows, 1, T), jnp.int32)] * 2),
            Blocks(each, each, each, one, each, each),
        )
