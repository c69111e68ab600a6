"""Documents, packing and the order of rows."""

import itertools
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from nsa_jax.train.documents import read_documents, split
from nsa_jax.train.packing import BEGIN, END, PADDING, batch_rows, in_batches, pack


def random_documents(count, longest, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.bytes(int(size)) for size in generator.integers(1, longest, count)]


def segments_of(rows):
    for tokens, segment_ids in zip(rows.tokens, rows.segment_ids, strict=True):
        for number in range(segment_ids.max() + 1):
            yield tokens[segment_ids == number]


def test_every_short_document_is_one_segment():
    documents = random_documents(60, 30)
    rows = pack(documents, 32)
    found = sorted(segment.tolist() for segment in segments_of(rows))
    assert found == sorted([BEGIN, *document, END] for document in documents)


def test_every_token_of_a_long_document_is_predicted_once():
    document = bytes(range(256)) * 3
    for length in (16, 17, 257, 769, 770, 771):
        rows = pack([document], length)
        assert rows.tokens.shape[1] == length
        segments = sorted(segments_of(rows), key=lambda segment: (len(segment) < length,))
        assert all(len(segment) == length for segment in segments[:-1])
        joined = np.concatenate([segments[0], *(segment[1:] for segment in segments[1:])])
        np.testing.assert_array_equal(joined, [BEGIN, *document, END])
        for segment, following in itertools.pairwise(segments):
            assert segment[-1] == following[0]


def test_padding_fills_the_rest_and_rows_are_well_filled():
    documents = random_documents(300, 60)
    rows = pack(documents, 64)
    padding = rows.segment_ids < 0
    np.testing.assert_array_equal(padding, rows.tokens == PADDING)
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()  # only at the end of a row
    assert padding.mean() < 0.05
    steps = np.diff(rows.segment_ids, axis=1)
    assert ((steps == 0) | (steps == 1) | padding[:, 1:]).all()


def test_an_epoch_takes_every_row_once_in_an_order_of_its_own():
    order = np.concatenate([batch_rows(step, 7, 21, seed=3) for step in range(6)])
    assert sorted(order[:21]) == sorted(order[21:]) == list(range(21))
    assert order[:21].tolist() != order[21:].tolist()
    np.testing.assert_array_equal(batch_rows(5, 7, 21, seed=3), order[35:])
    assert batch_rows(0, 21, 21, seed=4).tolist() != order[:21].tolist()


def test_a_batch_may_span_epochs():
    assert sorted(batch_rows(0, 6, 3, seed=0)) == [0, 0, 1, 1, 2, 2]


def test_evaluation_batches_hold_every_row_and_padding():
    rows = pack(random_documents(20, 30), 32)
    batches = list(in_batches(rows, 4))
    tokens = np.concatenate([batch.tokens for batch in batches])
    assert all(batch.tokens.shape == (4, 32) for batch in batches)
    np.testing.assert_array_equal(tokens[: len(rows.tokens)], rows.tokens)
    assert (tokens[len(rows.tokens) :] == PADDING).all()


def test_split_is_by_document_and_by_seed():
    documents = random_documents(40, 50)
    training, held_out = split(documents, 0.1, seed=0)
    assert len(held_out) == 4
    assert sorted(training + held_out) == sorted(documents)
    assert split(documents, 0.1, seed=0)[1] == held_out
    assert split(documents, 0.1, seed=1)[1] != held_out


@pytest.mark.parametrize("held_out", [0.001, 0.999])
def test_both_parts_get_a_document(held_out):
    assert all(split([b"a", b"b"], held_out, seed=0))


def test_a_lone_document_is_cut():
    assert split([b"abcdefghij"], 0.2, seed=0) == ([b"abcdefgh"], [b"ij"])


def test_reading_folders_and_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_bytes(b"one")
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "c.dat").write_bytes(b"c")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "two.txt").write_bytes(b"two")
    assert read_documents([str(tmp_path)], "*.txt") == [b"a", b"one"]
    assert read_documents([str(tmp_path)], "*") == [b"a", b"one", b"c"]
    assert read_documents([str(tmp_path / "c.dat")], "*.txt") == [b"c"]


def test_the_default_is_the_standard_library_without_tests():
    documents = read_documents([], "*")
    stdlib = Path(sysconfig.get_path("stdlib"))
    assert (stdlib / "argparse.py").read_bytes() in documents
    assert sum(map(len, documents)) > 3e6
    assert documents == read_documents([], "*")
