"""Filters and draws against loops over the tokens of each row, written from what transformers documents."""

import math

import numpy as np
import pytest

from mambacupy import sampling
from mambacupy.sampling import Sampling

RNG = np.random.default_rng(3)
LOGITS = RNG.normal(0, 2, (4, 37)).astype(np.float32)
TIED = np.round(LOGITS)  # many tokens share their logits, as in 16 bits
SEEN = RNG.random((4, 37)) < 0.3


def probabilities(row):
    weights = [math.exp(x) if x > -math.inf else 0.0 for x in map(float, row)]
    return [w / sum(weights) for w in weights]


def top_k(row, k):
    return [x for x in row if sum(y > x for y in row) < k]


def top_p(row, p):
    chances = probabilities(row)
    return [x for x, c in zip(row, chances, strict=True) if sum(other for other in chances if other > c) < p]


def min_p(row, p):
    chances = probabilities(row)
    return [x for x, c in zip(row, chances, strict=True) if c >= p * max(chances)]


FILTERS = {
    "top-k-1": (lambda x: sampling.keep_top_k(x, 1), lambda row: top_k(row, 1)),
    "top-k-5": (lambda x: sampling.keep_top_k(x, 5), lambda row: top_k(row, 5)),
    "top-k-all": (lambda x: sampling.keep_top_k(x, 99), list),
    "top-p-0.01": (lambda x: sampling.keep_top_p(x, 0.01), lambda row: top_p(row, 0.01)),
    "top-p-0.6": (lambda x: sampling.keep_top_p(x, 0.6), lambda row: top_p(row, 0.6)),
    "top-p-0.99": (lambda x: sampling.keep_top_p(x, 0.99), lambda row: top_p(row, 0.99)),
    "top-p-1": (lambda x: sampling.keep_top_p(x, 1.0), list),
    "min-p-0": (lambda x: sampling.keep_min_p(x, 0.0), list),
    "min-p-0.1": (lambda x: sampling.keep_min_p(x, 0.1), lambda row: min_p(row, 0.1)),
    "min-p-1": (lambda x: sampling.keep_min_p(x, 1.0), lambda row: min_p(row, 1.0)),
}


@pytest.mark.parametrize("row", FILTERS)
@pytest.mark.parametrize("logits", [LOGITS, TIED, LOGITS.astype(np.float64)], ids=["float32", "ties", "float64"])
def test_filters_keep_what_their_definition_says(row, logits):
    """In each of several rows, whatever the others hold; what is kept is not changed."""
    keep, wanted = FILTERS[row]
    kept = keep(logits)
    assert kept.shape == logits.shape and kept.dtype == logits.dtype
    for before, after in zip(logits, kept, strict=True):
        assert sorted(after[after > -np.inf]) == sorted(wanted(list(before)))
        assert np.array_equal(after[after > -np.inf], before[after > -np.inf])


def test_min_p_is_about_probabilities_not_logits():
    """Logits below zero, and shifted ones: a comparison of logits themselves would keep all or nothing."""
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.45, 0.45]]))
    for shift in (0.0, -100.0, 100.0):
        kept = sampling.keep_min_p(logits + shift, 0.25) > -np.inf
        assert kept.tolist() == [[True, True, True, False], [False, False, True, True]]


def test_a_filter_sees_what_the_one_before_left():
    """After top_k=2 of 0.4, 0.3, 0.3·… the first has more than half of what is left, and top_p=0.5 keeps it alone."""
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]))
    kept = sampling.keep_top_p(sampling.keep_top_k(logits, 2), 0.5) > -np.inf
    assert kept.tolist() == [[True, False, False, False], [False, False, False, True]]
    alone = sampling.keep_top_p(logits, 0.5) > -np.inf
    assert alone.sum(axis=1).tolist() == [2, 2]


def test_repetition_penalty():
    got = sampling.penalise_repetition(LOGITS, SEEN, 1.5)
    for i, j in np.ndindex(LOGITS.shape):
        x = LOGITS[i, j]
        assert got[i, j] == pytest.approx((x / 1.5 if x > 0 else x * 1.5) if SEEN[i, j] else x, rel=1e-6)


def test_order_of_the_filters():
    """Penalty, temperature, top-k, top-p, min-p: each of these choices differs from that of another order."""
    options = Sampling(temperature=0.7, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.8)
    logits = sampling.penalise_repetition(LOGITS, SEEN, 1.8) / np.float32(0.7)
    logits = sampling.keep_min_p(sampling.keep_top_p(sampling.keep_top_k(logits, 9), 0.9), 0.05)
    for uniforms in np.random.default_rng(0).random((50, 4)):
        assert np.array_equal(sampling.choose(LOGITS, options, uniforms, SEEN), sampling.draw(logits, uniforms))


