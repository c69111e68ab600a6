"""Checkpoints on disk, through orbax, which writes beside the final place and renames: half a checkpoint is none."""

import contextlib
import functools
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from nsa_jax.train import hosts
from nsa_jax.train.folder import plain_path
from nsa_jax.train.step import TrainState

_UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of a run, the last two.

    Args:
        folder: where they are; made if missing.
        identity: JSON values by name, stored along; a checkpoint whose values differ is not loaded. None: of any run.
        read_only: whether nothing in the folder is changed; it may be that of a run that is at work.

    Attributes:
        unfinished: names of checkpoints that were half written when a run ended, which are removed.
    """

    def __init__(self, folder: Path, identity: dict[str, Any] | None, *, read_only: bool = False):
        self._folder = folder
        self._identity = identity
        self.unfinished = []
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = (path.name for path in folder.iterdir() if _UNFINISHED in path.name)
            self.unfinished = sorted(unfinished) if hosts.is_first() else []
        for name in self.unfinished:
            shutil.rmtree(folder / name, ignore_errors=True)
        # synchronous: the next step consumes the very buffers that are written
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else 2, enable_async_checkpointing=False, read_only=read_only
        )
        with contextlib.ExitStack() as stack:
            self._manager = ocp.CheckpointManager(stack.enter_context(plain_path(folder)), options=options)
            stack.callback(self._manager.close)
            self._open = stack.pop_all()

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Writes the state, unless its step is on disk already.

        Raises:
            OSError: it cannot be written; the checkpoints that were there are there still.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        run = {"identity": self._identity, "checksum": _checksum(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # orbax, tensorstore and json each raise their own
            for path in self._folder.glob(f"{step}{_UNFINISHED}*"):
                shutil.rmtree(path, ignore_errors=True)
            raise OSError(f"checkpoint: step {step} cannot be written to {self._folder} ({_line(error)})") from error

    def check(self) -> dict[str, Any]:
        """What is stored along with the newest checkpoint.

        Raises:
            ValueError: there is none, or it is of another run.
        """
        step = self.latest_step()
        if step is None:
            raise ValueError(f"checkpoint: none in {self._folder}; without --resume the run starts anew")
        run = self._read(step, run=ocp.args.JsonRestore())["run"]
        if not (isinstance(run, dict) and isinstance(run.get("identity"), dict) and "checksum" in run):
            raise self._unreadable(step, "it is not a checkpoint of nsa-train")
        for name in sorted({*run["identity"], *self._identity} if self._identity is not None else ()):
            there, here = run["identity"].get(name), self._identity.get(name)
            if there != here:
                raise ValueError(f"checkpoint: step {step} in {self._folder} has {name}={there!r}, this run {here!r}")
        return run

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, with the shapes and shardings of `like`.

        Raises:
            ValueError: there is none, it is of another run, it cannot be read, or it holds what is not finite.
        """
        checksum, step = self.check()["checksum"], self.latest_step()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = self._read(step, state=ocp.args.StandardRestore(abstract))["state"]
        if _checksum(state) != checksum:
            raise self._unreadable(step, "its checksum is another")
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state)):
            raise self._unreadable(step, "its parameters are not finite")
        return state

    def _read(self, step: int, **args):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # orbax, tensorstore and json each raise their own
            raise self._unreadable(step, _line(error)) from error

    def _unreadable(self, step: int, reason: str) -> ValueError:
        return ValueError(
            f"checkpoint: step {step} in {self._folder} cannot be read ({reason}); without it, the one before is used"
        )

    def close(self) -> None:
        """Waits for what is under way."""
        self._open.close()


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _checksum(state: TrainState) -> int:
    """CRC-32 of every array: the files of a checkpoint have none over their contents."""
    return functools.reduce(
        lambda crc, leaf: zlib.crc32(np.ascontiguousarray(hosts.whole(leaf)).data, crc), jax.tree.leaves(state), 0
    )
