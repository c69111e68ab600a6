"""Trains one arm on a task, and measures what it recalls."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from recall_arms import SELECTING, blocks_of, chosen_blocks, config_of
from recall_sizes import Size
from recall_tasks import Batch, make_batch

from nsa_jax.linen import NSATransformer

Array = jax.Array


class Run:
    """One arm with one seed. All arms see the same data, which is a function of the seed and the step.

    Args:
        task: a key of `recall_tasks.TASKS`.
        arm: one of `recall_arms.ARMS`.
        size: of model, data and training.
        seed: of the parameters and of the data.
        text: uint8 [n], what needles are hidden in.
    """

    def __init__(self, task: str, arm: str, size: Size, seed: int, text: Array | None):
        self.task, self.arm, self.size, self.seed = task, arm, size, seed
        self._text = text if task == "needle" else None
        self.config = config_of(arm, size.model)
        self._model = NSATransformer(self.config)
        self._optimizer = _optimizer(size)
        self._draw = np.random.default_rng(seed)
        self._step = jax.jit(self._train_step, donate_argnums=(0, 1))
        self._predict = jax.jit(self._predictions)
        self._choose = jax.jit(self._chosen)
        self.params, self._state = jax.jit(self._init)()

    def train(self, until: float) -> Iterator[tuple[int, float]]:
        """Takes steps up to `size.steps` or to the time `until`, of `time.monotonic`; yields (steps, loss) of some."""
        for step in range(self.size.steps):
            batch = self._batch(jax.random.fold_in(jax.random.key(self.seed), step), *self._stage(step))
            arrays = batch.tokens, batch.segment_ids, batch.answers
            self.params, self._state, loss = self._step(self.params, self._state, *arrays)
            if step % 10 == 9 or step + 1 == self.size.steps:
                yield step + 1, float(loss)
                if time.monotonic() > until:
                    return

    def evaluate(self) -> dict[str, list[dict[str, Any]]]:
        """ "accuracy": a line per length, count and (of needles) depth; "selection_recall": lines with layer, too.

        An answer is right if all its tokens are. Selection recall is how often the block that holds the answer is among
        those that the query's layer selects, of any head.
        """
        figures: dict[str, list] = {"accuracy": [], "selection_recall": []}
        depths = self.size.depths if self.task == "needle" else (None,)
        for length in self.size.lengths:
            for count in self._counts(length):
                for depth in depths:
                    where = {"length": length, "count": count} | ({} if depth is None else {"depth": depth})
                    right, found = self._measure(length, count, depth)
                    figures["accuracy"].append(where | {"accuracy": right})
                    for layer, share in enumerate(found):
                        figures["selection_recall"].append(where | {"layer": layer, "recall": share})
        return figures

    def _measure(self, length: int, count: int, depth: float | None) -> tuple[float, list[float]]:
        right, found = [], []
        for number in range(self.size.eval_batches):
            key = jax.random.fold_in(jax.random.key(10_000 + self.seed), number)
            batch = self._batch(key, length, count, depth)
            asked = slice(None) if depth is None else slice(1)  # only that needle stands at that depth
            row = np.arange(self.size.rows)[:, None, None, None]
            positions, targets, sources = (np.asarray(x)[:, :, asked] for x in batch[3:])
            predicted = np.asarray(self._predict(self.params, batch.tokens, batch.segment_ids))
            right.append((predicted[row, positions] == targets).all(-1).mean())
            if self.arm in SELECTING and number == 0:
                holds = sources[..., None, None] // self.config.block_size
                found = [
                    float((np.asarray(blocks)[row, positions] == holds).any((-1, -2)).mean())
                    for blocks in self._choose(self.params, batch.tokens, batch.segment_ids)
                ]
        return float(np.mean(right)), found

    def _stage(self, step: int) -> tuple[int, int]:
        """(length, count) of a step: ever longer lengths over the first half of training, any of them after it."""
        lengths = self.size.lengths
        known = min(len(lengths), 1 + 2 * step * len(lengths) // self.size.steps)
        length = lengths[self._draw.integers(known)]
        counts = self._counts(length)
        return length, counts[self._draw.integers(len(counts))]

    def _counts(self, length: int) -> tuple[int, ...]:
        fitting = tuple(count for count in self.size.counts if 8 * count <= length and count <= self.size.symbols.keys)
        return fitting or self.size.counts[:1]

    def _batch(self, key: Array, length: int, count: int, depth: float | None = None) -> Batch:
        size = self.size
        return make_batch(
            self.task, key, self._text, symbols=size.symbols, rows=size.rows, row_length=size.row_length,
            length=length, count=count, depth=jnp.float32(-1 if depth is None else depth),
        )  # fmt: skip

    def _init(self):
        tokens = jnp.zeros((1, self.config.block_size), jnp.int32)
        params = nn.unbox(self._model.init(jax.random.key(self.seed), tokens))["params"]
        return params, self._optimizer.init(params)

    def _train_step(self, params, state, tokens, segment_ids, answers):
        def loss(params):
            with blocks_of(self.arm):
                logits = self._model.apply({"params": params}, tokens, segment_ids)
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(answers, 0))
            return jnp.mean(nats, where=answers >= 0)

        value, grads = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = self._optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def _predictions(self, params, tokens, segment_ids):
        with blocks_of(self.arm):
            return self._model.apply({"params": params}, tokens, segment_ids).argmax(-1)

    def _chosen(self, params, tokens, segment_ids):
        return chosen_blocks(self.arm, self.config, params, tokens, segment_ids)


def _optimizer(size: Size) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, size.learning_rate, size.warmup_steps, max(size.steps, size.warmup_steps + 1), size.learning_rate / 10
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))
