"""Two programs of a Hopper GPU (sm_90) that run as one cluster: their walks, and the ring into which both copy.

A kernel that calls `meet` is launched in clusters of two (nsa_jax/runtime/jax_triton_gluon.py): the lowest bit of
program_id is a program's rank in its pair. Triton knows nothing of it, and the addresses of barriers and tiles that it
gives to assembly lack the rank, which those of a cluster have in their upper eight bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .ptx import arrive_in_pair, wait_in_pair


@gluon.jit
def rank_in_pair():
    return gl.program_id(0) % 2


@gluon.aggregate
class Walk:
    """The walk of a unit: pointers, where its entries begin there, and its steps."""

    begins: gl.tensor
    members: gl.tensor
    at: gl.tensor
    steps: gl.tensor

    @gluon.jit
    def step(self, i, SHAPE: gl.constexpr):
        """Step i, or the last: the first key, and who wants the block."""
        begins, members = self.begins + self.at, self.members + self.at
        i = gl.maximum(gl.minimum(i, self.steps - 1), 0)
        return gl.load(begins + i // SHAPE.PIECES) + i % SHAPE.PIECES * SHAPE.KEYS, gl.load(members + i // SHAPE.PIECES)


@gluon.aggregate
class Walks:
    """Pointers to the walks of all units, see `walk_in_pairs` of ../block_lists.py."""

    begins: gl.tensor
    members: gl.tensor
    counts: gl.tensor

    @gluon.jit
    def of(self, pair, rank, SHAPE: gl.constexpr):
        """The `Walk` of a unit."""
        at = (pair.to(gl.int64) * 2 + rank) * SHAPE.ENTRIES
        return Walk(self.begins, self.members, at, gl.load(self.counts + pair) * SHAPE.PIECES)


@gluon.aggregate
class PairedRing:
    """Slots for keys and values, and per slot a barrier for "full", one for "empty", one for "empty in the other".

    The n-th block that is put into the ring lies in slot n % STAGES.
    """

    keys: gl.shared_memory_descriptor
    values: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.jit
    def wait_empty(self, n):
        mbarrier.wait(self.empty.index(n % self.STAGES), ((n // self.STAGES) & 1) ^ 1)

    @gluon.jit
    def wait_full(self, n, rank):
        wait_in_pair(self.full.index(n % self.STAGES), (n // self.STAGES) & 1, rank)

    @gluon.jit
    def release(self, n, rank):
        arrive_in_pair(self.empty.index(n % self.STAGES), rank)


@gluon.jit
def allocate(key, value, WARPS: gl.constexpr, SHAPE: gl.constexpr):
    """The ring of a program, whose slots so many warps give back."""
    STAGES: gl.constexpr = SHAPE.STAGES
    keys = gl.allocate_shared_memory(key.dtype, [STAGES, 1, SHAPE.KEYS, SHAPE.K], key.layout)
    values = gl.allocate_shared_memory(value.dtype, [STAGES, 1, SHAPE.KEYS, SHAPE.V], value.layout)
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    ready = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPS)
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    gl.barrier()
    return PairedRing(keys, values, full, empty, ready, STAGES)
