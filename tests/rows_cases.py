"""What the tests in tests/rows share: drawn packings and queries, and plain Python's view of them."""

import numpy as np

LENGTH = 61


def random_ids(seed):
    """Ids [3, LENGTH] of runs of 1 to 16 tokens, a third of them padding; the last row is all padding."""
    rng = np.random.default_rng(seed)
    ids = np.stack([np.repeat(rng.integers(-2, 5, LENGTH), rng.integers(1, 17, LENGTH))[:LENGTH] for _ in range(3)])
    ids[2] = -1
    return ids.astype(np.int32)


def runs_of(row):
    """[(start, stop)] of the runs of equal ids."""
    runs = []
    for t, number in enumerate(row):
        if t and row[t - 1] == number:
            runs[-1] = (runs[-1][0], t + 1)
        else:
            runs.append((t, t + 1))
    return runs


def run_at(row, t):
    """(start, stop) of the run that holds token t."""
    return next((start, stop) for start, stop in runs_of(row) if start <= t < stop)
