"""The step of generation on a GPU: everything allocated once, all launches captured into one CUDA graph."""

import functools

from mambacupy import arrays
from mambacupy.decode_step import DecodeStep
from mambacupy.ops import products
from mambacupy.overlapping import OverlapError

__all__ = ["Decoder"]

WIDEST_FILTER, MOST_STATES = 16, 256
"""Up to which the kernels keep a convolution's filter and a channel's states in registers."""


class Decoder:
    """One token of each of `batch` sequences through a model on a GPU, with no allocation and no host in between.

    Parameters
    ----------
    model : MambaLM
        One that `takes` takes.
    params : dict
        CuPy arrays. They are read where they lie, and must not be written to while the decoder is used; matrices of another
        dtype than the model computes in are copied.
    batch : int
        1 or more.
    graph : bool
        Capture the launches. Otherwise they are made one by one at each step.
    overlap : bool
        Let a kernel begin while the one in front of it ends, where the device can (compute capability 9.0) and a graph is made.

    Attributes
    ----------
    state : tuple of State
        What `model.advance(params, prompt, decoder.state, …)` reads and writes, and each step after it.
    tokens : cupy.ndarray (batch,) of int64
        After a step: the most probable token of each sequence. The next step reads it.
    logits : cupy.ndarray (batch, padded_vocab_size)
        Of the last step.

    Examples
    --------
    >>> decoder = Decoder(model, params, batch=1)
    >>> logits = model.advance(params, prompt, decoder.fresh_state(), last_only=True)[:, 0]
    >>> logits = decoder.step(logits.argmax(-1))
    >>> logits = decoder.step()                                            # goes on with the most probable token

    Raises
    ------
    TypeError, ValueError
        The model is one that `takes` does not take, params are not on a GPU, or batch is not 1 or more.
    """

    def __init__(self, model, params, batch, *, graph=True, overlap=True):
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise ValueError(f"Decoder: batch is {batch!r}, wanted an integer, 1 or more")
        weight = model._check_params(params)
        xp = arrays.library_of("Decoder", "params['embedding']['weight']", weight)
        if xp.__name__ == "numpy":
            raise TypeError("Decoder: params are NumPy arrays, wanted CuPy's; map_params(cupy.asarray, params) moves them")
        if not self.takes(model, params):
            raise ValueError(
                "Decoder: wanted a model that computes in float16, bfloat16 or float32, with d_conv up to "
                f"{WIDEST_FILTER} and d_state up to {MOST_STATES}; others go through model.advance"
            )
        self.model, self.params, self.batch, self.device = model, params, batch, weight.device
        with self.device:
            model.advance(params, xp.zeros((1, 1), "int64"))  # complains of whatever in params is not the model's
            capability = int(self.device.compute_capability)
            options = {"tensor_cores": capability >= 80, "library": products.available(xp)}
            make = functools.partial(DecodeStep, xp, model, params, batch, **options)
            self._stream = xp.cuda.Stream(non_blocking=True)
            self._graph, self._step = None, make(overlap=bool(overlap and graph and capability >= 90))
            try:
                self._warm_up(xp)
            except OverlapError:  # an older driver
                self._step = make(overlap=False)
                self._warm_up(xp)
            if graph:
                self._capture()
        self.state, self.tokens, self.logits = self._step.state, self._step.tokens, self._step.logits

    @staticmethod
    def takes(model, params):
        """Whether the kernels are made for this model."""
        config, dtype = model.config, model._dtype(params["embedding"]["weight"])
        return dtype.itemsize <= 4 and config.d_conv <= WIDEST_FILTER and config.d_state <= MOST_STATES

    def check(self, model, params, batch):
        """Complain unless this decoder is one for these."""
        if model != self.model or params is not self.params or batch != self.batch:
            raise ValueError(
                f"generate: decoder is one for {self.batch} sequences and other params or another model; "
                f"wanted Decoder(model, params, {batch})"
            )

    def fresh_state(self):
        """`state`, filled with zeros: before a text begins."""
        with self.device:
            self._step.clear()
        return self.state

    def step(self, tokens=None):
        """Go on by one token.

        Parameters
        ----------
        tokens : cupy.ndarray (batch,) of integers, optional
            The next token of each sequence. None, or `self.tokens`: the most probable.

        Returns
        -------
        cupy.ndarray (batch, padded_vocab_size)
            `self.logits`, which the next step writes over.
        """
        with self.device:
            if tokens is not None and tokens is not self.tokens:
                self.tokens[...] = tokens
            if self._graph is None:
                self._step.run()
            else:
                self._graph.launch()
        return self.logits

    def _warm_up(self, xp):
        """Run once, so that all kernels are compiled and loaded."""
        xp.cuda.get_current_stream().synchronize()  # what was allocated and copied there is used in another stream
        with self._stream:
            self._step.run()
        self._stream.synchronize()
        self._step.clear()

    def _capture(self):
        with self._stream:
            self._stream.begin_capture()
            try:
                self._step.run()
            finally:
                self._graph = self._stream.end_capture()
