"""Where the tests run, set before JAX and Triton are imported: on an NVIDIA GPU if there is one, else on the CPU."""

import os
import pathlib
import shutil

ON_GPU = pathlib.Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
if ON_GPU:
    # several test processes share the GPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    quick = "--xla_gpu_autotune_level=0"  # no test needs XLA's products tuned
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TRITON_INTERPRET"] = "1"
    quick = "--xla_backend_optimization_level=0"  # the time goes into compiling for the CPU, not into running there
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"

import jax  # noqa: E402 - after the environment is set
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # for shard_map
jax.config.update("jax_default_matmul_precision", "highest")  # XLA's float32 products, on a GPU tf32 unless told


def pytest_collection_modifyitems(items):
    if not ON_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def monkeypatch(monkeypatch):
    """pytest's, after whose setattr functions are traced again: JAX keeps traces of the public ops."""
    setattr_alone = monkeypatch.setattr

    def setattr_and_forget(*args, **kwargs):
        setattr_alone(*args, **kwargs)
        jax.clear_caches()

    monkeypatch.setattr = setattr_and_forget
    yield monkeypatch
    monkeypatch.undo()
    jax.clear_caches()


@pytest.fixture
def hopper():
    """Skips the test unless kernels are compiled for a Hopper GPU."""
    from nsa_jax.runtime import device

    if device.compute_capability() != 90:
        pytest.skip("needs a Hopper GPU")