def test_greedy_is_the_largest_also_after_a_penalty():
    assert np.array_equal(sampling.choose(LOGITS, Sampling()), LOGITS.argmax(1))
    assert sampling.greedy(np.array([[1.0, 3.0, 3.0]])).tolist() == [1]
    first = np.eye(37, dtype=bool)[LOGITS.argmax(1)]
    assert not (sampling.choose(LOGITS, Sampling(repetition_penalty=1e6), seen=first) == LOGITS.argmax(1)).any()


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]))
    grid = (np.arange(1000) + 0.5) / 1000
    drawn = np.stack([sampling.draw(logits, np.array([x, x])) for x in grid])
    for row, chances in enumerate(([500, 250, 125, 125], [100, 200, 300, 400])):
        assert np.bincount(drawn[:, row], minlength=4).tolist() == chances


def test_draws_never_take_what_was_dropped():
    logits = np.full((3, 5), -np.inf)
    logits[0, 1] = logits[1, 4] = logits[2, 0] = 2.0
    for x in (0.0, 0.5, np.nextafter(1.0, 0.0)):
        assert sampling.draw(logits, np.full(3, x)).tolist() == [1, 4, 0]
    logits = sampling.keep_top_k(LOGITS, 3)
    for x in (0.0, 0.999, np.nextafter(1.0, 0.0)):
        assert (np.take_along_axis(logits, sampling.draw(logits, np.full(4, x))[:, None], 1) > -np.inf).all()


def test_rows_are_by_themselves():
    options = Sampling(temperature=1.3, top_k=8, top_p=0.8, min_p=0.02, repetition_penalty=1.2)
    uniforms = np.random.default_rng(1).random(4)
    together = sampling.choose(LOGITS, options, uniforms, SEEN)
    alone = [sampling.choose(LOGITS[i : i + 1], options, uniforms[i : i + 1], SEEN[i : i + 1])[0] for i in range(4)]
    assert together.tolist() == alone


REFUSED = {
    "temperature": ({"temperature": -1.0}, ValueError, r"Sampling: temperature is -1.0, wanted a finite number, 0 \(greedy\)"),
    "temperature-nan": ({"temperature": math.nan}, ValueError, "Sampling: temperature is nan"),
    "temperature-tiny": ({"temperature": 1e-300}, ValueError, r"temperature is 1e-300, wanted .* 0 \(greedy\) or from 1e-20"),
    "penalty-huge": ({"repetition_penalty": 1e308}, ValueError, "repetition_penalty is 1e[+]308, wanted a number from 1e-10"),
    "temperature-text": ({"temperature": "1"}, TypeError, "Sampling: temperature is '1', wanted"),
    "top-k": ({"temperature": 1.0, "top_k": 0}, ValueError, "Sampling: top_k is 0, wanted 1 or more, or None for all"),
    "top-k-float": ({"temperature": 1.0, "top_k": 2.0}, TypeError, "Sampling: top_k is 2.0, wanted an integer, or None"),
    "top-p": ({"temperature": 1.0, "top_p": 0.0}, ValueError, "Sampling: top_p is 0.0, wanted a number above 0 and up to 1"),
    "min-p": ({"temperature": 1.0, "min_p": 1.5}, ValueError, "Sampling: min_p is 1.5, wanted a number from 0 to 1, or None"),
    "penalty": ({"repetition_penalty": 0}, ValueError, "Sampling: repetition_penalty is 0, wanted a number from 1e-10 to 1e10"),
    "greedy": ({"top_p": 0.9}, ValueError, r"Sampling: top_p is 0.9, but temperature 0 takes the largest .* temperature=1.0"),
}


def test_extremes_stay_finite():
    logits, seen = np.float32([[-1e8, 1e8, 0]]), np.array([[True, False, False]])
    with np.errstate(all="raise", under="ignore"):
        for penalty in (1e-10, 1e10):
            options = sampling.Sampling(temperature=1e-20, top_k=2, top_p=0.9, min_p=0.1, repetition_penalty=penalty)
            assert sampling.choose(logits, options, np.array([0.5]), seen) == 1


@pytest.mark.parametrize("row", REFUSED)
def test_refuses(row):
    options, error, message = REFUSED[row]
    with pytest.raises(error, match=message):
        Sampling(**options)


@pytest.mark.gpu
def test_gpu_chooses_as_the_host():
    import cupy

    logits = np.random.default_rng(0).normal(0, 3, (5, 50277)).astype(np.float32)
    seen = np.random.default_rng(1).random(logits.shape) < 0.01
    every = [
        Sampling(), Sampling(1.0), Sampling(0.7, 50), Sampling(1.0, None, 0.9), Sampling(1.2, None, None, 0.05),
        Sampling(0.9, 200, 0.95, 0.01, 1.3), Sampling(repetition_penalty=1.3),
    ]  # fmt: skip
    for options in every:
        for uniforms in np.random.default_rng(2).random((5, 5)):
            wanted = sampling.choose(logits, options, uniforms, seen)
            got = sampling.choose(cupy.asarray(logits), options, cupy.asarray(uniforms), cupy.asarray(seen))
            assert np.array_equal(cupy.asnumpy(got), wanted), options
