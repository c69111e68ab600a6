"""Arithmetic that an op needs: floating-point operations over visible (query, key) pairs only."""

from typing import NamedTuple

from plan import Case


class Work(NamedTuple):
    """Floating-point operations of each way to run an op; 0 where it has none."""

    forward: int
    backward: int = 0
    dq: int = 0

    def of(self, direction: str) -> int:
        """Operations of a direction; "both" is forward and backward."""
        return self.forward + self.backward if direction == "both" else getattr(self, direction)


def attention(pairs: int, heads: int, width: int) -> Work:
    """Attention over `pairs` visible pairs of each of `heads` query heads, keys and values `width` wide.

    Forward: scores and output. Backward: scores again, d_probability, dq, dk, dv, each counted once. The pass dq
    does three of them.
    """
    product = 2 * pairs * heads * width
    return Work(forward=2 * product, backward=5 * product, dq=3 * product)


def selection(case: Case) -> Work:
    """Scores of the compressed keys."""
    return Work(2 * compressed_pairs(case) * case.N * case.D)


def together(*works: Work) -> Work:
    """The sum."""
    return Work(*map(sum, zip(*works, strict=True)))


def dense_pairs(case: Case) -> int:
    """Visible pairs per head of causal attention, over all rows."""
    return case.B * case.T * (case.T + 1) // 2


def sliding_pairs(case: Case) -> int:
    """Visible pairs per head of the sliding branch."""
    reach = min(case.window_size, case.T)
    return case.B * (reach * (reach + 1) // 2 + (case.T - reach) * reach)


def compressed_pairs(case: Case) -> int:
    """Visible pairs per head of the compressed branch: at p the windows c with c * stride + window - 1 <= p."""
    windows = max(0, (case.T - case.window) // case.stride + 1)
    first = case.T - case.window + 1  # queries that see window 0
    return case.B * (windows * first - case.stride * windows * (windows - 1) // 2)


def step_keys(case: Case) -> tuple[int, int, int]:
    """Keys that the queries of a step read of each kv head and row: compressed, selected, sliding."""
    blocks = min(case.S * case.block_size, case.T)
    windows = max(0, (case.T - case.window) // case.stride + 1)
    return windows, case.queries * blocks, min(case.window_size + case.queries - 1, case.T)


def selected_pairs(case: Case) -> int:
    """Visible pairs per head where every query takes as many of S blocks as there are, its own among them."""
    total = 0
    for block in range(-(-case.T // case.block_size)):
        tokens = min(case.block_size, case.T - block * case.block_size)
        total += tokens * (min(case.S, block + 1) - 1) * case.block_size + tokens * (tokens + 1) // 2
    return case.B * total
