"""Rows whose tokens are shared over devices give what one device gives: outputs, gradients, and no more communication.

Expected is what "xla" gives for whole rows.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_bits, assert_small_error_ratio, branch_gates, count_launches, normal, qkv, row
from jax.sharding import PartitionSpec as P

import nsa_jax
from nsa_jax.linen import NativeSparseAttention, NSATransformer, TransformerConfig

# sums of float32 in another order
RATIO, GRADIENT_RATIO = 2e-5, 5e-5
ALL = ("compressed", "selected", "sliding")

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")


def mesh_of(**axes):
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    count = int(np.prod(list(axes.values())))
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto, devices=jax.devices()[:count])


class Problem:
    """A whole op on whole rows: float arrays, integer arrays, options."""

    def __init__(self, T, H, G, K, V, *, packed, gates=ALL, B=2, given=False, counts=False, **options):
        stride = options.get("compression_stride", options["block_size"])
        self.shape, self.options = (B, T), options
        self.floats = dict(zip(("query", "key", "value"), qkv(G, B, T, G * H, H, K, V), strict=True))
        self.floats |= {f"{name}_gate": branch_gates(G, B, T, G * H)[f"{name}_gate"] for name in gates}
        rng, self.integers, self.whole = np.random.default_rng(T), {}, ()
        if packed:
            # segments end inside of shares, in the middle of windows, and reach over several shares
            ids = [row(T, (-1, 2), (3, T // 4 + 3), (4, 1), (3, T // 2 + 1), (-1, 5), (6, T)), row(T, (0, T))]
            self.integers["segment_ids"] = jnp.asarray(np.stack(ids)[:B])
        if given:
            _, key, value = qkv(9, B, 1, 1, H, K, V, C=T // stride)
            self.floats |= {"compressed_key": key, "compressed_value": value}
            self.whole = ("compressed_key", "compressed_value")
            self.integers["block_indices"] = jnp.asarray(rng.integers(-1, 6, (B, T, H, 3)), jnp.int32)
        if counts:
            options["max_block_count"] = options.pop("block_counts")
            self.integers["block_counts"] = jnp.asarray(rng.integers(-1, 5, (B, T, H)), jnp.int32)
        self.cotangent = normal(3, B, T, G * H, V)

    def attend(self, implementation, floats, integers, **context):
        return nsa_jax.native_sparse_attention(
            **floats, **integers, **self.options, **context, implementation=implementation
        )

    def everything(self, implementation, floats, integers, cotangent, **context):
        """(output, gradients by name)."""
        attend = functools.partial(self.attend, implementation, integers=integers, **context)
        output, pullback = jax.vjp(lambda floats: attend(floats=floats), floats)
        return output, pullback(cotangent)[0]

    def expected(self):
        return jax.jit(functools.partial(self.everything, "xla"))(self.floats, self.integers, self.cotangent)

    def shared(self, implementation, order, shares):
        """(program, its arrays, the order of tokens) of devices that share the rows."""
        B, T = self.shape
        places = np.tile(np.arange(T) if order == "contiguous" else nsa_jax.zigzag_indices(T, shares), (B, 1))
        if order == "any":
            places = np.stack([np.random.default_rng(b).permutation(T) for b in range(B)])
        told = {"contiguous": None, "zigzag": "zigzag"}

        def program(floats, integers, cotangent, where):
            context = {"query_indices": told.get(order, where), "context_axis": "context"}
            return self.everything(implementation, floats, integers, cotangent, **context)

        tokens = P(None, "context")
        specs = {name: P() if name in self.whole else tokens for name in self.floats}
        mapped = jax.shard_map(
            program,
            mesh=mesh_of(context=shares),
            in_specs=(specs, tokens, tokens, tokens),
            out_specs=(tokens, specs),
        )
        floats = {name: x if name in self.whole else at(x, places) for name, x in self.floats.items()}
        integers = {name: at(x, places) for name, x in self.integers.items()}
        return jax.jit(mapped), (floats, integers, at(self.cotangent, places), jnp.asarray(places, jnp.int32)), places


def at(x, places):
    return jnp.asarray(np.take_along_axis(np.asarray(x), places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1))


def assert_shares_give_whole_rows(problem, implementation, order, shares):
    program, arrays, places = problem.shared(implementation, order, shares)
    results = program(*arrays)
    assert_same_bits(jax.tree.leaves(results), jax.tree.leaves(program(*arrays)))
    (output, gradients), (expected, expected_gradients) = results, problem.expected()
    assert_small_error_ratio([output], [at(expected, places)], RATIO)
    for name, gradient in gradients.items():
        whole = expected_gradients[name]
        wanted = whole if name in problem.whole else at(whole, places)
        assert_small_error_ratio([gradient], [wanted], GRADIENT_RATIO)


SMALL = {"block_size": 16, "block_counts": 3, "num_local_blocks": 1}
OVERLAP = {"block_size": 32, "block_counts": 2, "compression_window": 32, "compression_stride": 16}
CASES = {
    # order, shares, T, H, G, K, V
    "zigzag, l=32 d=16": ("zigzag", 2, (256, 2, 2, 16, 8), {"packed": True, "window_size": 40} | OVERLAP),
    "zigzag, heads one at a time": ("zigzag", 8, (256, 2, 1, 8, 8), {"packed": True, "window_size": 20} | SMALL),
    "zigzag, one segment": (
        "zigzag",
        8,
        (128, 1, 3, 16, 8),
        {"packed": False, "window_size": 20, "compression_window": 8, "compression_stride": 4} | SMALL,
    ),
    "zigzag, pieces shorter than a window": (
        "zigzag",
        8,
        (80, 1, 2, 8, 8),
        {"packed": True, "window_size": 9, "counts": True} | SMALL,
    ),
    "contiguous, windows at any token": (
        "contiguous",
        4,
        (108, 1, 2, 8, 12),
        {"packed": False, "window_size": 40, "compression_window": 8, "compression_stride": 8} | SMALL,
    ),
    "contiguous, only the tail of the share before": (
        "contiguous",
        4,
        (128, 2, 1, 8, 8),
        {"packed": True, "window_size": 33, "gates": ("compressed", "sliding")} | SMALL,
    ),
    "contiguous, a window over several shares": (
        "contiguous",
        8,
        (128, 1, 2, 8, 8),
        {"packed": False, "window_size": 60, "gates": ("sliding",)} | SMALL,
    ),
    "array": ("array", 4, (128, 1, 2, 8, 8), {"packed": True, "window_size": 20} | SMALL),
    "any, given blocks and compressed keys": (
        "any",
        4,
        (128, 2, 2, 8, 8),
        {"packed": True, "window_size": 0, "given": True, "counts": True, "compression_stride": 8} | SMALL,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_shares_give_what_whole_rows_give(name):
    order, shares, sizes, options = CASES[name]
    assert_shares_give_whole_rows(Problem(*sizes, **options), "xla", order, shares)


@pytest.mark.parametrize("order", ["zigzag", "any"])
def test_shares_give_what_whole_rows_give_by_the_kernels(order):
    problem = Problem(96, 1, 2, 8, 8, packed=True, window_size=20, B=1, **SMALL)
    assert_shares_give_whole_rows(problem, "triton", order, 2)


def test_a_token_outside_of_the_row_is_padding():
    """Packed rows: a place without a token is padding. One segment: who sees it gets NaN, since nobody told."""
    problem = Problem(64, 1, 2, 8, 8, packed=True, window_size=70, gates=("sliding",), B=1, **SMALL)
    places = np.random.default_rng(0).permutation(64)[None]
    told = np.where(places == 20, 64, places)
    ids = np.where(np.arange(64) == 20, -1, 5)[None]

    def attend(query, key, value, ids, where, packed):
        return nsa_jax.native_sparse_attention(
            query,
            key,
            value,
            sliding_gate=1.0,
            window_size=70,
            segment_ids=ids if packed else None,
            query_indices=where,
            context_axis="context",
            implementation="xla",
        )

    arrays = [problem.floats[name] for name in ("query", "key", "value")]
    shared = [at(x, places) for x in arrays]
    for packed in (True, False):
        program = jax.shard_map(
            functools.partial(attend, packed=packed),
            mesh=mesh_of(context=4),
            in_specs=P(None, "context"),
            out_specs=P(None, "context"),
        )
        given = jnp.full((1, 64), 5, jnp.int32)
        output = np.asarray(jax.jit(program)(*shared, given, jnp.asarray(told, jnp.int32)))
        hidden = places[0] == 20
        assert (output[0, hidden] == 0).all()
        if packed:
            whole = nsa_jax.sliding_window_attention(
                *arrays, window_size=70, segment_ids=jnp.asarray(ids, jnp.int32), implementation="xla"
            )
            assert_small_error_ratio([output], [at(whole, places)], RATIO)
        else:
            np.testing.assert_array_equal(np.isnan(output).all(axis=(2, 3))[0], places[0] > 20)


def test_only_keys_are_gathered():
    """Nothing of a query's size travels, and no more of keys than the algorithm needs."""
    B, T, H, G, K = 1, 256, 1, 16, 8
    options = {"packed": True, "window_size": 20, "B": B}
    problem = Problem(T, H, G, K, K, **options, **SMALL)
    program, arrays, _ = problem.shared("xla", "zigzag", 4)
    text = program.lower(*arrays).compile().as_text()
    moved = []
    for shapes, kind in re.findall(r" = (.*?) (all-gather|all-to-all|all-reduce|reduce-scatter)(?:-start)?\(", text):
        sizes = [
            int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
        ]
        moved.append((kind, sum(sizes)))
    assert {kind for kind, _ in moved} == {"all-gather", "all-to-all"}
    assert max(size for _, size in moved) == B * T * H * K
    large = [kind for kind, size in moved if size == B * T * H * K]
    # keys and values, anew for the backward pass, and their gradients
    assert (large.count("all-gather"), large.count("all-to-all")) == (4, 2)

    problem = Problem(T, H, G, K, K, **options, gates=("compressed", "sliding"), **SMALL)
    program, arrays, _ = problem.shared("xla", "contiguous", 4)
    gathered = re.findall(r"f32\[([\d,]*)\]\S* all-gather", program.lower(*arrays).compile().as_text())
    assert gathered and max(np.prod([int(n) for n in dims.split(",")]) for dims in gathered) == T // 16 * K


