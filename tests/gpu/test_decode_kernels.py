"""The kernels for few queries against the jnp op on whole rows: splits, pages, what lies in unwritten slots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, assert_same_bits, count_launches, normal

import nsa_jax
from nsa_jax.branches import Config, PerBranch
from nsa_jax.gpu import decode


@dataclasses.dataclass
class Step:
    """Queries at the end of rows of a cache, in one piece; `garbage` is what nobody may see."""

    T: int
    N: int
    H: int
    K: int
    V: int
    start: tuple[int, ...]
    count: tuple[int, ...]
    Tq: int = 1
    block_size: int = 16
    window: int = 16
    stride: int = 16
    S: int = 4
    window_size: int = 20
    page_size: int = 0
    drop: tuple[str, ...] = ()
    init: int = 1
    local: int = 2
    counts: bool = False
    selects_all: bool = False

    def __post_init__(self):
        B, seed = len(self.start), self.T
        self.query = normal(seed, B, self.Tq, self.N, self.K)
        self.key, self.value = normal(seed + 1, B, self.T, self.H, self.K), normal(seed + 2, B, self.T, self.H, self.V)
        self.gates = {
            name: None if name in self.drop else normal(seed + 3 + i, B, self.Tq, self.N)
            for i, name in enumerate(PerBranch._fields)
        }
        self.block_counts = self.S
        if self.counts:
            drawn = np.random.default_rng(seed).integers(0, self.S + 1, (B, self.Tq, self.H))
            self.block_counts = jnp.asarray(drawn, jnp.int32)
        self.starts, self.lengths = np.array(self.start, np.int32), np.array(self.count, np.int32)

    @property
    def config(self):
        return Config(
            self.K**-0.5,
            self.block_size,
            self.window_size,
            self.window,
            self.stride,
            self.init,
            self.local,
            self.S,
            self.selects_all,
        )

    def compressed(self):
        return (nsa_jax.compress(x, window=self.window, stride=self.stride) for x in (self.key, self.value))

    def expected(self):
        """[B, Tq, N, V] of the jnp op."""
        i = np.arange(self.Tq)
        indices = np.where(i < self.lengths[:, None], self.starts[:, None] + i, -1).astype(np.int32)
        compressed_key, compressed_value = self.compressed()
        gates = {f"{name}_gate": gate for name, gate in self.gates.items()}
        return nsa_jax.native_sparse_attention(
            self.query, self.key, self.value, compressed_key=compressed_key, compressed_value=compressed_value,
            block_counts=self.block_counts, max_block_count=self.S, block_size=self.block_size,
            window_size=self.window_size, compression_window=self.window, compression_stride=self.stride,
            num_init_blocks=self.init, num_local_blocks=self.local, query_indices=jnp.asarray(indices),
            implementation="xla", **gates,
        )  # fmt: skip

    def arguments(self):
        """What `decode.attend` takes behind the config: NaN wherever no query sees."""
        end = self.starts + self.lengths
        written = np.arange(self.T) < end[:, None]
        complete = np.arange(self.T // self.stride) * self.stride + self.window <= end[:, None]
        key, value = (jnp.where(written[..., None, None], x, jnp.nan) for x in (self.key, self.value))
        compressed = [jnp.where(complete[..., None, None], x, jnp.nan) for x in self.compressed()]
        page_indices = None
        if self.page_size:
            key, value, *compressed, page_indices = self._pages(end, key, value, *compressed)
        gates = PerBranch(**self.gates)
        return (
            self.query, key, value, *compressed, page_indices, jnp.asarray(self.starts), jnp.asarray(self.lengths),
            gates, self.block_counts,
        )  # fmt: skip

    def _pages(self, end, *rows):
        """The rows in shuffled pages, some of which are nobody's, and page_indices: far off where there is no page."""
        B, pages = len(end), self.T // self.page_size
        places = np.random.default_rng(self.T).permutation(B * pages + 3)[: B * pages]

        def pool(x):
            x = np.asarray(x).reshape(B * pages, -1, *x.shape[2:])
            spread = np.full((B * pages + 3, *x.shape[1:]), np.nan, x.dtype)
            spread[places] = x
            return jnp.asarray(spread)

        used = np.arange(pages) * self.page_size < end[:, None]
        return *map(pool, rows), jnp.asarray(np.where(used, places.reshape(B, pages), 10**6), jnp.int32)


