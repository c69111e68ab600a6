"""Compiles kernels side by side: when the first is wanted, all that are known.

JAX lowers the kernels of a program one after another, and each waits there for Triton. What a program will launch is
known once it is traced, and the compilers of Triton and XLA leave the interpreter's lock to other threads.
"""

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Hashable

_lock = threading.Lock()
_turn = threading.Lock()  # among the threads that compile: who is not in a compiler
_noted: dict[Hashable, Callable[[], object]] = {}
_known: set[Hashable] = set()  # noted once and compiled since
_thread = threading.local()


def install(triton_lib) -> None:
    """Makes jax_triton's module `triton_lib` give up its turn while Triton's compiler works."""
    compile_code = triton_lib.compile_ttir_inplace

    def compile_aside(*arguments):
        with aside():
            return compile_code(*arguments)

    triton_lib.compile_ttir_inplace = compile_aside


def note(key: Hashable, compile_kernel: Callable[[], object]) -> None:
    """Makes a kernel known.

    Args:
        key: what the result depends on; of those with the same key one is compiled, once in the life of the process.
        compile_kernel: compiles it, leaving the result where its launch will find it.
    """
    if not _works():
        with _lock:
            if key not in _known:
                _noted[key] = compile_kernel


def forget() -> None:
    """Forgets what was noted and is not compiled yet."""
    if not _works():
        with _lock:
            _noted.clear()


def finish() -> None:
    """Compiles all that were noted since the last time, and returns when that is done.

    What goes wrong is left to the launch, which meets it again.
    """
    if _works():
        return
    with _lock:
        waiting = list(_noted.values())
        _known.update(_noted)
        _noted.clear()
    if len(waiting) < 2:  # the launch itself is as quick
        return
    workers = min(len(waiting), os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers, initializer=_begin_work) as pool:
        for compile_kernel in waiting:
            pool.submit(_in_turn, compile_kernel)


def _in_turn(compile_kernel: Callable[[], object]) -> None:
    """Python's share of the work one after the other: threads that struggle for the interpreter take twice as long."""
    with _turn:
        compile_kernel()


@contextlib.contextmanager
def aside():
    """Around what needs no interpreter: the next thread begins meanwhile."""
    if not _works():
        yield
        return
    _turn.release()
    try:
        yield
    finally:
        _turn.acquire()


def _begin_work() -> None:
    _thread.works = True


def _works() -> bool:
    """Whether this thread is one that compiles."""
    return getattr(_thread, "works", False)
