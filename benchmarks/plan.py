"""What is measured: shapes, sweeps and the order of the rows, the most telling ones first."""

import dataclasses
import fnmatch
import itertools
from collections.abc import Sequence

SWEEPS = ("parts", "long", "original", "decode")
SELECTIONS = ("random", "topk", "realistic")


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: B rows of T tokens, N query heads, H key heads, width D, S blocks of block_size tokens per query.

    Attributes:
        window_size: tokens of the sliding branch.
        window, stride: of the compression.
        selection: "random", "topk" (of random data) or "realistic" (neighbouring tokens choose alike).
        queries: of a step of decoding, at the end of each row; 0 elsewhere.
        overlap: for "realistic", distinct blocks of 4 neighbouring tokens over the sum of their picks.
    """

    B: int
    T: int
    N: int
    H: int
    D: int
    S: int
    block_size: int
    window_size: int
    window: int
    stride: int
    dtype: str
    selection: str
    overlap: float
    queries: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure to be taken; `sweeps` are the tables that it appears in."""

    provider: str
    direction: str
    case: Case
    sweeps: tuple[str, ...]

    @property
    def key(self) -> str:
        """The row's name in the results."""
        case = self.case
        return f"{self.provider}/{self.direction}/B{case.B}-T{case.T}-W{case.window_size}/{case.selection}"


@dataclasses.dataclass(frozen=True)
class Scale:
    """The sizes of a run: the real ones, or tiny ones for a smoke test."""

    base: Case
    paper: tuple[int, int]
    parts_length: int
    long_lengths: tuple[int, ...]
    long_tokens: int
    original_lengths: tuple[int, ...]
    original_rows: int
    original_window: int
    decode_lengths: tuple[int, ...]
    decode_rows: tuple[int, ...]
    decode_tokens: int  # in a cache, at most
    prefill: tuple[int, int]  # tokens of a row, and of a chunk
    matmul: int
    copy_bytes: int
    sample_seconds: float
    samples: int


FULL = Scale(
    base=Case(
        B=1, T=65536, N=64, H=4, D=128, S=16, block_size=64, window_size=512, window=64, stride=64,
        dtype="bfloat16", selection="topk", overlap=0.41,
    ),
    paper=(32, 16), parts_length=65536, long_lengths=(65536, 8192, 32768, 131072, 16384, 4096), long_tokens=65536,
    original_lengths=(8192, 4096, 16384, 1024, 2048, 512, 256, 128), original_rows=4, original_window=64,
    decode_lengths=(65536, 131072, 4096, 16384), decode_rows=(32, 1, 8, 128), decode_tokens=2**23,
    prefill=(131072, 8192),
    matmul=8192, copy_bytes=2**31, sample_seconds=0.02, samples=7,
)  # fmt: skip
SMOKE = Scale(
    base=Case(
        B=1, T=128, N=4, H=2, D=16, S=4, block_size=16, window_size=32, window=16, stride=16,
        dtype="float32", selection="topk", overlap=0.41,
    ),
    paper=(8, 4), parts_length=128, long_lengths=(128, 64), long_tokens=128,
    original_lengths=(64, 32), original_rows=2, original_window=16,
    decode_lengths=(128, 64), decode_rows=(2, 1), decode_tokens=256, prefill=(64, 16),
    matmul=128, copy_bytes=2**16, sample_seconds=0.001, samples=3,
)  # fmt: skip


def rows(scale: Scale, sweeps: Sequence[str], patterns: Sequence[str], fla: bool) -> list[Row]:
    """The rows of some sweeps whose key matches a pattern (any, if there is none), a row of two sweeps once."""
    planned: dict[str, Row] = {}
    for sweep in sweeps:
        for row in _SWEEPS[sweep](scale, fla):
            known = planned.get(row.key)
            planned[row.key] = dataclasses.replace(known, sweeps=(*known.sweeps, sweep)) if known else row
    return [row for row in planned.values() if not patterns or any(fnmatch.fnmatch(row.key, p) for p in patterns)]


