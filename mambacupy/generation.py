"""Text from a language model, token by token.

    made = generate(model, params, tokens, 100, temperature=0.8, top_p=0.95, seed=1, stop=0)
    made.tokens                                                            (batch, new), made.lengths (batch,)

The prompt goes through the model whole, then each new token by itself with the state carried. How a token is chosen from its
logits is `mambacupy.sampling`'s. On a GPU the step is a `mambacupy.decoder.Decoder`: one captured CUDA graph.
"""

import contextlib
import numbers
from typing import Any, NamedTuple

import numpy as np

from mambacupy import arrays
from mambacupy.models.mamba import MambaLM, check_tokens
from mambacupy.sampling import Sampling, choose

__all__ = ["Generated", "generate", "pad_prompts"]

STEPS_OF_NUMBERS = 1024
"""Steps whose random numbers are drawn, and go to the GPU, together."""


class Generated(NamedTuple):
    """New tokens.

    tokens (batch, new) of int64, the prompt not among them: what follows a row's stop token is the pad token. `new` is the
    longest row's length. lengths (batch,) of int64: new tokens of each row, the stop token counted.
    """

    tokens: Any
    lengths: Any


def generate(
    model,
    params,
    tokens,
    max_new_tokens,
    *,
    mask=None,
    temperature=0.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=1.0,
    seed=None,
    stop=(),
    pad=None,
    on_step=None,
    decoder=None,
):
    """Go on from prompts.

    Parameters
    ----------
    model : MambaLM
    params : dict
        Its parameters, NumPy or CuPy arrays.
    tokens : array (batch, length) of integers
        A prompt in each row, of the library of params, from 0 to vocab_size - 1.
    max_new_tokens : int
        Tokens to make for each row.
    mask : array (batch, length) of bool, optional
        True where there is a token, at least one in each row. Padding may stand anywhere; `pad_prompts` makes tokens and mask
        of lists of different lengths. None: everywhere.
    temperature, top_k, top_p, min_p, repetition_penalty
        As `mambacupy.sampling.Sampling` takes them. By default the most probable token is taken. The penalty counts the prompt.
    seed : int, optional
        The same seed, prompts and options give the same tokens, also on a GPU where its logits are those of the host. None
        draws anew each time.
    stop : int or sequence of int
        Tokens after which a row is complete. Generation ends when all rows are, each at its own step.
    pad : int, optional
        What fills a row after its stop token. By default that is the first of `stop`, or 0.
    on_step : callable, optional
        Called after each step with a NumPy array (batch,) of int64, its tokens, `pad` in rows that were complete before. If it
        returns True, generation ends.
    decoder : Decoder, optional
        On a GPU: one made before for this model, these params and this batch, which saves the time to make it.

    Returns
    -------
    Generated
        In the library of `tokens`.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit; the message names it.

    Notes
    -----
    Columns of the logits beyond vocab_size, which only round the vocabulary up, are never chosen. Random numbers are drawn on
    the host by `numpy.random.default_rng(seed)`, one a row and step. On a GPU the next step is under way while a step's tokens
    come to the host.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    xp, host_tokens, host_mask = _check_prompt(model, params, tokens, mask)
    _check_integer("max_new_tokens", max_new_tokens, least=0)
    if seed is not None:
        _check_integer("seed", seed, least=0)
    vocabulary, batch = model.config.vocab_size, len(host_tokens)
    stops = _stops(stop, vocabulary)
    if pad is not None:
        _check_integer("pad", pad)
    pad = pad if pad is not None else stops[0] if stops else 0
    if on_step is not None and not callable(on_step):
        raise TypeError(f"generate: on_step is of type {type(on_step).__qualname__}, wanted a function of an array")

    made, lengths = [], np.zeros(batch, np.int64)
    going = np.ones(batch, bool)
    with contextlib.nullcontext() if xp is np else tokens.device:
        if batch and max_new_tokens:
            steps = _Steps(xp, model, params, decoder, batch)
            picks = _Picks(xp, sampling, vocabulary, seed, batch, max_new_tokens, host_tokens, host_mask)
            for now in _steps(steps, picks, tokens, mask, max_new_tokens):
                now = np.where(going, now, pad)
                lengths += going
                going &= ~np.isin(now, stops)
                made.append(now)
                if (on_step is not None and on_step(now.copy()) is True) or not going.any():
                    break
        found = np.stack(made, axis=1) if made else np.empty((batch, 0), np.int64)  # (batch, new)
        return Generated(xp.asarray(found), xp.asarray(lengths))


def pad_prompts(prompts, pad=0):
    """Prompts of different lengths as one array, each at the end of its row.

    Parameters
    ----------
    prompts : sequence of sequences of int
    pad : int
        What stands before shorter ones.

    Returns
    -------
    tokens : numpy.ndarray (batch, length) of int64
    mask : numpy.ndarray (batch, length) of bool
        True where there is a token.

    Raises
    ------
    TypeError
        A prompt is no flat sequence of integers.
    """
    rows = [np.asarray(prompt) for prompt in prompts]
    for i, row in enumerate(rows):
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
            raise TypeError(f"pad_prompts: prompts[{i}] is {row.dtype} {row.shape}, wanted integers (length,)")
    length = max(map(len, rows), default=0)
    tokens, mask = np.full((len(rows), length), pad, np.int64), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    return tokens, mask


# ---------------------------------------------------------------------------------------------------- the gate
def _check_prompt(model, params, tokens, mask):
    """The array library; tokens and mask on the host."""
    if not isinstance(model, MambaLM):
        raise TypeError(f"generate: model is of type {type(model).__qualname__}, wanted a MambaLM")
    xp = check_tokens("generate", tokens, mask, model._check_params(params))
    host = tokens if xp is np else tokens.get()
    there = np.ones(host.shape, bool) if mask is None else mask if xp is np else mask.get()
    empty = np.flatnonzero(~there.any(axis=1))
    if empty.size:
        name = "mask" if mask is not None else "tokens"
        raise ValueError(f"generate: row {empty[0]} of {name} has no token, wanted at least one to go on from")
    vocabulary = model.config.vocab_size
    wrong = there & ((host < 0) | (host >= vocabulary))
    if wrong.any():
        place = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"generate: tokens{list(place)} is {host[place]}, wanted 0 to {vocabulary - 1}")
    return xp, host, there


def _check_integer(name, value, least=None):
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"generate: {name} is {value!r}, wanted an integer")
    if least is not None and value < least:
        raise ValueError(f"generate: {name} is {value}, wanted {least} or more")


def _stops(stop, vocabulary):
    stops = [stop] if isinstance(stop, numbers.Integral) and not isinstance(stop, bool) else stop
    try:
        stops = list(stops)
    except TypeError:
        raise TypeError(f"generate: stop is {stop!r}, wanted a token or a sequence of tokens") from None
    for token in stops:
        _check_integer("stop", token)
        if not 0 <= token < vocabulary:
            raise ValueError(f"generate: stop is {token}, wanted tokens from 0 to {vocabulary - 1}")
    return stops


# ---------------------------------------------------------------------------------------------------- the loop
def _steps(steps, picks, tokens, mask, count):
    """The tokens of each step, (batch,) on the host; each step is made when it is asked for, on a GPU one ahead."""
    logits = steps.begin(tokens, mask)
    for step in range(count):
        chosen = steps.best if picks.are_largest and steps.best is not None else picks.choose(logits, step)
        arrive, more = steps.fetch(chosen), step + 1 < count
        try:
            if more and steps.ahead:
                logits = steps.advance(chosen)
        finally:  # what is on its way is waited for: it is written to memory of the host
            arrived = arrive()
        yield arrived
        if more and not steps.ahead:
            logits = steps.advance(chosen)


class _Steps:
    """From tokens (batch,) to the logits of what follows, with the state carried."""

    def __init__(self, xp, model, params, decoder, batch):
        self.xp, self.model, self.params = xp, model, params
        self.ahead = xp is not np  # the GPU can work while the host looks at the last tokens
        self.best = None  # the token of the largest logit, where the step itself gives it
        self.slot = None
        if decoder is not None:
            decoder.check(model, params, batch)
        elif xp is not np:
            from mambacupy.decoder import Decoder

            decoder = Decoder(model, params, batch) if Decoder.takes(model, params) else None
        self.decoder = decoder
        self.state = model.init_state(params, batch) if decoder is None else decoder.fresh_state()

    def begin(self, tokens, mask):
        """Logits after the prompts."""
        return self.model.advance(self.params, tokens, self.state, mask, last_only=True)[:, 0]  # (batch, 1, …) -> (batch, …)

    def advance(self, tokens):
        if self.decoder is None:
            return self.model.advance(self.params, tokens[:, None], self.state)[:, 0]
        logits = self.decoder.step(tokens)
        self.best = self.decoder.tokens
        return logits

    def fetch(self, tokens):
        """Start to copy tokens to the host; what is returned waits for them."""
        if not self.ahead:
            return lambda: tokens
        slot = self.slot = self.slot or _Slot(self.xp, tokens.shape)
        stream = self.xp.cuda.get_current_stream()
        # A kernel writes into the host's memory: a copy is another unit's work, for which the GPU stands still twice.
        self.xp.positive(tokens, out=slot.on_device)
        copied = stream.record()

        def arrive():
            copied.synchronize()
            return slot.on_host.copy()

        return arrive


class _Slot:
    """Tokens in memory of the host that the GPU can write to."""

    def __init__(self, xp, shape):
        import cupyx

        self.on_host = cupyx.empty_pinned(shape, np.int64)
        device = xp.cuda.runtime.getDevice()  # or it would be that of whoever had this memory before
        memory = xp.cuda.UnownedMemory(self.on_host.ctypes.data, self.on_host.nbytes, self.on_host, device)
        self.on_device = xp.ndarray(shape, np.int64, xp.cuda.MemoryPointer(memory, 0))


class _Picks:
    """From logits to tokens, with all that the choice needs besides."""

    def __init__(self, xp, sampling, vocabulary, seed, batch, steps, tokens, mask):
        self.sampling, self.vocabulary = sampling, vocabulary
        self.are_largest = sampling.temperature == 0 and sampling.repetition_penalty == 1
        self.xp, self.shape, self.rng = xp, (min(steps, STEPS_OF_NUMBERS), batch), np.random.default_rng(seed)
        self.uniforms = self.seen = None
        if sampling.repetition_penalty != 1:
            seen = np.zeros((batch, vocabulary), bool)
            rows, places = np.nonzero(mask)
            seen[rows, tokens[rows, places]] = True
            self.seen, self.row = xp.asarray(seen), xp.arange(batch)

    def choose(self, logits, step):
        """(batch, padded_vocab_size) -> (batch,)"""
        logits = logits[:, : self.vocabulary]
        logits = logits.astype(arrays.compute_dtype(logits.dtype), copy=False)
        if self.sampling.temperature > 0:
            turn = step % STEPS_OF_NUMBERS
            if turn == 0:
                self.uniforms = self.xp.asarray(self.rng.random(self.shape))
            uniforms = self.uniforms[turn]
        else:
            uniforms = None
        chosen = choose(logits, self.sampling, uniforms, self.seen)
        if self.seen is not None:
            self.seen[self.row, chosen] = True
        return chosen
