"""A ring of slots in shared memory that one partition of a program fills and others use.

The n-th thing that is put into the ring lies in slot n % STAGES. A slot has two barriers: one completes each time that
the slot is full, the other each time that it is empty again.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .ptx import arrive


@gluon.aggregate
class Ring:
    """The barriers of a ring. A kernel derives its own ring from it, which has the slots' memory too.

    Attributes:
        full, empty: barriers, one per slot.
        STAGES: slots.
    """

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.jit
    def slot(self, n):
        """The slot of the n-th thing."""
        return n % self.STAGES

    @gluon.jit
    def filled(self, n):
        """The barrier that completes when the n-th thing is there."""
        return self.full.index(n % self.STAGES)

    @gluon.jit
    def wait_empty(self, n):
        """Waits until the slot of the n-th thing is free for it."""
        mbarrier.wait(self.empty.index(n % self.STAGES), ((n // self.STAGES) & 1) ^ 1)

    @gluon.jit
    def expect(self, n, BYTES: gl.constexpr):
        """So many bytes will be copied into the slot of the n-th thing, which is free. Gives the barrier for copies."""
        barrier = self.filled(n)
        mbarrier.expect(barrier, BYTES)
        return barrier

    @gluon.jit
    def fill(self, n):
        """Tells, once for this warp, that it has written its share of the n-th thing."""
        arrive(self.filled(n))

    @gluon.jit
    def wait_full(self, n):
        """Waits until the n-th thing is there."""
        mbarrier.wait(self.full.index(n % self.STAGES), (n // self.STAGES) & 1)

    @gluon.jit
    def release(self, n):
        """Tells, once for this warp, that it needs the n-th thing no longer."""
        arrive(self.empty.index(n % self.STAGES))


@gluon.jit
def allocate_barriers(STAGES: gl.constexpr, FILLERS: gl.constexpr, USERS: gl.constexpr):
    """The barriers of a ring, full and empty: so many arrivals fill a slot, so many warps give it back.

    `fence_async_shared()` and `gl.barrier()` must follow before anyone waits for them.
    """
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=FILLERS)
        mbarrier.init(empty.index(i), count=USERS)
    return full, empty
