"""What kernels are compiled for: the GPU, its capability, the version of PTX, the precision of products.

Environment:
    NSA_JAX_COMPUTE_CAPABILITY: the architecture to compile for (80, 90, ...) where no GPU is present; 90 unless set.
        Read when a function is traced.
"""

import functools
import importlib.util
import os

import jax

HOW_TO_INSTALL = "install nsa-jax on Linux with its extra cuda13 or cuda12"


@functools.cache
def triton_missing() -> str | None:
    """What keeps Triton kernels from being built here, or None."""
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed; {HOW_TO_INSTALL}" if missing else None


def on_nvidia_gpu() -> bool:
    """Whether arrays go to an NVIDIA GPU unless placed elsewhere."""
    device = jax.config.jax_default_device
    platform = device if isinstance(device, str) else device.platform if device else jax.default_backend()
    if platform not in ("gpu", "cuda"):
        return False
    return "rocm" not in getattr(jax.devices("gpu")[0].client, "platform_version", "").lower()


@functools.cache
def gpu_capability() -> int:
    """The compute capability of the GPU that is present: 80, 90, ..."""
    major, minor = jax.devices("gpu")[0].compute_capability.split(".")
    return 10 * int(major) + int(minor)


def compute_capability() -> int:
    """The compute capability that kernels are compiled for: the GPU's, else NSA_JAX_COMPUTE_CAPABILITY, else 90."""
    asked = os.environ.get("NSA_JAX_COMPUTE_CAPABILITY")
    if asked is None:
        return gpu_capability() if jax.default_backend() == "gpu" else 90
    if not asked.isdigit() or int(asked) < 80:
        raise ValueError(f"NSA_JAX_COMPUTE_CAPABILITY: expected a number such as 80 or 90, got {asked!r}")
    return int(asked)


def capability_of(kernel) -> int:
    """The compute capability that `kernel` will run on; 0 in Triton's interpreter."""
    return 0 if is_interpreted(kernel) else compute_capability()


def is_interpreted(kernel) -> bool:
    """Whether `kernel` was imported with TRITON_INTERPRET=1."""
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(kernel, InterpretedFunction)


def multiprocessors() -> int:
    """Multiprocessors of the GPU; those of an H100 where no GPU is present."""
    cores = getattr(jax.devices()[0], "core_count", None) if jax.default_backend() == "gpu" else None
    return cores or 132


_PTX_VERSIONS = {100: 86, 101: 86, 120: 87, 103: 88, 121: 88}
_OLDEST_PTX_VERSION, _NEWEST_PTX_VERSION = 80, 90
_DESCRIPTOR_PTX_VERSION = 86  # CUDA 12.7


def ptx_version(capability: int, descriptors: bool = False) -> int:
    """The lowest PTX version that knows what is used: the ptxas of the CUDA that JAX uses must accept it.

    Args:
        capability: of the architecture.
        descriptors: whether the kernel reads through tensor descriptors.
    """
    version = _OLDEST_PTX_VERSION if capability <= 90 else _PTX_VERSIONS.get(capability, _NEWEST_PTX_VERSION)
    return max(version, _DESCRIPTOR_PTX_VERSION) if descriptors else version


def dot_precision() -> str:
    """How float32 products are done: exactly, or as jax.default_matmul_precision says."""
    asked = str(jax.config.jax_default_matmul_precision).lower()
    return {"tensorfloat32": "tf32", "high": "tf32", "tf32_tf32_f32": "tf32", "tf32_tf32_f32_x3": "tf32x3"}.get(
        asked, "ieee"
    )
