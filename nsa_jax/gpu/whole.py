"""The three branches as one differentiable function.

Differentiated as one, the gates cost nothing: the kernels scale by them what is theirs of the output's cotangent, which
no branch then needs a copy of, and the delta of a branch's derivative is the gradient of its gate.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nsa_jax import branches
from nsa_jax.branches import Arrays, Config, PerBranch, Routing
from nsa_jax.checkpoint_names import name_residuals
from nsa_jax.gpu import backends, block_selection, interval, selected
from nsa_jax.gpu.branch import Branch
from nsa_jax.gpu.cleaning import clean
from nsa_jax.gpu.selected import Routes
from nsa_jax.gpu.selected import Spec as SelectedSpec
from nsa_jax.gpu.walks import choose
from nsa_jax.rows import sight
from nsa_jax.rows.intervals import sliding_intervals, window_intervals
from nsa_jax.rows.queries import locate
from nsa_jax.runtime import device, transforms

Array = jax.Array


class _Specs(NamedTuple):
    """What is static about each branch."""

    compressed: interval.Spec
    selected: SelectedSpec | interval.Spec  # an interval where every block is selected
    sliding: interval.Spec


class _Seen(NamedTuple):
    """Who sees whom, per branch that is computed."""

    compressed: interval.Seen | None = None
    selected: Routes | interval.Seen | None = None
    sliding: interval.Seen | None = None  # None also where the selected branch's kernels do the window


def attend(config: Config, arrays: Arrays, gates: PerBranch, routing: Routing) -> Array:
    """`native_sparse_attention` of checked arguments by the kernels: [B, Tq, N, V]."""
    return _attend(config, *transforms.vary_together((arrays, gates, routing)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(config: Config, arrays: Arrays, gates: PerBranch, routing: Routing) -> Array:
    return _forward(config, arrays, gates, routing, keep=False)[0]


def _in_one_pass(config: Config, gates: PerBranch) -> bool:
    """Whether the selected branch's kernels do the sliding branch too."""
    both = gates.selected is not None and gates.sliding is not None
    return both and not config.selects_all and selected.does_sliding(config.window_size, config.block_size)


def _specs(config: Config, arrays: Arrays, gates: PerBranch, routing: Routing) -> _Specs:
    query, key, value, compressed_key, _ = arrays
    precision, window = device.dot_precision(), config.window_size if _in_one_pass(config, gates) else 0
    of_interval = backends.interval(query, value, config.scale)
    slots = 0 if compressed_key is None else compressed_key.shape[1]

    def nearest(branch, keys):
        keys = min(keys, key.shape[1])
        reach = keys if routing.query_indices is None else 0
        return interval.Spec(branch, config.scale, precision, reach, keys, of_interval)

    if config.selects_all:
        of_selected = nearest("selected", key.shape[1])
    else:
        backend = backends.selected(query, value, config.scale, config.block_size, window)
        of_selected = selected.Spec(config.block_size, config.scale, precision, window, backend)
    return _Specs(
        interval.Spec("compressed", config.scale, precision, 0, slots, of_interval),
        of_selected,
        nearest("sliding", config.window_size),
    )


class _Kernels:
    """The branches by the kernels, see `branches.Implementation`; seen and total gather what they leave behind."""

    def __init__(self, config: Config, arrays: Arrays, gates: PerBranch, routing: Routing, keep: bool):
        self.config, self.gates, self.routing, self.keep = config, gates, routing, keep
        self.row = locate(routing.segment_ids, routing.query_indices, *arrays.key.shape[:2])
        self.specs = _specs(config, arrays, gates, routing)
        query, key, value, compressed_key, compressed_value = arrays
        self.query = query
        self.key, self.value, self.unclean = clean(key, value)
        self.compressed_key, self.compressed_value = compressed_key, compressed_value
        if compressed_key is not None:
            self.compressed_key, self.compressed_value, self.compressed_unclean = clean(
                compressed_key, compressed_value
            )
        self.seen, self.total, self._near = _Seen(), None, None

    @property
    def arrays(self) -> Arrays:
        """What the backward pass takes: the arrays, cleaned."""
        return Arrays(self.query, self.key, self.value, self.compressed_key, self.compressed_value)

    def compressed(self) -> tuple[Array, Array]:
        intervals = window_intervals(self.row, self.config.window, self.config.stride)
        seen = interval.see(self.row, intervals, self.compressed_unclean)
        self.seen = self.seen._replace(compressed=seen)
        keys = self.compressed_key, self.compressed_value
        return name_residuals("compressed", *interval.forward(self.query, *keys, seen, self.specs.compressed)[:2])

    def select(self, lse: Array) -> Array:
        config = self.config
        block_indices = block_selection.select(
            *jax.lax.stop_gradient((self.query, self.compressed_key, lse)),
            self.row,
            block_counts=self.routing.block_counts,
            max_block_count=config.max_block_count,
            block_size=config.block_size,
            window=config.window,
            stride=config.stride,
            num_init_blocks=config.num_init_blocks,
            num_local_blocks=config.num_local_blocks,
            scale=config.scale,
        )
        return checkpoint_name(block_indices, "nsa_block_indices")

    def selected(self, block_indices: Array, block_counts: Array | None, lse: Array | None) -> tuple[Array, Array]:
        spec = self.specs.selected
        choice = choose(self.row, block_indices, block_counts, spec.block_size, spec.window_size)
        routes = selected.route(self.query, self.value, self.unclean, choice, spec)
        if lse is not None:
            routes = routes._replace(sight=sight.taint(routes.sight, branches.tainted(lse, self.key.shape[2])))
        self.seen = self.seen._replace(selected=routes)
        chosen, *near = selected.forward(self.query, self.key, self.value, routes, spec)
        self._near = near[0] if near else None
        return name_residuals("selected", *chosen)

    def all_selected(self) -> tuple[Array, Array]:
        seen = interval.see(self.row, sliding_intervals(self.row, self.row.length), self.unclean)
        self.seen = self.seen._replace(selected=seen)
        output, lse, _ = interval.forward(self.query, self.key, self.value, seen, self.specs.selected)
        return name_residuals("selected", output, lse)

    def sliding(self, outputs: PerBranch) -> tuple[Array | None, Array]:
        if self._near is not None:
            return name_residuals("sliding", *self._near)
        seen = interval.see(self.row, sliding_intervals(self.row, self.config.window_size), self.unclean)
        self.seen = self.seen._replace(sliding=seen)
        others = tuple(pair for pair in zip(outputs, self.gates, strict=True) if pair[0] is not None)
        addends = interval.Addends(self.gates.sliding, others, self.keep) if others else None
        output, lse, total = interval.forward(self.query, self.key, self.value, seen, self.specs.sliding, addends)
        if total is not None:
            self.total = checkpoint_name(total, "nsa_output")
        return (None, lse) if output is None else name_residuals("sliding", output, lse)


