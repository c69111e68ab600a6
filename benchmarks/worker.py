"""The process that measures nsa_jax and its peers in JAX. Requests: see `answer`."""

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import jax
import measure
import protocol
import worker_request

import nsa_jax

_PACKAGES = ("jax", "jaxlib", "jax_triton", "triton", "numpy")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to {"kind": "hello"}, or to a row, see `worker_request`."""
    if request["kind"] == "hello":
        return _hello()
    row, scale, implementation = worker_request.decode(request)
    if row.provider == "first-step":
        return measure.first_step(row.case, scale, implementation)
    return measure.row(row, scale, implementation)


def _hello() -> dict[str, Any]:
    device = jax.devices()[0]
    versions = {name: _version(name) for name in _PACKAGES}
    runtime = getattr(device.client, "platform_version", "")
    return {
        "platform": jax.default_backend(),
        "device": device.device_kind,
        "versions": versions,
        "runtime": " ".join(runtime.split()),
        "source": _source_digest(),
    }


def _version(package: str) -> str:
    """As the package itself says: the one that is imported need not be the one that is installed."""
    try:
        return importlib.import_module(package).__version__
    except ImportError:
        return "not installed"


def _source_digest() -> str:
    """Twelve digits that change with the ops' and kernels' source."""
    digest = hashlib.sha256()
    for folder in (*nsa_jax.__path__, *importlib.util.find_spec("nsa_jax.kernels").submodule_search_locations):
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # else a CPU runs independent calls at once
    protocol.serve(answer)
