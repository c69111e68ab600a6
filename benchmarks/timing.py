"""Device time of a call, by a host clock around many asynchronous calls; no framework is known here.

A device runs the calls it is sent in order, so waiting for the last waits for all. A sample is as many calls as last
sample_seconds, which hides the one wait in it. Each call takes the next of several argument sets, so that inputs small
enough to stay in a cache from call to call do not.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_WARM_SAMPLES = 10
_MOST_CALLS = 5000
_MOST_SECONDS = 4.0  # for the samples of one figure
_FEWEST_SAMPLES = 3
_BURST = 8  # calls; a queue takes more before it makes the host wait
_BURST_MS = 2.0


class Timing(NamedTuple):
    """Milliseconds per call.

    Attributes:
        ms: median over the samples.
        iqr_ms: between the quartiles of the samples.
        host_ms: what the host needs to send one call: where it is about `ms`, the device waits for the host.
        samples, calls: how many samples, and calls in each.
    """

    ms: float
    iqr_ms: float
    host_ms: float
    samples: int
    calls: int


def time_calls(
    call: Callable[..., Any],
    argument_sets: Sequence[tuple],
    wait: Callable[[Any], Any],
    *,
    sample_seconds: float,
    samples: int,
) -> Timing:
    """Times call(*arguments).

    Args:
        call: sends work to the device and returns its result, perhaps before it is there.
        argument_sets: one or more, taken in turn.
        wait: waits until a result is there.
        sample_seconds: how long a sample is to last.
        samples: how many; fewer, but at least three, where a call takes seconds.
    """
    turns = itertools.cycle(argument_sets)

    def run(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            result = call(*next(turns))
        wait(result)
        return time.perf_counter() - begin

    run(1)
    calls, seconds = 1, run(1)
    while seconds < sample_seconds and calls < _MOST_CALLS:
        calls = min(_MOST_CALLS, max(calls + 1, round(1.2 * calls * sample_seconds / max(seconds, 1e-9))))
        seconds = run(calls)
    # an idle device raises its clock only after a while
    warm = time.perf_counter() + _WARM_SAMPLES * sample_seconds
    while time.perf_counter() < warm:
        run(calls)
    count = max(_FEWEST_SAMPLES, min(samples, int(_MOST_SECONDS / seconds)))
    taken = sorted(1e3 * run(calls) / calls for _ in range(count))
    first, ms, third = statistics.quantiles(taken, n=4, method="inclusive")
    # each call in the queue may hold results of its own: long ones are sent alone
    return Timing(ms, third - first, _host_ms(call, turns, wait, _BURST if ms < _BURST_MS else 1), count, calls)


def _host_ms(call, turns, wait, calls: int) -> float:
    def burst() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            result = call(*next(turns))
        sent = time.perf_counter() - begin
        wait(result)
        return 1e3 * sent / calls

    return statistics.median(burst() for _ in range(_FEWEST_SAMPLES))