def test_nothing_gathered_is_kept_for_the_backward_pass():
    problem = Problem(256, 1, 2, 8, 8, packed=False, window_size=20, B=1, **SMALL)
    names, sizes = tuple(problem.floats), []

    def program(*floats):
        arrays = dict(zip(names, floats, strict=True))
        attend = functools.partial(problem.attend, "xla", integers={}, query_indices="zigzag", context_axis="context")
        output, pullback = jax.vjp(lambda arrays: attend(floats=arrays), arrays)
        sizes.extend(x.size for x in jax.tree.leaves(pullback) if jnp.issubdtype(x.dtype, jnp.floating))
        return output

    tokens = P(None, "context")
    jax.eval_shape(
        jax.shard_map(program, mesh=mesh_of(context=8), in_specs=tokens, out_specs=tokens), *problem.floats.values()
    )
    assert max(sizes) == 256 // 8 * 2 * 8  # the queries of a device; a row has 256 * 8 keys


def test_a_remat_around_it_runs_no_forward_kernel_twice():
    problem = Problem(64, 1, 1, 8, 8, packed=False, window_size=20, B=1, **SMALL)
    names = tuple(problem.floats)

    def launches(wrap):
        def loss(*floats):
            def attend(*floats):
                arrays = dict(zip(names, floats, strict=True))
                return problem.attend("triton", arrays, {}, query_indices="zigzag", context_axis="context")

            return jax.lax.psum(jnp.sum(wrap(attend)(*floats)), "context")

        tokens = P(None, "context")
        mapped = jax.shard_map(
            jax.value_and_grad(loss, tuple(range(len(names)))),
            mesh=mesh_of(context=2),
            in_specs=tokens,
            out_specs=(P(), tokens),
        )
        return count_launches(mapped, *problem.floats.values())

    keep = jax.checkpoint_policies.save_only_these_names(*nsa_jax.CHECKPOINT_NAMES)
    plain = launches(lambda f: f)
    assert launches(functools.partial(jax.checkpoint, policy=keep)) == plain
    assert launches(jax.checkpoint) > plain


