"""Functions of numbers that the operations share, element by element, in the dtype of their argument."""

import numpy as np


def softplus(x):
    """log(1 + exp(x)), and x itself above 20."""
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, x.dtype.type(20)))))


def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, x.dtype.type(1), e) / (1 + e)


def phi(a):
    """(exp(a) - 1)/a, and 1 at 0. Real or complex."""
    safe = np.where(a == 0, a.dtype.type(1), a)
    return np.where(a == 0, a.dtype.type(1), np.expm1(safe) / safe)


def phi_derivative(a):
    """phi'(a) = (exp(a) - phi(a))/a, by its series near 0, where the quotient has lost its digits."""
    terms = 8 if a.real.dtype == np.float32 else 15
    series = np.zeros_like(a)
    factorial = [1.0]
    for k in range(1, terms + 2):
        factorial.append(factorial[-1] * k)
    for k in range(terms, 0, -1):  # Σ_{k≥1} k·a^{k-1}/(k+1)!
        series = series * a + a.dtype.type(k / factorial[k + 1])
    near = np.abs(a) < 0.5
    safe = np.where(near, a.dtype.type(1), a)
    return np.where(near, series, (np.exp(safe) - phi(safe)) / safe)