def attend(step, **changes):
    """`decode.attend` of a step, under jit; changes: arguments by name that take the place of the step's."""
    names = ("query", "key", "value", "compressed_key", "compressed_value", "page_indices", "start", "count", "gates")
    *arrays, counts = step.arguments()
    arrays = dict(zip(names, arrays, strict=True)) | changes
    if not step.counts:
        return jax.jit(lambda arrays: decode.attend(step.config, **arrays, block_counts=counts))(arrays)
    return jax.jit(lambda arrays, counts: decode.attend(step.config, **arrays, block_counts=counts))(arrays, counts)


STEPS = {
    "one query, a group of 16": Step(96, 16, 1, 16, 16, (95, 0, 40), (1, 1, 0)),
    "overlapping windows, unequal widths": Step(
        96, 6, 2, 20, 36, (90, 0), (3, 2), Tq=3, window=8, stride=4, S=5, window_size=50
    ),
    "pages of one window": Step(64, 3, 1, 16, 12, (60, 30), (3, 1), Tq=3, page_size=16, S=3),
    "pages of many windows": Step(128, 1, 1, 16, 16, (119, 3), (8, 8), Tq=8, window=4, stride=4, page_size=64, S=3),
    "counts of blocks": Step(128, 2, 1, 16, 16, (120, 60), (3, 3), Tq=3, counts=True, init=2, local=1),
    "block of 64, a window longer than the row": Step(150, 4, 1, 64, 32, (140,), (1,), block_size=64, window=64,
        stride=64, S=2, window_size=10**12),
    "every block": Step(48, 2, 1, 16, 16, (44, 9), (2, 2), Tq=2, S=3, selects_all=True),
    "shorter than a window": Step(15, 2, 1, 16, 16, (7,), (2,), Tq=2),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_step(name):
    step = STEPS[name]
    assert_close([attend(step)], [step.expected()])


@pytest.mark.parametrize(
    "drop", [("compressed",), ("selected",), ("sliding",), ("compressed", "selected"), ("selected", "sliding")], ids=str
)
def test_a_branch_that_is_dropped(drop):
    step = Step(64, 2, 1, 16, 16, (60,), (1,), S=2, window=8, stride=8, drop=drop)
    assert_close([attend(step)], [step.expected()])


def test_at_most_four_launches():
    step = STEPS["pages of one window"]
    *arrays, counts = step.arguments()
    assert count_launches(lambda *arrays: decode.attend(step.config, *arrays, counts), *arrays) == 4


@pytest.mark.parametrize("compared", [0, 64])
def test_of_equal_importance_the_first_blocks_are_taken(monkeypatch, compared):
    # three chunks of two lanes each; the best of the lanes are compared one by one or all at once
    for name, number in (("_RANKED", 16), ("_LANE", 8), ("_COMPARED", compared)):
        monkeypatch.setattr(decode, name, number)
    step = Step(640, 2, 1, 16, 16, (639,), (1,), S=6, drop=("compressed", "sliding"))
    keys = np.array(step.key)
    keys[:, :] = keys[:, :1]
    keys[:, 20 * 16 : 22 * 16] *= 2 * np.sign(keys[0, 0, 0] @ np.array(step.query)[0, 0].sum(0))  # two stand out
    step.key = jnp.asarray(keys)
    assert_close([attend(step)], [step.expected()])


def test_a_window_between_two_splits_counts_for_both_its_blocks():
    step = Step(160, 1, 1, 16, 16, (158,), (1,), window=8, stride=4, S=5, drop=("compressed", "sliding"))
    keys, values = map(np.array, step.compressed())
    query = np.array(step.query)[0, 0, 0]
    keys[:, 15] = 80 * query / (query @ query)  # the last of its split, in blocks 3 and 4
    keys[:, 25] = 40 * query / (query @ query)  # next comes block 6
    step.compressed = lambda: (jnp.asarray(keys), jnp.asarray(values))
    assert_close([attend(step)], [step.expected()])


# what is poisoned with what -> the queries [B, Tq] that see it, of two rows with 4 queries each from place 62 on
SEEN_BY = {
    ("key", (0, 3), np.nan): [[0, 0, 0, 0], [0, 0, 0, 0]],  # neither selected nor near
    ("key", (0, 64), -np.inf): [[0, 0, 1, 1], [0, 0, 0, 0]],  # new, seen from its own place on
    ("value", (1, 65), np.nan): [[0, 0, 0, 0], [0, 0, 0, 1]],
    ("value", (0, 50), np.inf): [[1, 1, 1, 1], [0, 0, 0, 0]],
    ("compressed_key", (0, 3), np.inf): [[0, 1, 1, 1], [0, 0, 0, 0]],  # complete at place 63
    ("compressed_value", (1, 0), np.nan): [[0, 0, 0, 0], [1, 1, 1, 1]],
    ("query", (1, 2), np.nan): [[0, 0, 0, 0], [0, 0, 1, 0]],
}


@pytest.fixture(scope="module")
def finite():
    step = Step(80, 2, 1, 16, 16, (62, 62), (4, 4), Tq=4, S=2, init=0)
    return step, np.asarray(attend(step))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("what", SEEN_BY, ids=str)
def test_what_is_not_finite_reaches_those_who_see_it(finite, what):
    name, at, number = what
    step, clean = finite
    names = ("query", "key", "value", "compressed_key", "compressed_value")
    poisoned = np.array(dict(zip(names, step.arguments(), strict=False))[name])
    poisoned[at][..., 1] = number
    result = np.asarray(attend(step, **{name: jnp.asarray(poisoned)}))
    seen = np.array(SEEN_BY[what], bool)
    assert np.isnan(result[seen]).all()
    assert_same_bits([result[~seen]], [clean[~seen]])


def test_queries_that_do_not_fit():
    step = Step(64, 2, 1, 16, 16, (60, 61, 20), (4, 2, 5), Tq=4)
    output = np.asarray(attend(step, length=jnp.asarray([62, 63, 25], jnp.int32)))
    fits = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)  # to the last row more were appended than asked
    assert np.isnan(output[~fits]).all()
    assert_same_bits([output[fits]], [np.asarray(attend(step))[fits]])


