"""The training loop: steps, evaluation and checkpoints."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.console import Console

from nsa_jax.linen import NSATransformer
from nsa_jax.train import report
from nsa_jax.train.checkpoint import Checkpoints
from nsa_jax.train.config import TrainConfig
from nsa_jax.train.documents import split
from nsa_jax.train.metrics import MetricsLog, plot_runs
from nsa_jax.train.packing import batch_rows, in_batches, pack
from nsa_jax.train.sample import generate
from nsa_jax.train.step import bits_per_byte, init_state, learning_rate, make_mesh, make_sums, make_train_step, put

# steps from one look at the loss to the next: looking waits for the device
LOG_INTERVAL = 10


class Run:
    """A run that is ready to train: data packed, parameters initialised or restored.

    Args:
        config: the run.
        documents: the text.
        folder: where checkpoints and metrics go; made if missing.
        devices: over which the rows of a batch are divided.
        resume: whether to go on from the newest checkpoint in the folder.
        console: where to report.

    Attributes:
        state: the TrainState as it is now.

    Raises:
        ValueError: the batch does not divide over the devices, the folder holds a run and resume is False, or there is
            no checkpoint to resume that fits and can be read.
    """

    def __init__(
        self,
        config: TrainConfig,
        documents: Sequence[bytes],
        folder: Path,
        *,
        devices: Sequence[jax.Device],
        resume: bool,
        console: Console,
    ):
        if config.batch_size % len(devices):
            raise ValueError(f"batch_size: expected a multiple of the {len(devices)} devices, got {config.batch_size}")
        self._config, self._folder, self._console = config, folder, console
        parts = split(documents, config.held_out, config.seed)
        training, held_out = (pack(part, config.sequence_length) for part in parts)
        count = len(held_out.tokens)
        self._rows = training
        self._held_out = held_out.take(batch_rows(0, min(config.eval_rows, count), count, config.seed))
        identity = {**config.identity(), "data_checksum": training.checksum()}
        self._checkpoints = Checkpoints(folder / "checkpoints", identity)
        if not resume and self._checkpoints.latest_step() is not None:
            raise ValueError(f"out: {folder} holds a run; go on with --resume, or name another folder with --out")
        self._mesh = make_mesh(list(devices))
        self.state = init_state(config, self._mesh)
        if resume:
            self.state = self._checkpoints.restore(self.state)
        self._step = make_train_step(config, self._mesh)
        self._sums = jax.jit(make_sums(config, self._mesh))

    def train(self) -> bool:
        """Goes on to the last step, or to an interrupt or termination signal; a checkpoint is written either way.

        Returns:
            Whether the last step was reached.
        """
        size = sum(x.size for x in jax.tree.leaves(self.state.params))
        attention = report.describe_attention(self._config.model)
        self._console.print(f"{size / 1e6:.1f} M parameters, {attention}, {self._mesh.size} device(s)")
        rows, length = self._rows.tokens.shape
        self._console.print(f"{rows} rows of {length} tokens, results in {self._folder}", soft_wrap=True)
        log = MetricsLog(self._folder, int(self.state.step))
        try:
            with _signals_noted() as interrupted:
                finished = self._train(log, interrupted)
            self._checkpoints.save(self.state)
        finally:
            log.close()
            self._checkpoints.close()
        if not finished:
            self._console.print(f"interrupted after step {int(self.state.step)}, checkpoint written; --resume goes on")
        return finished

    def leave_results(self, others: Sequence[Path]) -> None:
        """Draws loss.png, other runs' curves in it, writes sample.txt and shows it, and says what the run took."""
        key = jax.random.fold_in(jax.random.key(self._config.seed), int(self.state.step))
        params = jax.device_put(self.state.params, jax.devices()[0])
        text = generate(NSATransformer(self._config.model), params, key, num_bytes=self._config.sample_bytes)
        (self._folder / "sample.txt").write_text(text, encoding="utf-8")
        plot_runs(self._folder / "loss.png", [self._folder, *others])
        report.show_sample(self._console, text)
        report.show_summary(self._console, self._folder)

    def _train(self, log: MetricsLog, interrupted: Callable[[], bool]) -> bool:
        config, first = self._config, int(self.state.step)
        if first == 0:
            self._evaluate(log, 0)
        with report.progress_bar(self._console) as progress:
            task = progress.add_task("", total=config.steps, completed=first, loss="-", speed="-")
            clock, tokens = time.perf_counter(), 0
            for step in range(first + 1, config.steps + 1):
                numbers = batch_rows(step - 1, config.batch_size, len(self._rows.tokens), config.seed)
                batch = self._rows.take(numbers)
                tokens += int((batch.segment_ids >= 0).sum())
                self.state, metrics = self._step(self.state, *put(batch, self._mesh))
                last = step == config.steps
                if last or step % LOG_INTERVAL == 0:
                    values = {name: float(value) for name, value in metrics.items()}
                    speed = tokens / (time.perf_counter() - clock)
                    rate = float(learning_rate(config)(step - 1))
                    log.write(step=step, **values, learning_rate=rate, tokens_per_second=speed)
                    progress.update(task, completed=step, loss=f"{values['loss']:.3f}", speed=f"{speed:,.0f}")
                if last or step % config.eval_interval == 0:
                    self._evaluate(log, step)
                if step % config.checkpoint_interval == 0:
                    self._checkpoints.save(self.state)
                if interrupted():
                    return last
                if step % LOG_INTERVAL == 0:
                    clock, tokens = time.perf_counter(), 0
        return True

    def _evaluate(self, log: MetricsLog, step: int) -> None:
        nats = num_bytes = 0.0
        for batch in in_batches(self._held_out, self._config.batch_size):
            part, _, count = self._sums(self.state.params, *put(batch, self._mesh))
            nats, num_bytes = nats + part, num_bytes + count
        value = float(bits_per_byte(nats, num_bytes))
        log.write(step=step, held_out_bits_per_byte=value, peak_memory_bytes=report.peak_memory())
        self._console.print(f"step {step}: held out {value:.3f} bits per byte")


@contextmanager
def _signals_noted() -> Iterator[Callable[[], bool]]:
    """Says whether an interrupt or termination signal has come; a second one acts as ever."""
    seen = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, _):
        seen.append(number)
        signal.signal(number, usual[number])

    for number in usual:
        signal.signal(number, note)
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
