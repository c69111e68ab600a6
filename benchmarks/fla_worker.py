"""The process that measures flash-linear-attention (PyTorch, Triton), with an interpreter of its own if need be.

It imports no JAX. Its selection is random: up to S distinct blocks per query, drawn evenly.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import arithmetic
import protocol
import timing
import torch
import worker_request
from fla.ops.nsa.compression import parallel_nsa_compression
from fla.ops.nsa.parallel import parallel_nsa, parallel_nsa_topk
from fla.ops.utils.pooling import mean_pooling
from plan import Case

_DEVICE = "cuda"
_CHUNK = 1024  # tokens at a time


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a row, see `worker_request`."""
    row, scale, _ = worker_request.decode(request)
    torch.manual_seed(0)
    step, work = _step(row.provider, row.direction, row.case)
    taken = timing.time_calls(
        step, [()], lambda _: torch.cuda.synchronize(), sample_seconds=scale.sample_seconds, samples=scale.samples
    )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "fla-core")}
    return {**taken._asdict(), "chained_ms": None, "flops": work, "versions": versions}


def _normal(case: Case, heads: int, **options) -> torch.Tensor:
    kind = getattr(torch, case.dtype)
    return torch.randn(case.B, case.T, heads, case.D, device=_DEVICE, dtype=kind, **options)


def _step(provider: str, direction: str, case: Case) -> tuple[Callable[[], Any], int]:
    """What to time, and its floating-point operations."""
    query = _normal(case, case.N, requires_grad=True)
    key, value = (_normal(case, case.H, requires_grad=True) for _ in range(2))
    if provider == "fla-selected":
        indices, counts, keys = _random_blocks(case)
        work = arithmetic.attention(keys, case.N // case.H, case.D)

        def run():
            return parallel_nsa(
                query, key, value, block_indices=indices, block_counts=counts, block_size=case.block_size
            )

        return _directed(run, (query, key, value), direction), work.of(direction)

    key, value = (mean_pooling(x.detach(), case.block_size).requires_grad_() for x in (key, value))
    options = {"TK": case.T, "block_size": case.block_size}

    def compressed():
        return parallel_nsa_compression(q=query, k=key, v=value, scale=case.D**-0.5, **options)

    if provider == "fla-compressed":
        work = arithmetic.attention(arithmetic.compressed_pairs(case), case.N, case.D)
        return _directed(lambda: compressed()[0], (query, key, value), direction), work.of(direction)
    with torch.no_grad():
        lse = compressed()[1]

    @torch.no_grad()
    def select():
        return parallel_nsa_topk(q=query, k=key, lse=lse, block_counts=case.S, scale=case.D**-0.5, **options)

    return select, arithmetic.selection(case).forward


def _directed(run: Callable[[], torch.Tensor], inputs: tuple, direction: str) -> Callable[[], Any]:
    if direction == "forward":
        return torch.no_grad()(run)
    output = run()
    d_output = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, inputs, d_output, retain_graph=True)


def _random_blocks(case: Case) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(indices [B, T, H, S], counts [B, T, H], visible keys over all queries)."""
    blocks = -(-case.T // case.block_size)
    candidate = torch.arange(blocks, device=_DEVICE)
    chosen = []
    for first in range(0, case.T, _CHUNK):
        own = torch.arange(first, min(first + _CHUNK, case.T), device=_DEVICE) // case.block_size
        priority = torch.rand(case.B, len(own), case.H, blocks, device=_DEVICE)
        priority.masked_fill_((candidate > own[:, None])[None, :, None, :], -1.0)
        priority, block = priority.topk(min(case.S, blocks), dim=-1)
        chosen.append(block.masked_fill(priority < 0, blocks).sort(-1)[0])
    indices = torch.cat(chosen, dim=1)
    real = indices < blocks
    token = torch.arange(case.T, device=_DEVICE)[None, :, None, None]
    keys = (token - indices * case.block_size + 1).clamp(0, case.block_size) * real
    return indices.masked_fill(~real, 0), real.sum(-1), int(keys.sum())


if __name__ == "__main__":
    protocol.serve(answer)
