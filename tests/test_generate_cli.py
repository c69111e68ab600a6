"""The command nsa-generate: text of a run's model, and errors in a line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import arguments, with_model, write_data

from nsa_jax.linen import NSATransformer
from nsa_jax.train import generate_cli
from nsa_jax.train.checkpoint import Checkpoints
from nsa_jax.train.cli import main as train
from nsa_jax.train.config import TrainConfig
from nsa_jax.train.packing import BEGIN


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    (folder / "data").mkdir()
    options = [*arguments(steps=5), "--separate-keys"]
    assert train([*options, "--data", str(write_data(folder / "data")), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_greedy_text_is_that_of_whole_rows(run, tmp_path, capsys):
    files = sorted(path for path in run.rglob("*") if path.is_file())
    (tmp_path / "prompt.txt").write_bytes(b"some words of a text")
    options = ["--tokens", "40", "--temperature", "0", "--chunk-size", "8"]
    assert generate_cli.main(["--run", str(run), "--prompt", str(tmp_path / "prompt.txt"), *options]) == 0
    text, notes = capsys.readouterr()
    assert "prompt: 21 tokens, " in notes and "generated: " in notes and "tokens/s" in notes
    assert sorted(path for path in run.rglob("*") if path.is_file()) == files

    config, params = generate_cli._restore(str(run))
    row = np.concatenate([[BEGIN], np.frombuffer(b"some words of a text", np.uint8), np.zeros(43, np.uint8)])
    row, apply = row.astype(np.int32)[None], jax.jit(NSATransformer(config).apply)
    for place in range(20, 60):
        row[0, place + 1] = apply({"params": params}, jnp.asarray(row))[0, place].argmax()
        if row[0, place + 1] >= BEGIN:
            break
    expected = row[0, 21 : place + 2]
    expected = expected[expected < BEGIN].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
    assert (
        text == "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in expected) + "\n"
    )


def test_a_run_knows_its_configuration(run):
    checkpoints = Checkpoints(run / "checkpoints", None, read_only=True)
    identity = checkpoints.check()["identity"]
    checkpoints.close()
    config = TrainConfig.of_identity(identity)
    assert config.identity() == {name: value for name, value in identity.items() if name != "data_checksum"}
    assert config.model == with_model(separate_keys=True, implementation="xla").model
    with pytest.raises(ValueError, match="not of a run of this version"):
        TrainConfig.of_identity({name: value for name, value in identity.items() if name != "num_heads"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "nowhere"], "run: expected a folder that nsa-train has left"),
        (["--run", " "], "run: expected a folder, got ' '"),
        ([], "the following arguments are required: --run"),
        (["--run", "{run}", "--tokens", "0"], "tokens: expected at least 1, got 0"),
        (["--run", "{run}", "--tokens", "many"], "argument --tokens: invalid int value: 'many'"),
        (["--run", "{run}", "--temperature", "-1"], "temperature: expected a finite number of at least 0, got -1.0"),
        (["--run", "{run}", "--top-p", "1.5"], "top_p: expected a probability above 0 and up to 1, got 1.5"),
        (["--run", "{run}", "--top-k", "0"], "top-k: expected at least 1, got 0"),
        (["--run", "{run}", "--implementation", "cuda"], "implementation: expected None, 'triton' or 'xla'"),
    ],
)
def test_bad_input_is_one_line(run, options, message, capsys):
    assert generate_cli.main([option.format(run=run) for option in options]) == 2
    text, error = capsys.readouterr()
    assert text == "" and error.startswith("nsa-generate: error: ") and message in error and error.count("\n") == 1