def over(function, mesh, places, *, rows=None):
    """function(params, x, segment_ids, query_indices), rows over one mesh axis and tokens over the other."""
    tokens = P(rows, "context")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(P(), tokens, tokens, tokens), out_specs=(tokens, P()))

    def run(params, x, segment_ids):
        return jax.jit(mapped)(params, at(x, places), at(segment_ids, places), jnp.asarray(places, jnp.int32))

    return run


@pytest.mark.parametrize("order", ["zigzag", "any"])
@pytest.mark.parametrize("separate_keys", [False, True], ids=["shared", "separate"])
def test_layer(order, separate_keys):
    fields = {
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "compression": "mlp",
        "compression_window": 16,
        "compression_stride": 8,
        "separate_keys": separate_keys,
        "window_size": 20,
        "implementation": "xla",
    }
    T, B = 128, 2
    whole = NativeSparseAttention(**fields, **SMALL)
    layer = NativeSparseAttention(
        **fields, **SMALL, context_axis="context", context_order="zigzag" if order == "zigzag" else None
    )
    x, weights = normal(0, B, T, 12), normal(1, B, T, 12)
    ids = jnp.asarray(np.stack([row(T, (1, 37), (-1, 3), (2, T)), row(T, (0, T))]))
    params = layer.init(jax.random.key(0), x, ids)
    places = np.tile(nsa_jax.zigzag_indices(T, 4), (B, 1))
    if order == "any":
        places = np.stack([np.random.default_rng(b).permutation(T) for b in range(B)])

    def shared(params, x, ids, where):
        given = where if order == "any" else None

        def loss(params):
            output = layer.apply(params, x[..., :12], ids, query_indices=given)
            return jnp.sum(output * x[..., 12:]), output

        (_, output), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return output, gradients

    def loss(params):
        output = whole.apply(params, x, ids)
        return jnp.sum(output * weights), output

    (_, expected), expected_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    run = over(shared, mesh_of(data=2, context=4), places, rows="data")
    output, gradients = run(params, jnp.concatenate([x, weights], axis=-1), ids)
    assert_small_error_ratio([output], [at(expected, places)], RATIO)
    assert_small_error_ratio(*map(jax.tree.leaves, (gradients, expected_gradients)), GRADIENT_RATIO)


