"""One compiled program for each call outside `jax.jit`, where JAX would otherwise compile and start every operation."""

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from nsa_jax.runtime.transforms import vary

Array = jax.Array


class _Static(NamedTuple):
    """What a program is compiled for, beside the shapes and dtypes of its arrays.

    Attributes:
        tree: the structure of the arguments.
        values: (type, value) of each argument that is no array, None where there is an array. The types tell 1 from
            True and 1.0, which are equal.
        compute_capability: NSA_JAX_COMPUTE_CAPABILITY, which JAX does not know of.
    """

    tree: jax.tree_util.PyTreeDef
    values: tuple[tuple[type, object] | None, ...]
    compute_capability: str | None


def one_program(function: Callable) -> Callable:
    """`function`, run as one compiled program where it is called outside `jax.jit`.

    Arrays anywhere in the arguments, which may be pytrees, are traced. All else is static: it must be hashable, and the
    function is traced and compiled once for each value. NumPy arrays become JAX arrays, so int64 becomes int32 unless
    jax_enable_x64 is set: check or convert them first.

    Inside `jax.jit`, and whatever else traces a whole function, it is inlined when that is lowered; `vmap`, `remat` and
    its policies, `scan`, `shard_map` and `export` see what is in it. JAX keeps the trace: who changes what the function
    reads, as tests do, calls `jax.clear_caches`.
    """
    program = _compiled(function)
    return functools.wraps(function)(lambda *args, **kwargs: program(*_split(args, kwargs)))


def one_program_each(function: Callable) -> Callable:
    """As `one_program`, and the derivative is one compiled program too; reverse mode only.

    JAX differentiates what `one_program` gives as well, but spends host time on each array that the derivative keeps,
    of which attention has dozens. Here JAX is not shown them.
    """
    program = _compiled(function)
    with_derivative = functools.lru_cache(functools.partial(_with_derivative, function, program))

    @functools.wraps(function)
    def call(*args, **kwargs):
        static, arrays = _split(args, kwargs)
        return with_derivative(static)(*arrays) if _is_traced(arrays) else program(static, arrays)

    return call


def _compiled(function: Callable) -> Callable:
    """The function of (_Static, arrays), compiled."""

    def program(static, arrays):
        return _call(function, static, arrays)

    program.__name__ = function.__name__  # for profiles
    return jax.jit(program, static_argnums=0, inline=True)


def _split(args: tuple, kwargs: dict) -> tuple[_Static, list[Array]]:
    """Arguments as (_Static, arrays), which `_call` takes."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    values = tuple(None if ok else (type(leaf), leaf) for leaf, ok in zip(leaves, is_array, strict=True))
    arrays = [leaf for leaf, ok in zip(leaves, is_array, strict=True) if ok]
    return _Static(tree, values, os.environ.get("NSA_JAX_COMPUTE_CAPABILITY")), arrays


def _call(function: Callable, static: _Static, arrays: Sequence[Array]):
    arrays = iter(arrays)
    leaves = [next(arrays) if value is None else value[1] for value in static.values]
    args, kwargs = jax.tree.unflatten(static.tree, leaves)
    return function(*args, **kwargs)


def _is_traced(arrays: Sequence[Array]) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in arrays)


class _Hidden:
    """A value that JAX does not look into: a pytree without leaves."""

    def __init__(self, value):
        self.value = value


jax.tree_util.register_pytree_node(_Hidden, lambda hidden: ((), hidden), lambda hidden, _: hidden)


class _Residuals:
    """A pytree of arrays without those that are known anyway, and without repeats: a program copies what it returns.

    Attributes:
        new: the arrays that are not known.
        recipe: static; the structure, and of each leaf the index among the known arrays and then the new ones.
    """

    def __init__(self, new: Sequence[Array], recipe: tuple[jax.tree_util.PyTreeDef, tuple[int, ...]]):
        self.new, self.recipe = new, recipe

    @classmethod
    def of(cls, tree, known: Sequence[Array]) -> "_Residuals":
        leaves, structure = jax.tree.flatten(tree)
        arrays = list(known)
        index = {id(x): i for i, x in enumerate(arrays)}
        for leaf in leaves:
            if index.setdefault(id(leaf), len(arrays)) == len(arrays):
                arrays.append(leaf)
        return cls(arrays[len(known) :], (structure, tuple(index[id(leaf)] for leaf in leaves)))

    def restore(self, known: Sequence[Array]):
        """The pytree that `of` was given."""
        arrays, (structure, indices) = [*known, *self.new], self.recipe
        return jax.tree.unflatten(structure, [arrays[i] for i in indices])


jax.tree_util.register_pytree_node(
    _Residuals,
    lambda residuals: (residuals.new, residuals.recipe),
    lambda recipe, new: _Residuals(new, recipe),
)


def _zeros(aval) -> Array:
    return vary(jnp.zeros(aval.shape, aval.dtype), aval.manual_axis_type.varying)


def _with_derivative(function: Callable, program: Callable, static: _Static) -> Callable:
    """The program of these static arguments as a custom_vjp function of the arrays."""
    forward, backward = _derivative(function)

    def run(*arrays):
        return program(static, arrays)

    def keep(*primals):
        arrays, wanted = [x.value for x in primals], tuple(x.perturbed for x in primals)
        results, residuals = forward(static, wanted, arrays)
        kept = residuals, [*arrays, *jax.tree.leaves(results)]
        # what no transformation traces is constant to all of them
        kept = kept if _is_traced(jax.tree.leaves(kept)) else _Hidden(kept)
        return results, (kept, _Hidden(wanted))

    def pull(kept, cotangents):
        kept, wanted = kept
        cotangents, structure = jax.tree.flatten(cotangents, is_leaf=lambda x: isinstance(x, SymbolicZero))
        zeros = tuple(x.aval if isinstance(x, SymbolicZero) else None for x in cotangents)
        given = [x for x, zero in zip(cotangents, zeros, strict=True) if zero is None]
        gradients = iter(backward((structure, zeros), *(kept.value if isinstance(kept, _Hidden) else kept), given))
        return tuple(next(gradients) if is_wanted else None for is_wanted in wanted.value)

    for part in (run, keep, pull):  # JAX asks for it at each call
        part.__signature__ = inspect.signature(part)
    differentiable = jax.custom_vjp(run)
    differentiable.defvjp(keep, pull, symbolic_zeros=True)
    return differentiable


@functools.cache
def _derivative(function: Callable) -> tuple[Callable, Callable]:
    """The two compiled programs of a function's derivative.

    The first gives the results and the _Residuals for the gradients of the wanted arrays, the second these gradients.
    """

    def forward(static, wanted, arrays):
        def of_wanted(*some):
            some = iter(some)
            return _call(function, static, [next(some) if yes else x for x, yes in zip(arrays, wanted, strict=True)])

        results, pullback = jax.vjp(of_wanted, *(x for x, yes in zip(arrays, wanted, strict=True) if yes))
        return results, _Residuals.of(pullback, [*arrays, *jax.tree.leaves(results)])

    def backward(static, residuals, known, cotangents):
        structure, zeros = static
        cotangents = iter(cotangents)
        cotangents = [next(cotangents) if zero is None else _zeros(zero) for zero in zeros]
        return residuals.restore(known)(jax.tree.unflatten(structure, cotangents))

    forward.__name__, backward.__name__ = function.__name__, f"{function.__name__}_gradient"
    return (
        jax.jit(forward, static_argnums=(0, 1), inline=True),
        jax.jit(backward, static_argnums=0, inline=True),
    )
