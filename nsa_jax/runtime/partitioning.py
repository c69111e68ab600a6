"""Functions that launch kernels, partitioned over rows and heads where XLA partitions a program by itself.

XLA cannot look into a kernel: under plain `jax.jit` with sharded arrays it would gather all of them on every device.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence

import jax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array

# The axes of an array, a letter each. Its further axes are never sharded.
# b: rows. n: query heads, whose groups are never split. h: key and value heads. t: queries. s: keys. w: width.
# Capitals: axes that vmap puts in front.
QUERY = "btnw"
OF_QUERIES = "btn"
KEY = "bshw"
UNCLEAN = "bhs"
SIGHT = "bth"
ROWS = "b"

_GATHERED = {
    "t": "query, or what belongs to the queries, is sharded over tokens",
    "s": "key or value is sharded over tokens",
    "w": "query, key or value is sharded over its width",
}


def partitioned(function: Callable, arrays: tuple, axes: tuple, result_axes):
    """function(*arrays), each device doing the rows and groups of heads that it holds.

    Args:
        function: of pytrees of arrays, static but for them; it computes every row and every group for itself.
        arrays: what it gets.
        axes: letters, see above, for every array or for all of a pytree: a prefix of `arrays`.
        result_axes: likewise of what it returns.
    """
    leaves, tree = jax.tree.flatten(arrays)
    if not _may_be_partitioned(leaves):
        return function(*arrays)

    def of_leaves(*leaves):
        return function(*jax.tree.unflatten(tree, leaves))

    return _partitioned(of_leaves, _letters(axes, arrays), result_axes)(*leaves)


def _may_be_partitioned(arrays: list[Array]) -> bool:
    """Whether there are several devices, and no shard_map around that tells what each of them does."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return False
    return jax.device_count() > 1 or any(jax.typeof(x).sharding.mesh.size > 1 for x in arrays)


def _partitioned(function: Callable, letters: list[str], result_axes, mapped_axes: str = "") -> Callable:
    """`function` of arrays that have these letters behind the mapped axes, if mapped; those of results all are."""
    of_results = []  # letters

    def noting_letters(*arrays):
        results = function(*arrays)
        of_results[:] = [mapped_axes + axes for axes in _letters(result_axes, results)]
        return results

    def on_one_device(*arrays):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # what is partitioned knows no mesh
            return function(*arrays)

    def sharding_rule(mesh, arrays, results):
        return _rule(mesh, letters, of_results, [x.shape for x in arrays], [x.shape for x in results])

    def partition(mesh, arrays, results):
        from nsa_jax.runtime import compile_ahead

        compile_ahead.forget()  # kernels of all devices' arrays, which no device will run
        leaves, tree = jax.tree.flatten(results)
        shardings = _shardings(mesh, [*letters, *of_results], [*arrays, *leaves])
        return mesh, on_one_device, tree.unflatten(shardings[len(arrays) :]), tuple(shardings[: len(arrays)])

    @jax.custom_batching.custom_vmap
    def call(*arrays):
        by_rule = custom_partitioning(noting_letters)
        by_rule.def_partition(partition, sharding_rule=sharding_rule)
        return by_rule(*arrays)

    @call.def_vmap
    def map_over(axis_size, is_mapped, *arrays):
        mapped = jax.vmap(function, [0 if yes else None for yes in is_mapped], axis_size=axis_size)
        axis = chr(ord("A") + len(mapped_axes))
        of_arrays = [axis + axes if yes else axes for yes, axes in zip(is_mapped, letters, strict=True)]
        results = _partitioned(mapped, of_arrays, result_axes, axis + mapped_axes)(*arrays)
        return results, jax.tree.map(lambda _: True, results)

    return call


def _letters(axes, arrays) -> list[str]:
    """The letters of each leaf, cut to its axes."""
    leaves = []
    jax.tree.map(lambda letters, part: leaves.extend(letters[: x.ndim] for x in jax.tree.leaves(part)), axes, arrays)
    return leaves


def _rule(mesh: Mesh, letters: list[str], of_results: list[str], shapes, result_shapes) -> SdyShardingRule:
    """How shardings propagate: those of the same letter are the same, but for widths."""
    H = _size("h", letters, shapes)
    N = _size("n", letters, shapes)
    # an axis that would be cut in two, one part for the heads and one for the group, has no name
    together = H and N and H > 1 and all(H % size == 0 for size in mesh.shape.values())
    sizes = {}
    factors = {}
    if together and N == H:
        factors["n"] = "h"
    elif together:
        factors["n"], sizes["g"] = CompoundFactor("h", "g"), N // H
    number = itertools.count()

    def mapping(letters, shape):
        letters = letters.ljust(len(shape), ".")
        return ArrayMapping(*(f"free{next(number)}" if x in "w." else factors.get(x, x) for x in letters))

    return SdyShardingRule(
        tuple(map(mapping, letters, shapes)), tuple(map(mapping, of_results, result_shapes)), **sizes
    )


def _size(letter: str, letters: list[str], shapes) -> int:
    """The size of the axis of this letter, 0 if there is none."""
    return next((shape[axes.index(letter)] for axes, shape in zip(letters, shapes, strict=True) if letter in axes), 0)


def _shardings(mesh: Mesh, letters: list[str], arrays: Sequence[jax.ShapeDtypeStruct]) -> list[NamedSharding]:
    """What is done for the shardings that the partitioner proposes: those of rows and heads are taken."""
    proposed: dict[str, list[tuple[str, ...]]] = {}
    for axes, array in zip(letters, arrays, strict=True):
        spec = getattr(array.sharding, "spec", ())  # a program for one device, with a mesh around it, has none
        for letter, names in zip(axes, spec, strict=False):
            if names:
                proposed.setdefault(letter, []).append((names,) if isinstance(names, str) else tuple(names))
    shapes = [x.shape for x in arrays]
    taken: dict[str, tuple[str, ...]] = {}
    for letter in sorted(set("".join(letters)) - set("ntsw")):
        size = _size(letter, letters, shapes)
        asked = proposed.get(letter, []) + (proposed.get("n", []) if letter == "h" else [])
        used = {name for names in taken.values() for name in names}
        fitting = [names for names in asked if size % math.prod(mesh.shape[name] for name in names) == 0]
        taken[letter] = next((names for names in fitting if not used & set(names)), ())
        if asked and not fitting:
            _warn_of_uneven(letter, size, mesh, asked[0])
    taken["n"] = taken.get("h", ())
    for letter, what in _GATHERED.items():
        if letter in proposed:
            _warn(f"{what}, mesh axis {_quoted(proposed[letter][0])}: every device gathers it")
    return [
        NamedSharding(mesh, PartitionSpec(*(taken.get(letter) or None for letter in axes.ljust(x.ndim, "."))))
        for axes, x in zip(letters, arrays, strict=True)
    ]


def _warn_of_uneven(letter: str, size: int, mesh: Mesh, names: tuple[str, ...]) -> None:
    what, parts = ("heads", "groups of heads") if letter == "h" else ("rows", "rows")
    devices = math.prod(mesh.shape[name] for name in names)
    _warn(
        f"{what} are sharded over mesh axis {_quoted(names)}, and {size} {parts} cannot be divided among its {devices}"
        " devices: every device gathers them"
    )


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))


@functools.cache
def _warn(text: str) -> None:
    """Warns once in the life of the process."""
    warnings.warn(f"nsa_jax: {text}", stacklevel=2)
