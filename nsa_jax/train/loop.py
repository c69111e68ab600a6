"""The training loop: steps, evaluation and checkpoints."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from nsa_jax.linen import NSATransformer
from nsa_jax.train import hosts, report, signals
from nsa_jax.train.ahead import check_memory, compile_step
from nsa_jax.train.checkpoint import Checkpoints
from nsa_jax.train.config import TrainConfig
from nsa_jax.train.documents import split
from nsa_jax.train.folder import CHECKPOINTS, METRICS, PLOT, SAMPLE, locked, set_aside, write_whole
from nsa_jax.train.mesh import check_divides, make_mesh, put
from nsa_jax.train.metrics import MetricsLog, plot_runs
from nsa_jax.train.packing import batch_rows, in_batches, pack
from nsa_jax.train.sample import generate
from nsa_jax.train.screen import say
from nsa_jax.train.step import bits_per_byte, init_state, learning_rate, make_sums

# steps from one look at the loss to the next: looking waits for the device
LOG_INTERVAL = 10


class Run:
    """A run that is ready to train: data packed, step compiled, folder locked, parameters initialised or restored.

    Args:
        config: the run.
        documents: the text.
        folder: where checkpoints and metrics go; made if missing, once all else is known to be well.
        devices: of all hosts.
        mesh: the size of each axis of the mesh that they form, see `mesh.AXES`; None for all of them along "data".
        resume: whether to go on from the newest checkpoint in the folder.
        console: where to report.

    Attributes:
        state: the TrainState as it is now.

    Raises:
        ValueError: the mesh is not of these devices, or does not divide the batch or the model, a step cannot be
            compiled or does not fit into memory, another run is at work in the folder, the folder holds a run and
            resume is False, or there is no checkpoint to resume that fits and can be read.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        documents: Sequence[bytes],
        folder: Path,
        *,
        devices: Sequence[jax.Device],
        mesh: dict[str, int] | None = None,
        resume: bool,
        console: Console,
    ):
        self._config, self._folder, self._console = config, folder, console
        self._mesh = make_mesh(devices, mesh)
        check_divides(config.model, config.batch_size, self._mesh)
        check_memory(config, self._mesh)
        parts = split(documents, config.held_out, config.seed)
        training, held_out = (pack(part, config.sequence_length) for part in parts)
        count = len(held_out.tokens)
        self._rows = training
        self._held_out = held_out.take(batch_rows(0, min(config.eval_rows, count), count, config.seed))
        identity = {**config.identity(), "data_checksum": training.checksum()}
        with contextlib.ExitStack() as stack:
            there = (folder / CHECKPOINTS).is_dir()
            if there:
                self._open(stack, identity, resume)
            elif resume:
                raise ValueError(f"checkpoint: none in {folder}; without --resume the run starts anew")
            self._step = compile_step(config, self._mesh)
            if not there:
                self._open(stack, identity, resume)
            self._begin(stack, resume)
            self._opened = stack.pop_all()
        self._sums = jax.jit(make_sums(config, self._mesh))
        self._unseen: list[tuple[int, dict]] = []  # (step, metrics) that were not looked at

    def _open(self, stack: contextlib.ExitStack, identity: dict, resume: bool) -> None:
        """Locks the folder and says whether the run may have it."""
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        if hosts.is_first():
            stack.enter_context(locked(folder))
        self._checkpoints = Checkpoints(folder / CHECKPOINTS, identity)
        stack.callback(self._checkpoints.close)
        for name in self._checkpoints.unfinished:
            say(self._console, f"found a half-written checkpoint, {name}: removed")
        if resume:
            self._checkpoints.check()
        elif self._checkpoints.latest_step() is not None:
            raise ValueError(f"out: {folder} holds a run; go on with --resume, or name another folder with --out")

    def _begin(self, stack: contextlib.ExitStack, resume: bool) -> None:
        """The state and the metrics, new or as a run has left them."""
        self.state = init_state(self._config, self._mesh)
        if resume:
            self.state = self._checkpoints.restore(self.state)
        else:
            for name in (METRICS, PLOT, SAMPLE) if hosts.is_first() else ():
                if aside := set_aside(self._folder / name):
                    say(self._console, f"found {name} of an earlier start without a checkpoint: kept as {aside.name}")
        step = int(self.state.step)
        self._log = MetricsLog(self._folder, step)
        stack.callback(self._log.close)
        if resume:
            repeated = f", {self._log.dropped} lines of metrics after it are dropped" if self._log.dropped else ""
            say(self._console, f"found the checkpoint of step {step}: going on from there{repeated}")

    def close(self) -> None:
        """Gives the folder back."""
        self._opened.close()

    def train(self) -> bool:
        """Goes on to the last step, or to an interrupt or termination signal; a checkpoint is written either way.

        Returns:
            Whether the last step was reached.

        Raises:
            FloatingPointError: the loss, a gradient, a parameter or the optimiser's state is not finite. The state is
                not written; the last checkpoint stays.
            OSError: metrics or a checkpoint cannot be written. The last checkpoint stays.
        """
        size = sum(x.size for x in jax.tree.leaves(self.state.params))
        attention = report.describe_attention(self._config.model)
        say(self._console, f"{size / 1e6:.1f} M parameters, {attention}, {_describe(self._mesh)}")
        rows, length = self._rows.tokens.shape
        say(self._console, f"{rows} rows of {length} tokens, results in {self._folder}")
        try:
            with signals.noted() as interrupted:
                finished = self._train(interrupted)
                self._save()
        except (FloatingPointError, OSError) as error:
            kind = FloatingPointError if isinstance(error, FloatingPointError) else OSError
            last = self._checkpoints.latest_step()
            kept = "there is no checkpoint yet" if last is None else f"the checkpoint of step {last} is kept"
            raise kind(f"{error}; {kept} in {self._folder}") from error
        if not finished:
            say(self._console, f"interrupted after step {int(self.state.step)}, checkpoint written; --resume goes on")
        return finished

    def leave_results(self, others: Sequence[Path]) -> None:
        """Draws loss.png, other runs' curves in it, writes sample.txt and shows it, and says what the run took."""
        key = jax.random.fold_in(jax.random.key(self._config.seed), int(self.state.step))
        params = jax.tree.map(hosts.whole, self.state.params)
        if not hosts.is_first():
            return
        params = jax.device_put(params, jax.local_devices()[0])
        text = generate(NSATransformer(self._config.model), params, key, num_bytes=self._config.sample_bytes)
        write_whole(self._folder / SAMPLE, text.encode())
        plot_runs(self._folder / PLOT, [self._folder, *others])
        report.show_sample(self._console, text)
        report.show_summary(self._console, self._folder)

    def _train(self, interrupted: Callable[[], bool]) -> bool:
        config, first = self._config, int(self.state.step)
        if first == 0:
            self._evaluate(0)
        with report.progress_bar(self._console) as progress:
            task = progress.add_task("", total=config.steps, completed=first, loss="-", speed="-")
            clock, tokens = time.perf_counter(), 0
            for step in range(first + 1, config.steps + 1):
                numbers = batch_rows(step - 1, config.batch_size, len(self._rows.tokens), config.seed)
                batch = self._rows.take(numbers)
                tokens += int((batch.segment_ids >= 0).sum())
                self.state, metrics = self._step(self.state, *put(batch, self._mesh))
                self._unseen.append((step, metrics))
                last = step == config.steps
                if last or step % LOG_INTERVAL == 0:
                    values = self._look()
                    speed = tokens / (time.perf_counter() - clock)
                    rate = float(learning_rate(config)(step - 1))
                    self._log.write(step=step, **values, learning_rate=rate, tokens_per_second=speed)
                    progress.update(task, completed=step, loss=f"{values['loss']:.3f}", speed=f"{speed:,.0f}")
                if last or step % config.eval_interval == 0:
                    self._evaluate(step)
                if step % config.checkpoint_interval == 0:
                    self._save()
                # hosts stop at the same step
                if (jax.process_count() == 1 or step % LOG_INTERVAL == 0) and hosts.any_of(interrupted()):
                    return last
                if step % LOG_INTERVAL == 0:
                    clock, tokens = time.perf_counter(), 0
        return True

    def _look(self) -> dict[str, float]:
        """The newest metrics, if all since the last look are of finite steps."""
        values = {}
        for step, metrics in jax.device_get(self._unseen):
            finite = metrics.pop("finite")
            values = {name: float(value) for name, value in metrics.items()}
            if not finite:
                loss, norm = values["loss"], values["grad_norm"]
                raise FloatingPointError(f"step {step}: not finite any more, loss {loss:g}, gradient norm {norm:g}")
        self._unseen = []
        return values

    def _save(self) -> None:
        """Writes a checkpoint, but for a state that is not finite."""
        self._look()
        self._checkpoints.save(self.state)

    def _evaluate(self, step: int) -> None:
        nats = num_bytes = 0.0
        for batch in in_batches(self._held_out, self._config.batch_size):
            part, _, count = self._sums(self.state.params, *put(batch, self._mesh))
            nats, num_bytes = nats + part, num_bytes + count
        value = float(bits_per_byte(nats, num_bytes))
        if not math.isfinite(value):
            raise FloatingPointError(f"step {step}: the held-out loss is {value}")
        self._log.write(step=step, held_out_bits_per_byte=value, peak_memory_bytes=report.peak_memory())
        say(self._console, f"step {step}: held out {value:.3f} bits per byte")


def _describe(mesh: Mesh) -> str:
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} device(s)" + (f" ({axes})" if axes else "")
