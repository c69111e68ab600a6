"""One row: a provider compiled and timed in one direction."""

import math
import time
from collections.abc import Callable
from typing import Any

import compiled
import jax
import providers
import timing
from plan import Case, Row, Scale
from providers import Workload

_CACHE_BYTES = 128 * 2**20  # more than the L2 of any GPU there is
_MOST_COPIES = 8
_MOST_READ_COPIES = 24  # where little is read of large arrays
_MOST_BYTES = 2**34
_HOST_BOUND = 0.7  # of the time of a call
_CHAIN = 8  # calls


def row(row: Row, scale: Scale, implementation: str) -> dict[str, Any]:
    """Times a row: the fields of Timing, chained_ms, kernels, temp_bytes, query_bytes, flops, trace_s and compile_s.

    chained_ms is the time of a call among several inside one compiled program, taken where calls of their own are bound
    by the host; else it is None.
    """
    workload = providers.build(row.provider, row.case, scale, implementation)
    step, arguments = _step(workload, row.direction)
    program, seconds = _compile(step, arguments)
    sets = _copies(arguments, workload.facts.get("read_bytes"))
    effort = {"sample_seconds": scale.sample_seconds, "samples": scale.samples}
    taken = timing.time_calls(program, sets, jax.block_until_ready, **effort)
    result = {
        **taken._asdict(),
        "chained_ms": None,
        "flops": workload.work.of(row.direction),
        "query_bytes": workload.floats[0].nbytes,
        **compiled.facts(program),
        **workload.facts,
        **seconds,
    }
    if jax.default_backend() == "gpu" and taken.host_ms > _HOST_BOUND * taken.ms:
        result["chained_ms"] = chained_ms(step, sets, result["kernels"], **effort)
    return result


def first_step(case: Case, scale: Scale, implementation: str) -> dict[str, float]:
    """Seconds to the first result of forward and backward of the whole op in this process, in three shares."""
    workload = providers.build("nsa", case, scale, implementation)
    step, arguments = _step(workload, "both")
    jax.block_until_ready(arguments)
    program, seconds = _compile(step, arguments)
    begin = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return {**seconds, "run_s": time.perf_counter() - begin}


def _step(workload: Workload, direction: str) -> tuple[Callable, tuple]:
    """(function, arguments) of a direction. The backward ones take what the forward pass left, not its inputs."""
    function, floats, integers, d_output, *_ = workload

    def pullback(floats, integers):
        return jax.vjp(lambda *floats: function(*floats, *integers), *floats)

    def both(floats, integers, d_output):
        output, pull = pullback(floats, integers)
        return output, pull(d_output)

    if direction == "forward":
        return lambda floats, integers: function(*floats, *integers), (floats, integers)
    if direction == "both":
        return both, (floats, integers, d_output)
    _, pull = jax.jit(pullback)(floats, integers)
    # what a direction does not return is not computed
    wanted = {"backward": slice(None), "dq": slice(1)}[direction]
    return lambda pull, d_output: pull(d_output)[wanted], (pull, d_output)


def _compile(step: Callable, arguments: tuple) -> tuple[Any, dict[str, float]]:
    """The compiled program, and the seconds for tracing (Triton's kernels are compiled there) and for XLA's part."""
    begin = time.perf_counter()
    lowered = jax.jit(step).lower(*arguments)
    traced = time.perf_counter()
    program = lowered.compile()
    return program, {"trace_s": traced - begin, "compile_s": time.perf_counter() - traced}


def _copies(arguments: tuple, read: int | None) -> list[tuple]:
    """Argument sets of which so much is read, all unless told, that it exceeds the cache, as far as memory goes."""
    size = sum(x.nbytes for x in jax.tree.leaves(arguments))
    most = _MOST_COPIES if read is None else max(1, min(_MOST_READ_COPIES, _MOST_BYTES // size))
    copies = min(most, math.ceil(_CACHE_BYTES / max(read or size, 1)))
    return [arguments, *(jax.tree.map(lambda x: x.copy(), arguments) for _ in range(copies - 1))]


def chained_ms(step: Callable, sets: list[tuple], kernels: int, *, sample_seconds: float, samples: int) -> float | None:
    """Milliseconds per call where one program makes all calls in turn; None where the compiler merged some of them."""
    sets = [sets[i % len(sets)] for i in range(max(_CHAIN, len(sets)))]

    def chain(sets):
        results = []
        for arguments in sets:
            if results:
                arguments, results[-1] = jax.lax.optimization_barrier((arguments, results[-1]))
            results.append(step(*arguments))
        return results

    program, _ = _compile(chain, (sets,))
    if compiled.facts(program)["kernels"] < kernels * len(sets):
        return None
    taken = timing.time_calls(program, [(sets,)], jax.block_until_ready, sample_seconds=sample_seconds, samples=samples)
    return taken.ms / len(sets)
