"""The lists of the best blocks of select_blocks.py, and how candidates get into them.

A list entry is a block and its rank, as in ../select_blocks.py. While candidates go in, each warp goes round as often
as its own tokens need (`or_of_thread`). That is sound while nothing in there makes warps wait for others, which
tests/test_lowering.py checks: the reductions are within a warp.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..select_blocks import KEPT, NONE
from .ptx import or_of_thread

LIST_WARPS = gl.constexpr(8)  # warps that keep lists


@gluon.constexpr_function
def by_token(tokens, groups):
    """[tokens, groups, 32]: tokens across warps, then registers; groups in registers, their members across lanes.

    If there are fewer tokens than warps, the last warps do what the first do.
    """
    bits = max(tokens, LIST_WARPS.value).bit_length() - 1
    token = [[1 << i, 0, 0] if 1 << i < tokens else [0, 0, 0] for i in range(bits)]
    registers = [[0, 1 << i, 0] for i in range(groups.bit_length() - 1)] + token[3:]
    return gl.DistributedLinearLayout(
        registers, [[0, 0, 1 << i] for i in range(5)], token[:3], [], [tokens, groups, 32]
    )


@gluon.jit
def same(x, layout: gl.constexpr):
    """x in another layout, in which each thread has what it has now."""
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def numbered(count: gl.constexpr, layout: gl.constexpr):
    """0 to count as [1, count / 32, 32]."""
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    group = gl.arange(0, count // 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    return group[None, :, None] * 32 + lane[None, None, :]


@gluon.jit
def _first_best(rank, block, axis: gl.constexpr):
    """The largest rank along an axis, and the smallest of the blocks that have it."""
    best = gl.max(rank, axis, keep_dims=True)
    chosen = gl.min(gl.where(rank == best, block, NONE), axis, keep_dims=True)
    return best, chosen


@gluon.jit
def _compare(rank, block, list_rank, list_block):
    """The best candidate of each token, the entry of its list that it would displace, whether it does so; and whether
    that of any token of this warp does."""
    layout: gl.constexpr = list_rank.type.layout
    best, chosen = _first_best(rank, block, 2)
    best, chosen = same(best, layout), same(chosen, layout)
    worst = gl.min(gl.min(list_rank, 2, keep_dims=True), 1, keep_dims=True)
    evicted = gl.where(list_rank == worst, list_block, -1)
    evicted = gl.max(gl.max(evicted, 2, keep_dims=True), 1, keep_dims=True)
    better = (best > worst) | ((best == worst) & (best >= 0) & (chosen < evicted))
    return best, chosen, evicted, better, or_of_thread(better.to(gl.int32)) != 0


@gluon.jit
def start_lists(room, own, near, forced, all_fit, entry):
    """Ranks and blocks of lists with the forced blocks, or with all where all fit; entry [1, LIST / 32, 32]."""
    fixed = entry < gl.where(all_fit, own + 1, gl.minimum(forced, room))[:, None, None]
    near, own, all_fit = near[:, None, None], own[:, None, None], all_fit[:, None, None]
    by_priority = gl.where(entry < near, own - entry, entry - near)
    list_block = gl.where(fixed, gl.where(all_fit, entry, by_priority), NONE + entry)
    return gl.where(fixed | (entry >= room[:, None, None]), KEPT, -1), list_block


@gluon.jit
def insert(rank, block, list_rank, list_block):
    """The lists [TOKENS, LIST / 32, 32] after candidates, `rank` [TOKENS, M, 32] (negative: none) of block [1, M, 32].

    The smaller block of equal ranks stays. Only the best candidate of each lane stands for election; once none of these
    is better than what is in the list, those that were not elected before follow.
    """
    lane_rank, lane_block = _first_best(rank, block, 1)  # [TOKENS, 1, 32]
    best, chosen, evicted, better, more = _compare(lane_rank, lane_block, list_rank, list_block)
    while more:
        while more:
            displaced = better & (list_block == evicted)
            list_rank = gl.where(displaced, best, list_rank)
            list_block = gl.where(displaced, chosen, list_block)
            elected = same(gl.where(better, chosen, NONE), lane_block.type.layout)
            lane_rank = gl.where(lane_block == elected, -1, lane_rank)
            best, chosen, evicted, better, more = _compare(lane_rank, lane_block, list_rank, list_block)
        rank = gl.where((lane_rank < 0) & (block == lane_block), -1, rank)
        lane_rank, lane_block = _first_best(rank, block, 1)
        best, chosen, evicted, better, more = _compare(lane_rank, lane_block, list_rank, list_block)
    return list_rank, list_block


@gluon.jit
def ascending(list_block, entry, TOKENS: gl.constexpr, LIST: gl.constexpr):
    """Where each entry stands in its list once the blocks, which are distinct, are in ascending order, empty ones
    last."""
    blocks = gl.reshape(list_block, [TOKENS, LIST])
    after = (gl.reshape(entry + gl.zeros_like(list_block), [TOKENS, LIST]) + 1) % LIST
    smaller = gl.zeros_like(blocks)
    other = blocks
    for _ in gl.static_range(1, LIST):
        other = gl.gather(other, after, 1)
        smaller += (other < blocks).to(gl.int32)
    return same(gl.reshape(smaller, list_block.type.shape), list_block.type.layout)
