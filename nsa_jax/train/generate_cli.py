"""The command line: `nsa-generate`."""

import argparse
import codecs
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nsa_jax.train import command

_fail = functools.partial(command.fail, "nsa-generate")

# steps from one look at the text to the next
_STEPS = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes text that a trained model gives after a prompt to standard output, and what it took to standard error.

    Returns:
        0 when done, 1 after a message about what ended it, 2 after a message about bad input, 130 when interrupted.
    """
    if missing := command.missing_packages():
        return _fail(missing, 2)
    from jax.errors import JaxRuntimeError

    from nsa_jax.train import screen, signals

    screen.fill_standard_streams()
    with signals.hang_ups_ignored(), command.quiet_libraries():
        try:
            asked = _parser().parse_args(arguments)
            ready = _prepare(asked)
        except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
            return _fail(error, 2)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        try:
            _write(*ready, screen.open_console(sys.stdout), screen.open_console(sys.stderr))
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except JaxRuntimeError as error:
            return _fail(error, 1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog="nsa-generate", description="Text from a model that nsa-train has trained.")
    parser.add_argument("--run", required=True, help="folder of the run, such as runs/small-nsa")
    parser.add_argument("--prompt", default="", help="a file, or the text itself; the start of a document by default")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to generate, at most")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most probable token")
    parser.add_argument("--top-k", type=int, help="draw from so many of the most probable tokens")
    parser.add_argument("--top-p", type=float, help="draw from the fewest that together have this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk-size", type=int, default=2048, help="tokens of the prompt that are read at a time")
    parser.add_argument("--implementation", help="triton or xla; by device unless given")
    return parser


def _prepare(asked: argparse.Namespace):
    """(read, go on, tokens of the prompt, tokens asked for): the two programs, compiled."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from nsa_jax import checks
    from nsa_jax.linen import NSATransformer, generation
    from nsa_jax.train.sample import STOP_TOKENS

    tokens = checks.integer("tokens", asked.tokens, 1, checks.MOST_INT)
    chunk_size = checks.integer("chunk-size", asked.chunk_size, 1, checks.MOST_INT)
    top_k = None if asked.top_k is None else checks.integer("top-k", asked.top_k, 1)
    seed = checks.integer("seed", asked.seed, 0, 2**32 - 1)
    checks.resolve_implementation(asked.implementation)
    how = generation.sampling(jax.random.key(seed), asked.temperature, asked.top_p)
    prompt = _tokens(asked.prompt)
    config, params = _restore(asked.run)
    if asked.implementation is not None:
        config = dataclasses.replace(config, implementation=asked.implementation)
    model = generation.decoding(NSATransformer(config))
    rounds = -(-tokens // _STEPS)
    read = functools.partial(
        generation.prefill, model, capacity=prompt.shape[1] + rounds * _STEPS, chunk_size=chunk_size
    )
    go_on = functools.partial(generation.advance, model, num_tokens=_STEPS, top_k=top_k, stop_tokens=STOP_TOKENS)
    lengths = jnp.full(1, prompt.shape[1], jnp.int32)
    arrays = params, jnp.asarray(prompt), lengths
    progress = jax.eval_shape(read, *arrays)
    read = jax.jit(read).lower(*arrays).compile()
    go_on = jax.jit(go_on, donate_argnums=1).lower(params, progress, how).compile()
    return functools.partial(read, *arrays), lambda progress: go_on(params, progress, how), prompt.shape[1], tokens


def _tokens(prompt: str):
    """int32 [1, P], a document's beginning: of the file of that name, or the text."""
    import numpy as np

    from nsa_jax.train.packing import BEGIN

    try:
        is_file = Path(prompt).is_file()
    except (OSError, ValueError):  # too long for a name, or a character that no name has
        is_file = False
    text = Path(prompt).read_bytes() if is_file else prompt.encode("utf-8", errors="surrogateescape")
    return np.concatenate([[BEGIN], np.frombuffer(text, np.uint8)]).astype(np.int32)[None]


def _restore(folder: str):
    """The model's configuration and parameters, of the newest checkpoint of a run."""
    import contextlib

    import jax

    from nsa_jax.train.checkpoint import Checkpoints
    from nsa_jax.train.config import TrainConfig
    from nsa_jax.train.folder import CHECKPOINTS
    from nsa_jax.train.mesh import make_mesh
    from nsa_jax.train.step import abstract_state

    if not folder.strip():
        raise ValueError(f"run: expected a folder, got {folder!r}")
    path = Path(folder) / CHECKPOINTS
    if not path.is_dir():
        raise ValueError(f"run: expected a folder that nsa-train has left, with {CHECKPOINTS} in it, got {folder}")
    with contextlib.closing(Checkpoints(path, None, read_only=True)) as checkpoints:
        config = TrainConfig.of_identity(checkpoints.check()["identity"])
        state = checkpoints.restore(abstract_state(config, make_mesh(jax.local_devices()[:1])))
    return config.model, jax.device_put(state.params, jax.local_devices()[0])


def _write(read, go_on, prompt_tokens: int, tokens: int, text, notes) -> None:
    """Writes the text as it comes."""
    import jax
    from rich.text import Text

    from nsa_jax.train.sample import to_bytes
    from nsa_jax.train.screen import printable, say

    def now(clock):
        return max(time.perf_counter() - clock, 1e-9)

    clock = time.perf_counter()
    progress = jax.block_until_ready(read())
    reading = now(clock)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    clock, written, done = time.perf_counter(), 0, False
    while written < tokens and not done:
        generated, progress = go_on(progress)
        new, lengths, done = jax.device_get((generated.tokens[0], generated.lengths[0], progress.is_done[0]))
        new = new[: min(int(lengths), tokens - written)]
        written += len(new)
        part = decoder.decode(to_bytes(new), final=bool(done) or written >= tokens)
        text.print(Text(printable(part)), end="", soft_wrap=True)
        text.file.flush()
    took = now(clock)
    text.print()
    say(
        notes,
        f"prompt: {prompt_tokens} tokens, {prompt_tokens / reading:,.0f} tokens/s; "
        f"generated: {written} tokens, {written / took:,.0f} tokens/s, {1000 * took / max(written, 1):.2f} ms each",
    )


if __name__ == "__main__":
    sys.exit(main())
