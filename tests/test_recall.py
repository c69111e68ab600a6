"""The recall experiments: tasks are answered by their sources, arms differ as told, the command runs at toy size."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    """The benchmark is a script with modules beside it, not a package."""
    monkeypatch.syspath_prepend(str(FOLDER))


def batch_of(task, length=128, count=4, depth=-1.0, rows=2):
    from recall_tasks import Symbols, make_batch

    text = jnp.asarray(np.random.default_rng(0).integers(0, 256, 4096), jnp.uint8) if task == "needle" else None
    symbols = Symbols(32, 16)
    options = {"symbols": symbols, "rows": rows, "row_length": 256, "length": length, "count": count}
    return make_batch(task, jax.random.key(0), text, **options, depth=jnp.float32(depth)), symbols


@pytest.mark.parametrize("task", ["mqar", "needle", "phone-book"])
def test_questions_are_answered_where_the_sources_say_and_nowhere_else(task):
    batch, symbols = batch_of(task)
    tokens, answers = np.asarray(batch.tokens), np.asarray(batch.answers)
    assert tokens.min() >= 0
    assert tokens.max() < symbols.vocab_size
    row, begin = np.arange(2)[:, None, None, None], 128 * np.arange(2)[None, :, None, None]
    positions, sources = np.asarray(batch.positions), np.asarray(batch.sources) + begin
    np.testing.assert_array_equal(tokens[row, sources], batch.targets)
    np.testing.assert_array_equal(answers[row, positions], batch.targets)
    assert (answers >= 0).sum() == positions.size
    assert (positions > sources).all()
    # what stands before the answer names the question: in the source and in the question alike, in no other place
    asked = 2 if task == "phone-book" else 1  # tokens of a name
    for b in range(2):
        for place, source in zip(positions[b, ..., 0].ravel(), sources[b, ..., 0].ravel(), strict=True):
            name = tokens[b, place - asked + 1 : place + 1]
            inside = range(128 * (place // 128), 128 * (place // 128 + 1) - asked + 1)
            found = [i for i in inside if (tokens[b, i : i + asked] == name).all()]
            assert found == [source - asked, place - asked + 1]


def test_a_needle_stands_at_its_depth():
    for depth, expected in ((0.0, 2), (0.5, 58), (1.0, 118)):
        batch, _ = batch_of("needle", depth=depth)
        np.testing.assert_allclose(batch.sources[:, :, 0, 0], expected, atol=2)  # a slot has four tokens
        assert len(np.unique(batch.sources[0, 0])) == 4


def tiny(arm="nsa", **fields):
    from recall_arms import config_of
    from recall_sizes import SIZES

    return config_of(arm, dataclasses.replace(SIZES["toy"]["mqar"].model, **fields))


def test_random_blocks_keep_the_forced_ones_and_change_nothing_else():
    from recall_arms import blocks_of, chosen_blocks

    from nsa_jax.linen import NSATransformer

    batch, _ = batch_of("mqar", length=256)
    arrays = batch.tokens, batch.segment_ids
    config = tiny()
    params = NSATransformer(config).init(jax.random.key(0), *arrays)["params"]
    params = jax.tree.map(lambda leaf: leaf.unbox(), params, is_leaf=lambda leaf: hasattr(leaf, "unbox"))

    def logits(arm, config=config):
        with blocks_of(arm):
            return jax.jit(NSATransformer(config).apply)({"params": params}, *arrays)

    ordinary, at_random = logits("nsa"), logits("nsa-random")
    own = np.arange(256)[None, :, None, None] // 16
    picked = {
        arm: [
            np.asarray(blocks) for blocks in jax.jit(chosen_blocks, static_argnums=(0, 1))(arm, config, params, *arrays)
        ]
        for arm in ("nsa", "nsa-random")
    }
    for blocks in (blocks for layers in picked.values() for blocks in layers):
        assert blocks.shape == (2, 256, 1, 4)
        assert ((blocks <= own) & (blocks >= -1)).all()
        for forced in (0, own, np.maximum(own - 1, 0)):
            assert (blocks == forced).any(-1).all()
        assert all(len(set(row)) == 4 for row in blocks[:, 100:].reshape(-1, 4).tolist())
    assert len(picked["nsa"]) == config.num_layers
    assert (picked["nsa"][0] != picked["nsa-random"][0]).any()
    # up to four blocks there is no choice; from there on the arms part
    np.testing.assert_allclose(ordinary[:, :64], at_random[:, :64], rtol=1e-4, atol=1e-5)
    assert np.abs(ordinary[:, 64:] - at_random[:, 64:]).max() > 1e-3
    # where every block is taken there is nothing to draw
    every = dataclasses.replace(config, block_counts=16)
    np.testing.assert_allclose(logits("nsa", every), logits("nsa-random", every), rtol=1e-4, atol=1e-5)


def test_selection_recall_counts_the_blocks_that_hold_answers(monkeypatch):
    from recall_run import Run
    from recall_sizes import SIZES

    size = dataclasses.replace(SIZES["toy"]["mqar"], rows=2, lengths=(256,), counts=(4,), eval_batches=1, steps=1)
    run = Run("mqar", "nsa", size, 0, None)
    batch = run._batch(jax.random.fold_in(jax.random.key(10_000), 0), 256, 4)
    held = np.asarray(batch.sources)[..., 0] // 16
    shape = (2, 256, 1, 4)
    for blocks, expected in ((np.full(shape, held[0, 0, 0]), (held == held[0, 0, 0]).mean()), (np.full(shape, -1), 0)):
        monkeypatch.setattr(run, "_choose", lambda *_, blocks=blocks: [blocks])
        (line,) = run.evaluate()["selection_recall"]
        assert line == {"length": 256, "count": 4, "layer": 0, "recall": pytest.approx(expected)}


@pytest.mark.parametrize("task", ["needle", "mqar"])
def test_the_command_at_toy_size(task, tmp_path, capsys):
    import recall

    few = [
        "steps=20",
        "rows=2",
        "lengths=(128,)",
        "row_length=128",
        "counts=(4,)",
        "depths=(0.0,1.0)",
        "eval_batches=1",
    ]
    arms = ["nsa", "dense"] if task == "mqar" else ["nsa-no-selected"]
    command = ["--task", task, "--size", "toy", "--arms", *arms, "--out", str(tmp_path), "--set", *few]
    assert recall.main([*command, "--seeds", "1"]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert [(run["arm"], run["seed"], run["steps"]) for run in content["runs"]] == [(arm, 0, 20) for arm in arms]
    for run in content["runs"]:
        assert len(run["accuracy"]) == (2 if task == "needle" else 1)
        assert len(run["selection_recall"]) == (2 if run["arm"] == "nsa" else 0)  # layers
        first, last = run["loss"][0][1], run["loss"][-1][1]
        assert last < first < 2 * math.log(306)
    plots = {"loss.png", "accuracy.png"} | ({"depth.png"} if task == "needle" else {"selection.png"})
    assert {path.name for path in tmp_path.iterdir()} == plots | {"results.json", "table.txt"}

    before = (tmp_path / "results.json").read_text()
    assert recall.main([*command, "--seeds", "1"]) == 0  # nothing is left to do
    assert (tmp_path / "results.json").read_text() == before
    assert recall.main([*command, "rows=4", "--seeds", "1"]) == 2
    assert "measured with other rows; give --fresh or another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds: expected a positive number, got 0"),
        (["--set", "step=3"], "--set: expected NAME=VALUE of "),
        (["--set", "steps=0"], "--set: steps: expected a positive integer, got 0"),
        (["--set", "lengths=(96,)"], "--set: lengths: expected divisors of row_length=256, got 96"),
        (["--set", "num_heads=0"], "num_heads: expected a positive number, got 0"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, capsys):
    import recall

    assert recall.main(["--task", "mqar", "--size", "toy", "--out", str(tmp_path / "new"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