def test_transformer():
    config = TransformerConfig(
        vocab_size=11,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        block_size=16,
        block_counts=2,
        window_size=20,
        implementation="xla",
        context_axis="context",
        context_order="zigzag",
    )
    T = 64
    model = NSATransformer(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (1, T)), jnp.int32)
    ids = jnp.asarray(row(T, (1, 37), (2, T))[None])
    params = model.init(jax.random.key(0), tokens, ids)
    alone = NSATransformer(TransformerConfig(**vars(config) | {"context_axis": None, "context_order": None}))

    def gradients(model, total, params, tokens, ids):
        return jax.value_and_grad(lambda params: total(jnp.sum(jnp.sin(model.apply(params, tokens, ids)))))(params)

    expected = jax.jit(functools.partial(gradients, alone, lambda x: x))(params, tokens, ids)

    def shared(params, tokens, ids, where):
        loss, found = gradients(model, lambda x: jax.lax.psum(x, "context"), params, tokens, ids)
        return tokens, (loss, found)

    run = over(shared, mesh_of(context=4), nsa_jax.zigzag_indices(T, 4)[None])
    _, actual = run(params, tokens, ids)
    assert_small_error_ratio(*map(jax.tree.leaves, (actual, expected)), GRADIENT_RATIO)


def call(mesh_axis="context", **changes):
    """The op inside a shard_map over that axis, with these arguments."""
    query, key, value = qkv(0, 1, 32, 2, 1, 8, 8)
    options = {"sliding_gate": 1.0, "context_axis": "context", "implementation": "xla"} | changes

    def attend(query, key, value):
        return nsa_jax.native_sparse_attention(query, key[:, : options.pop("keys", None)], value, **options)

    tokens = P(None, mesh_axis)
    return jax.shard_map(attend, mesh=mesh_of(**{mesh_axis: 2}), in_specs=tokens, out_specs=tokens)(query, key, value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"mesh_axis": "rows"},
            ValueError,
            r"context_axis: expected an axis of the jax.shard_map that this is called in; there are \('rows',\), got",
        ),
        ({"context_axis": 3}, TypeError, r"context_axis: expected the name of a mesh axis or None, got 3 \(int\)"),
        ({"keys": 8}, ValueError, r"key: expected shape \[1, 16, H, 8\], got \[1, 8, 1, 8\]"),
        ({"query_indices": "zig"}, ValueError, "query_indices: expected an array, None or 'zigzag', got 'zig'"),
        (
            {"query_indices": np.zeros((1, 32), int)},
            ValueError,
            r"query_indices: expected shape \[1, 16\], got \[1, 32\]",
        ),
        (
            {
                "compressed_gate": 1.0,
                "compressed_key": np.zeros((1, 1, 1, 8), np.float32),
                "compressed_value": np.zeros((1, 1, 1, 8), np.float32),
                "block_size": 16,
            },
            ValueError,
            r"compressed_key: expected shape \[1, 2, H, 8\], got \[1, 1, 1, 8\]",
        ),
        (
            {"segment_ids": np.zeros((1, 32), int)},
            ValueError,
            r"segment_ids: expected shape \[1, 16\], got \[1, 32\]",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_bad_arguments_outside_of_shard_map():
    query, key, value = qkv(0, 1, 32, 2, 1, 8, 8)
    options = {"sliding_gate": 1.0, "implementation": "xla"}
    with pytest.raises(ValueError, match="called in; there is none, got 'context'"):
        nsa_jax.native_sparse_attention(query, key, value, context_axis="context", **options)
    with pytest.raises(ValueError, match="'zigzag' is the order of a context_axis, got context_axis=None"):
        nsa_jax.native_sparse_attention(query, key, value, query_indices="zigzag", **options)


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"context_order": "zigzag"}, (), "context_order: expected None, as context_axis is None"),
        ({}, (jnp.zeros((1, 32), jnp.int32),), "query_indices: expected None, as context_axis is None"),
        ({"context_axis": "c", "context_order": "any"}, (), "context_order: expected None or 'zigzag', got 'any'"),
    ],
)
def test_bad_fields(fields, arguments, message):
    layer = NativeSparseAttention(num_heads=1, head_dim=8, **fields)
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), normal(0, 1, 32, 8), None, query_indices=arguments[0] if arguments else None)