def _forward(config: Config, arrays: Arrays, gates: PerBranch, routing: Routing, keep: bool):
    """(gated sum, arrays, outputs, lse, seen); unless `keep` an output may be lacking."""
    kernels = _Kernels(config, arrays, gates, routing, keep)
    outputs, lses = branches.run(kernels, config, arrays, gates, routing)
    total = kernels.total
    if total is None:
        total = branches.gated_sum(gates, outputs, arrays.query, arrays.value)
    return total, kernels.arrays, outputs, lses, kernels.seen


def _attend_forward(config, arrays, gates, routing):
    total, cleaned, outputs, lses, seen = _forward(config, arrays, gates, routing, keep=True)
    return total, (cleaned, gates, routing, outputs, lses, seen)


def _attend_backward(config, residuals, d_output):
    arrays, gates, routing, outputs, lses, seen = residuals
    query, key, value, compressed_key, compressed_value = arrays
    specs = _specs(config, arrays, gates, routing)
    kept = PerBranch(
        *(
            None if gate is None else Branch(output, lse, gate.astype(jnp.float32))
            for output, lse, gate in zip(outputs, lses, gates, strict=True)
        )
    )
    deltas, d_query, d_shared, d_compressed = PerBranch(), None, [], (None, None)

    def of_interval(branch, keys, d_query):
        """(d_query to which the branch's is added, d_key and d_value, deltas)."""
        kept_of, seen_of, spec = (getattr(values, branch) for values in (kept, seen, specs))
        arguments = query, *keys, d_output, kept_of
        d_query, delta = interval.backward_query(*arguments, seen_of, spec, d_query)
        d_keys = interval.backward_key_value(*arguments, delta, seen_of, spec)
        return d_query, d_keys, deltas._replace(**{branch: delta})

    if kept.compressed is not None:
        d_query, d_compressed, deltas = of_interval("compressed", (compressed_key, compressed_value), d_query)
    elif compressed_key is not None:
        d_compressed = jnp.zeros_like(compressed_key), jnp.zeros_like(compressed_value)
    for branch in ("sliding", "selected") if config.selects_all else ("sliding",):
        if getattr(seen, branch) is not None:
            d_query, d_keys, deltas = of_interval(branch, (key, value), d_query)
            d_shared.append(d_keys)
    if kept.selected is not None and not config.selects_all:
        both = [kept.selected, kept.sliding] if _in_one_pass(config, gates) else [kept.selected]
        arguments = query, key, value, d_output, both
        d_query, in_pass = selected.backward_query(*arguments, seen.selected, specs.selected, d_query)
        d_shared.append(selected.backward_key_value(*arguments, in_pass, seen.selected, specs.selected))
        deltas = deltas._replace(selected=in_pass[0])
        if len(both) == 2:
            deltas = deltas._replace(sliding=in_pass[1])

    d_key, d_value = (_sum([pair[i] for pair in d_shared], like) for i, like in enumerate((key, value)))
    d_gates = jax.tree.map(lambda delta, gate: delta.astype(gate.dtype), deltas, gates)
    return Arrays(d_query, d_key, d_value, *d_compressed), d_gates, None


_attend.defvjp(_attend_forward, _attend_backward)


def _sum(terms: list[Array], like: Array) -> Array:
    """The sum of the terms, in float32, rounded to the dtype of `like`, whose shape zero terms give zeros of."""
    if len(terms) == 1:
        return terms[0]
    return sum((term.astype(jnp.float32) for term in terms), jnp.zeros(like.shape, jnp.float32)).astype(like.dtype)