def test_one_count_for_all_queries():
    step = STEPS["pages of one window"]
    *arrays, counts = step.arguments()
    traced = jax.jit(lambda *arrays: decode.attend(step.config, *arrays))(*arrays, jnp.int32(counts))
    assert_same_bits([traced], [attend(step)])


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_selection_by_what_is_not_finite():
    # the compressed branch is dropped, so that it is the list of blocks alone that comes from a NaN
    step = Step(80, 4, 2, 16, 16, (70, 70), (1, 1), S=2, drop=("compressed",))
    keys = np.array(step.arguments()[3])
    keys[0, 1, 1, 0] = np.nan
    result = np.asarray(attend(step, compressed_key=jnp.asarray(keys)))
    assert np.isnan(result).all(axis=-1).tolist() == [[[False, False, True, True]], [[False] * 4]]


def test_vmap_puts_rows_and_pools_together():
    step = STEPS["pages of one window"]
    *arrays, counts = step.arguments()
    shared = attend(step)

    def of(query, key, value, compressed_key, compressed_value, page_indices, start, count, gates):
        rows = key, value, compressed_key, compressed_value, page_indices, start, count, gates, counts
        return decode.attend(step.config, query, *rows)

    twice = jnp.stack([arrays[0], arrays[0] / 2])
    alone = attend(step, query=twice[1])
    both = jax.jit(jax.vmap(of, in_axes=(0, *[None] * 8)))(twice, *arrays[1:])
    assert_close(both, (shared, alone))  # more rows have fewer splits
    counted = jax.vmap(lambda query, count: decode.attend(step.config, query, *arrays[1:], count), in_axes=(0, None))
    assert_close(jax.jit(counted)(twice, jnp.int32(counts)), (shared, alone))
    all_twice = jax.tree.map(lambda x: jnp.stack([x, x]), tuple(arrays[1:]))
    assert_close(jax.jit(jax.vmap(of))(twice, *all_twice), (shared, alone))