def _parts(scale: Scale, fla: bool) -> list[Row]:
    base = dataclasses.replace(scale.base, B=max(1, scale.long_tokens // scale.parts_length), T=scale.parts_length)
    window, stride = scale.paper
    paper = dataclasses.replace(base, window=window, stride=stride)
    chosen = {name: dataclasses.replace(base, selection=name) for name in SELECTIONS}
    backward = ("forward", "backward", "dq")
    planned = [
        ("ceiling-matmul", ("forward",), base),
        ("ceiling-copy", ("forward",), base),
        ("first-step", ("both",), base),
        ("dense", ("forward", "both", "backward"), base),
        ("nsa", ("forward", "both", "backward"), base),
        ("compressed", backward, base),
        ("selection", ("forward",), base),
        ("selected", backward, base),
        ("sliding", backward, base),
        ("cudnn-window", ("forward", "backward"), base),
        ("nsa", ("forward", "both"), chosen["realistic"]),
        ("selection", ("forward",), chosen["realistic"]),
        ("selected", backward, chosen["realistic"]),
        ("selected", ("forward", "backward"), chosen["random"]),
        ("compressed-paper", backward, paper),
        ("selection-paper", ("forward",), paper),
        ("nsa-paper", ("forward", "both"), paper),
    ]
    if fla:
        planned += [(name, directions, chosen["random"]) for name, directions in _FLA]
    return _listed("parts", planned)


_FLA = (
    ("fla-compressed", ("forward", "backward")),
    ("fla-topk", ("forward",)),
    ("fla-selected", ("forward", "backward")),
)


def _long(scale: Scale, fla: bool) -> list[Row]:
    planned = []
    for length in scale.long_lengths:
        case = dataclasses.replace(scale.base, B=max(1, scale.long_tokens // length), T=length)
        planned += [(name, ("forward", "both"), case) for name in ("nsa", "dense")]
        planned += [(name, ("forward", "backward"), case) for name in ("selected", "sliding", "compressed")]
        planned += [("selection", ("forward",), case)]
    return _listed("long", planned)


def _original(scale: Scale, fla: bool) -> list[Row]:
    planned = []
    for length in scale.original_lengths:
        case = dataclasses.replace(scale.base, B=scale.original_rows, T=length, window_size=scale.original_window)
        given = dataclasses.replace(case, selection="random")
        planned += [
            (name, ("forward", "both"), c) for name, c in (("nsa", case), ("nsa-given", given), ("dense", case))
        ]
    return _listed("original", planned)


def _decode(scale: Scale, fla: bool) -> list[Row]:
    window, stride = scale.paper
    planned = [("ceiling-copy", ("forward",), scale.base)]
    for length, batch in itertools.product(scale.decode_lengths, scale.decode_rows):
        if length * batch > scale.decode_tokens:
            continue
        case = dataclasses.replace(scale.base, B=batch, T=length, queries=1)
        paper = dataclasses.replace(case, window=window, stride=stride)
        planned += [("decode", ("forward",), case), ("decode-paper", ("forward",), paper)]
        planned += [(name, ("forward",), case) for name in ("decode-cudnn", "decode-xla")]
        planned += [("decode-4", ("forward",), dataclasses.replace(case, queries=4))]
    prefill = dataclasses.replace(scale.base, B=1, T=scale.prefill[0], queries=scale.prefill[1])
    return _listed(
        "decode", [*planned, ("prefill", ("forward",), prefill), ("dense", ("forward",), _without_queries(prefill))]
    )


def _without_queries(case: Case) -> Case:
    return dataclasses.replace(case, queries=0)


def _listed(sweep: str, planned) -> list[Row]:
    return [Row(name, direction, case, (sweep,)) for name, directions, case in planned for direction in directions]


_SWEEPS = {"parts": _parts, "long": _long, "original": _original, "decode": _decode}
