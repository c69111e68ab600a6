"""Checkpoints on disk, through orbax, which writes beside the final place and renames: half a checkpoint is none."""

import functools
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nsa_jax.train.step import TrainState


class Checkpoints:
    """The checkpoints of a run, the last two.

    Args:
        folder: where they are; made if missing.
        identity: JSON values by name, stored along; a checkpoint whose values differ is not loaded.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self._folder = folder
        self._identity = identity
        # synchronous: the next step consumes the very buffers that are written
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Writes the state, unless its step is on disk already."""
        step = int(state.step)
        if step == self.latest_step():
            return
        run = {"identity": self._identity, "checksum": _checksum(state)}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        )

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, with the shapes and shardings of `like`.

        Raises:
            ValueError: there is none, it is of another run, or it cannot be read.
        """
        step = self.latest_step()
        if step is None:
            raise ValueError(f"checkpoint: none in {self._folder}")
        run = self._read(step, run=ocp.args.JsonRestore())["run"]
        for name in sorted({*run["identity"], *self._identity}):
            there, here = run["identity"].get(name), self._identity.get(name)
            if there != here:
                raise ValueError(f"checkpoint: step {step} in {self._folder} has {name}={there!r}, this run {here!r}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = self._read(step, state=ocp.args.StandardRestore(abstract))["state"]
        if _checksum(state) != run["checksum"]:
            raise self._unreadable(step, "its checksum is another")
        return state

    def _read(self, step: int, **args):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # orbax, tensorstore and json each raise their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise self._unreadable(step, reason[:200]) from error

    def _unreadable(self, step: int, reason: str) -> ValueError:
        return ValueError(
            f"checkpoint: step {step} in {self._folder} cannot be read ({reason}); without it, the one before is used"
        )

    def close(self) -> None:
        """Waits for what is under way."""
        self._manager.close()


def _checksum(state: TrainState) -> int:
    """CRC-32 of every array: the files of a checkpoint have none over their contents."""
    return functools.reduce(lambda crc, leaf: zlib.crc32(np.asarray(leaf).data, crc), jax.tree.leaves(state), 0)
