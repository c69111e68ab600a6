"""Checkpoints: the round trip, and what is refused."""

import gc
import shutil

import jax
import numpy as np
import pytest
from train_cases import CONFIG

from nsa_jax.train.checkpoint import Checkpoints
from nsa_jax.train.mesh import make_mesh
from nsa_jax.train.step import init_state

MESH = make_mesh(jax.devices()[:1])
IDENTITY = {"hidden_size": 16, "branches": ["compressed"], "learning_rate": 1e-2, "mlp_size": None}


@pytest.fixture(scope="module")
def state():
    return init_state(CONFIG, MESH)


@pytest.fixture
def folder(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    for step in (3, 6, 9):
        checkpoints.save(
            state.replace(step=state.step + step, params=jax.tree.map(lambda x, s=step: x + s, state.params))
        )
    checkpoints.close()
    return tmp_path


def restore(folder, state, identity=IDENTITY):
    checkpoints = Checkpoints(folder, identity)
    try:
        return checkpoints.restore(state)
    finally:
        checkpoints.close()


def test_round_trip_is_exact_and_two_are_kept(folder, state):
    restored = restore(folder, state)
    assert int(restored.step) == 9
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(lambda there, here: np.testing.assert_array_equal(there, here + 9), restored.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)
    assert sorted(path.name for path in folder.iterdir() if path.name.isdigit()) == ["6", "9"]


def test_saving_a_step_twice_writes_once(folder, state):
    checkpoints = Checkpoints(folder, IDENTITY)
    before = (folder / "9").stat().st_mtime_ns
    checkpoints.save(state.replace(step=state.step + 9))
    assert (folder / "9").stat().st_mtime_ns == before
    checkpoints.close()


def test_nothing_to_restore(tmp_path, state):
    with pytest.raises(ValueError, match="checkpoint: none in"):
        restore(tmp_path, state)


def test_another_run_is_refused(folder, state):
    with pytest.raises(ValueError, match=r"step 9 in .* has hidden_size=16, this run 32"):
        restore(folder, state, IDENTITY | {"hidden_size": 32})


# orbax leaves coroutines behind when a read fails
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_refused(folder, state, damage):
    files = [path for path in (folder / "9" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    contents = bytearray(largest.read_bytes())
    if damage == "missing":
        largest.unlink()
    else:
        contents[len(contents) // 2] ^= 0x10
        largest.write_bytes(contents[: len(contents) // 2] if damage == "truncated" else contents)
    with pytest.raises(ValueError, match=r"checkpoint: step 9 in .* cannot be read") as error:
        restore(folder, state)
    assert "\n" not in str(error.value)
    del error
    gc.collect()


def test_a_half_written_one_is_not_seen(folder, state):
    shutil.copytree(folder / "9", folder / "12.orbax-checkpoint-tmp")
    assert int(restore(folder, state).step) == 9
