"""From logits to tokens: filters over the vocabulary, and draws with random numbers that the caller brings.

Each function takes logits (batch, vocabulary), a NumPy or CuPy array of float32 or float64, and treats every row by itself. A
filter gives logits again, -inf for tokens that it drops, so that filters stack; the meaning of each is that of transformers:

    repetition_penalty    logits of tokens that have occurred divided by the penalty where positive, multiplied where negative
    temperature           logits / temperature
    top_k                 the k largest logits
    top_p                 the most probable tokens, as many as it takes for their probabilities to sum up to p
    min_p                 tokens at least p times as probable as the most probable one

`choose` applies them in this order. Tokens of equal logits share a fate: where the last that a filter keeps has equals, all of
them are kept, so that a token's number never decides.
"""

import math
import numbers
from dataclasses import dataclass

import numpy as np

from mambacupy import arrays

__all__ = [
    "Sampling",
    "choose",
    "draw",
    "greedy",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalise_repetition",
    "scale_temperature",
]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits.

    Parameters
    ----------
    temperature : float
        0 takes the largest logit; above, from 1e-20, a token is drawn from the probabilities of logits / temperature.
    top_k : int or None
        Draw from the k most probable tokens only.
    top_p : float or None
        Draw from the most probable tokens, as many as sum up to this probability, above 0 and up to 1.
    min_p : float or None
        Draw from tokens that are at least this many times as probable as the most probable one, from 0 to 1.
    repetition_penalty : float
        Above 1, tokens that have occurred become less probable; below 1, more; from 1e-10 to 1e10. Also with temperature 0.

    Raises
    ------
    TypeError, ValueError
        A value is of another kind or out of range, or a filter is set where nothing is drawn.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        # Bounds within which float32 logits stay finite.
        _check_number(
            "temperature", self.temperature, "a finite number, 0 (greedy) or from 1e-20", lambda x: x == 0 or x >= 1e-20
        )
        _check_number(
            "repetition_penalty", self.repetition_penalty, "a number from 1e-10 to 1e10", lambda x: 1e-10 <= x <= 1e10
        )
        if self.top_p is not None:
            _check_number("top_p", self.top_p, "a number above 0 and up to 1, or None", lambda x: 0 < x <= 1)
        if self.min_p is not None:
            _check_number("min_p", self.min_p, "a number from 0 to 1, or None", lambda x: 0 <= x <= 1)
        if self.top_k is not None:
            if not isinstance(self.top_k, numbers.Integral) or isinstance(self.top_k, bool):
                raise TypeError(f"Sampling: top_k is {self.top_k!r}, wanted an integer, or None")
            if self.top_k < 1:
                raise ValueError(f"Sampling: top_k is {self.top_k}, wanted 1 or more, or None for all tokens")
        if self.temperature == 0:
            for name in ("top_k", "top_p", "min_p"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"Sampling: {name} is {getattr(self, name)}, but temperature 0 takes the largest logit and draws "
                        "nothing; temperature=1.0 draws from the model's own probabilities"
                    )


def _check_number(name, value, wanted, holds):
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"Sampling: {name} is {value!r}, wanted {wanted}")
    if not (math.isfinite(value) and holds(value)):
        raise ValueError(f"Sampling: {name} is {value!r}, wanted {wanted}")


# ---------------------------------------------------------------------------------------------------- filters
def penalise_repetition(logits, seen, penalty):
    """Make tokens that have occurred less probable.

    Parameters
    ----------
    logits : array (batch, vocabulary)
    seen : array (batch, vocabulary) of bool
        Which tokens have occurred in each row.
    penalty : float
        Above 0; 1 changes nothing.

    Returns
    -------
    array (batch, vocabulary)
    """
    xp = arrays.namespace("penalise_repetition", logits=logits, seen=seen)
    return xp.where(seen, xp.where(logits > 0, logits / penalty, logits * penalty), logits)


def scale_temperature(logits, temperature):
    """logits / temperature, which is above 0."""
    return logits / temperature


def keep_top_k(logits, k):
    """Keep the `k` (1 or more) largest logits of each row, and all that equal the last of them."""
    xp = arrays.namespace("keep_top_k", logits=logits)
    size = logits.shape[-1]
    if k >= size:
        return logits
    least = xp.partition(logits, size - k, axis=-1)[:, size - k, None]  # (batch, 1)
    return _drop(xp, logits, logits < least)


def keep_top_p(logits, p):
    """Keep the most probable tokens of each row: those before which less than `p` (above 0, up to 1) has been summed up."""
    xp = arrays.namespace("keep_top_p", logits=logits)
    if p >= 1:
        return logits
    falling = -xp.sort(-logits, axis=-1)
    weights = _weights(xp, falling)
    before = xp.cumsum(weights, axis=-1) - weights
    kept = (before < p * weights.sum(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True)  # (batch, 1), the first at least
    least = xp.take_along_axis(falling, xp.maximum(kept, 1) - 1, axis=-1)
    return _drop(xp, logits, logits < least)


def keep_min_p(logits, p):
    """Keep tokens of each row whose probability is at least `p` (0 to 1) times the largest."""
    xp = arrays.namespace("keep_min_p", logits=logits)
    return _drop(xp, logits, _weights(xp, logits) < p)


def _weights(xp, logits):
    """Probabilities divided by the largest, in float64: small ones add up over a vocabulary."""
    logits = logits.astype(np.float64)
    return xp.exp(logits - logits.max(axis=-1, keepdims=True))


def _drop(xp, logits, dropped):
    return xp.where(dropped, xp.asarray(-np.inf, logits.dtype), logits)


# ---------------------------------------------------------------------------------------------------- tokens
def greedy(logits):
    """The token of the largest logit in each row, the first of equals: (batch,) of int64."""
    return logits.argmax(axis=-1)


def draw(logits, uniforms):
    """Draw a token of each row from the probabilities of its logits, by inverting their cumulative sum.

    Parameters
    ----------
    logits : array (batch, vocabulary)
        At least one of each row is finite.
    uniforms : array (batch,)
        float64, from 0 to below 1: the same number and logits give the same token.

    Returns
    -------
    array (batch,) of int64
    """
    xp = arrays.namespace("draw", logits=logits, uniforms=uniforms)
    sums = xp.cumsum(_weights(xp, logits), axis=-1)
    total = sums[:, -1]
    target = xp.minimum(uniforms * total, xp.nextafter(total, xp.zeros_like(total)))  # a product may round up to the total
    return (sums <= target[:, None]).sum(axis=-1)


def choose(logits, sampling, uniforms=None, seen=None):
    """A token for each row.

    Parameters
    ----------
    logits : array (batch, vocabulary)
    sampling : Sampling
    uniforms : array (batch,), optional
        As `draw` takes them. Not used where the temperature is 0.
    seen : array (batch, vocabulary) of bool, optional
        As `penalise_repetition` takes it. Not used where the penalty is 1.

    Returns
    -------
    array (batch,) of int64
    """
    if sampling.repetition_penalty != 1:
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return greedy(logits)
    logits = scale_temperature(logits, sampling.temperature)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return draw(logits, uniforms)
