"""Generation: greedy tokens are those of whole rows, and what sampling may draw."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_transformer import SMALL

from nsa_jax.linen import NSATransformer, generate, generation

PROMPT = jax.random.randint(jax.random.key(0), (3, 21), 0, SMALL.vocab_size)
LENGTHS = jnp.array([21, 5, 1])
MODELS = {
    "nsa": {},
    "separate, learned": {"separate_keys": True, "compression": "mlp"},
    "dense": {"attention": "dense"},
}


def make(**fields):
    model = NSATransformer(dataclasses.replace(SMALL, **fields))
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(1), PROMPT))
    return model, jax.tree.map(lambda x: 4 * x, variables["params"])  # so that the logits are far apart


def by_whole_rows(model, params, count):
    """The most probable tokens [B, count], each from a forward pass over the row so far."""
    apply = jax.jit(lambda row, place: model.apply({"params": params}, row)[0, place].argmax())
    rows = np.zeros((3, 64), np.int32)
    for row, length in enumerate(LENGTHS):
        rows[row, :length] = PROMPT[row, :length]
        for place in range(length, length + count):
            rows[row, place] = apply(rows[row][None], place - 1)
    return np.stack([rows[row, length : length + count] for row, length in enumerate(LENGTHS)])


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_greedy_tokens_are_those_of_whole_rows(fields):
    model, params = make(**fields)
    generated = generate(model, params, PROMPT, num_tokens=30, lengths=LENGTHS, temperature=0.0, chunk_size=8)
    expected = by_whole_rows(model, params, 30)
    np.testing.assert_array_equal(generated.tokens, expected)
    assert generated.lengths.tolist() == [30] * 3
    if not fields:
        stop = int(expected[1, 9])
        stopped = generate(
            model, params, PROMPT, num_tokens=30, lengths=LENGTHS, temperature=0.0, chunk_size=8, stop_tokens=(stop,)
        )
        for row in range(3):
            ends = np.append(np.flatnonzero(expected[row] == stop), 29)[0] + 1
            assert stopped.lengths[row] == ends
            np.testing.assert_array_equal(stopped.tokens[row], np.where(np.arange(30) < ends, expected[row], 0))


def test_one_compilation_for_keys_and_temperatures():
    model, params = make(num_layers=1)
    compiled = generation._generate._cache_size()
    drawn = [
        generate(model, params, PROMPT, num_tokens=5, key=jax.random.key(seed), temperature=temperature, top_p=top_p)
        for seed, temperature, top_p in ((0, 1.0, 0.9), (1, 1.0, 0.8), (0, 2.0, 0.9), (0, 1.0, 0.9))
    ]
    assert generation._generate._cache_size() == compiled + 1
    np.testing.assert_array_equal(drawn[0].tokens, drawn[3].tokens)
    assert any((drawn[0].tokens != other.tokens).any() for other in drawn[1:3])


def test_what_may_be_drawn():
    probability = np.array([0.4, 0.3, 0.2, 0.1])
    logits = jnp.tile(jnp.log(jnp.asarray(probability, jnp.float32)), (4000, 1))

    def frequencies(temperature=1.0, top_p=None, **options):
        how = generation.sampling(jax.random.key(0), temperature, top_p)
        return np.bincount(generation.draw(logits, how, how.key, **options), minlength=4) / len(logits)

    def expected(weights):
        return np.asarray(weights) / np.sum(weights)

    # five standard deviations of 4000 draws
    tolerance = 5 * 0.5 / np.sqrt(4000)
    for actual, weights in (
        (frequencies(top_k=None), probability),
        (frequencies(top_k=2), [0.4, 0.3, 0, 0]),
        (frequencies(top_k=9), probability),
        (frequencies(top_p=0.69, top_k=None), [0.4, 0.3, 0, 0]),
        (frequencies(top_p=0.71, top_k=None), [0.4, 0.3, 0.2, 0]),
        (frequencies(top_p=1.0, top_k=None), probability),
        (frequencies(top_p=0.5, top_k=3), [0.4, 0.3, 0, 0]),
        (frequencies(temperature=0.5, top_k=None), probability**2),
        (frequencies(temperature=0.0, top_k=None), [1, 0, 0, 0]),
    ):
        np.testing.assert_allclose(actual, expected(weights), atol=tolerance)
        assert not actual[expected(weights) == 0].any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_tokens": 0}, ValueError, "num_tokens: expected at least 1, got 0"),
        ({"lengths": np.array([1, 2, 22])}, ValueError, "lengths: expected 1 to the 21 tokens of prompt, got 1 to 22"),
        ({"key": None}, ValueError, "key: expected a PRNG key, as temperature is not 0, got None"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number of at least 0"),
        ({"temperature": "warm"}, TypeError, "temperature: expected a Python number, got str"),
        ({"top_p": 0.0}, ValueError, "top_p: expected a probability above 0 and up to 1"),
        ({"top_k": 1.5}, TypeError, "top_k: expected an int"),
        ({"prompt": PROMPT[0]}, ValueError, "prompt: expected shape .B, T."),
        ({"prompt": PROMPT[:, :0]}, ValueError, "prompt: expected at least one token"),
        ({"model": SMALL}, TypeError, "model: expected an NSATransformer, got TransformerConfig"),
    ],
)
def test_errors(options, error, message):
    arguments = {
        "model": NSATransformer(SMALL),
        "params": {},
        "prompt": PROMPT,
        "num_tokens": 3,
        "key": jax.random.key(0),
    }
    with pytest.raises(error, match=message):
        generate(**(arguments | options))
