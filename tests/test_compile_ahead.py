"""Kernels compiled side by side: each once, together, and an error of one stops no other."""

import threading
import time

import pytest

from nsa_jax.runtime import compile_ahead


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch):
    monkeypatch.setattr(compile_ahead, "_noted", {})
    monkeypatch.setattr(compile_ahead, "_known", set())
    monkeypatch.setattr(compile_ahead.os, "cpu_count", lambda: 4)


def test_all_at_once():
    meeting = threading.Barrier(3, timeout=30)  # broken unless three wait at the same time
    arrived = []

    def compile_kernel():
        with compile_ahead.aside():
            arrived.append(meeting.wait())

    for key in range(3):
        compile_ahead.note(key, compile_kernel)
    compile_ahead.finish()
    assert sorted(arrived) == [0, 1, 2]


def test_one_at_a_time_but_for_what_is_aside():
    busy = threading.Lock()
    failed = []

    def compile_kernel():
        for pause in (0.002, 0.001):
            if not busy.acquire(blocking=False):
                failed.append("two at a time")
                return
            time.sleep(pause)
            busy.release()
            with compile_ahead.aside():
                time.sleep(pause)

    for key in range(4):
        compile_ahead.note(key, compile_kernel)
    compile_ahead.finish()
    assert not failed


def test_an_error_aside_takes_the_turn_again(monkeypatch):
    monkeypatch.setattr(compile_ahead.os, "cpu_count", lambda: 1)
    turns = []

    def compile_kernel():
        try:
            with compile_ahead.aside():
                turns.append(compile_ahead._turn.locked())
                raise RuntimeError("no such register")
        finally:
            turns.append(compile_ahead._turn.locked())

    for key in range(2):
        compile_ahead.note(key, compile_kernel)
    compile_ahead.finish()
    assert turns == [False, True, False, True]
    assert not compile_ahead._turn.locked()


def test_aside_is_nothing_where_nothing_is_compiled_ahead():
    with compile_ahead.aside(), compile_ahead.aside():
        pass


def test_once_in_the_life_of_the_process():
    compiled = []
    for keys in (("a", "b", "a"), ("b", "a"), ("b", "c", "d")):
        for key in keys:
            compile_ahead.note(key, lambda key=key: compiled.append(key))
        compile_ahead.finish()
    assert sorted(compiled) == ["a", "b", "c", "d"]


def test_one_alone_is_left_to_its_launch():
    compiled = []
    compile_ahead.note("a", lambda: compiled.append("a"))
    compile_ahead.finish()
    assert compiled == []


def test_errors_are_left_to_the_launch():
    compiled = []

    def fails():
        raise RuntimeError("no such register")

    compile_ahead.note("a", fails)
    compile_ahead.note("b", lambda: compiled.append("b"))
    compile_ahead.finish()
    assert compiled == ["b"]


def test_compiling_notes_and_awaits_nothing():
    done = []

    def compile_kernel():
        compile_ahead.note("inner", lambda: done.append("inner"))
        compile_ahead.finish()
        done.append("outer")

    for key in range(2):
        compile_ahead.note(key, compile_kernel)
    compile_ahead.finish()
    compile_ahead.finish()
    assert done == ["outer", "outer"]
