"""The Mamba language model: embedding, blocks along a residual stream, a final norm, and a head.

After "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu & Dao, 2023), section 3.4; parameters are named as
in the published checkpoints.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from mambacupy import arrays
from mambacupy.layers import Block, Checkpoint, Embedding, LayerNorm, Linear, MambaMixer, RMSNorm
from mambacupy.models.config import MambaConfig

__all__ = ["MambaLM"]


@dataclass(frozen=True)
class MambaLM:
    """A language model: integers `(batch, length)` in, logits `(batch, length, padded_vocab_size)` out.

    Parameters
    ----------
    config : MambaConfig
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        What the model computes in. None: the dtype of its parameters. Parameters in float32 and "bfloat16" here train in mixed
        precision: gradients are float32.
    checkpoint : bool
        Keep only what enters each block, and run the blocks again for the gradient: `mambacupy.layers.Checkpoint`.

    Notes
    -----
    params: {"embedding": {"weight"}, "layers": [{"norm", "mixer"}, …], "norm_f": {"weight"}}, and "lm_head": {"weight"} if
    the head is not tied to the embedding. `mambacupy.layers.MambaMixer` lists what a mixer has.

    **State.** A tuple with one `State(conv, ssm)` per block, made by `init_state`, is read and written in place: afterwards it
    is the state after the tokens. The whole of a text, its parts in turn and its tokens one by one give the same logits. The
    arrays are all there is to save. To backprop the state that came is a constant.

    **Padding.** mask (batch, length) is True where there is a token. Wherever padding lies, before, after or between, the
    tokens of a row follow each other as if it were not there: no padding reaches a convolution, a state or a gradient. Logits
    at padding are 0. Rows without any token keep their state.

    Examples
    --------
    >>> model = MambaLM(MambaConfig(d_model=64, n_layer=2, vocab_size=256))
    >>> params = model.init(numpy.random.default_rng(0))
    >>> logits, backprop = model(params, tokens)                           # to train
    >>> grads = backprop(dlogits)
    >>> state = model.init_state(params, batch=1)                          # to generate
    >>> logits = model.advance(params, prompt, state, last_only=True)
    >>> logits = model.advance(params, logits[..., : model.config.vocab_size].argmax(-1), state)
    """

    config: MambaConfig
    dtype: str | None = None
    checkpoint: bool = False

    def __post_init__(self):
        if not isinstance(self.config, MambaConfig):
            raise TypeError(f"MambaLM: config is of type {type(self.config).__qualname__}, wanted a MambaConfig")
        if self.dtype is not None and self.dtype not in arrays.FLOAT_DTYPES:
            raise ValueError(f"MambaLM: dtype is {self.dtype!r}, wanted one of {', '.join(arrays.FLOAT_DTYPES)}, or None")

    # ------------------------------------------------------------------------------------------------ parts
    @cached_property
    def embedding(self):
        """The layer that turns tokens into vectors."""
        return Embedding(self.config.padded_vocab_size, self.config.d_model, self.dtype)

    @cached_property
    def block(self):
        """The layer that is repeated n_layer times, each time with parameters of its own."""
        mixer = MambaMixer(**{field.name: getattr(self.config, field.name) for field in fields(MambaMixer)})
        return Block(self.norm, mixer, self.config.residual_in_fp32)

    @cached_property
    def norm(self):
        """The norm of each block and of what comes after the last."""
        return (RMSNorm if self.config.rms_norm else LayerNorm)(self.config.d_model, self.config.norm_eps)

    @cached_property
    def head(self):
        """The layer that turns vectors into logits."""
        return Linear(self.config.d_model, self.config.padded_vocab_size)

    # ------------------------------------------------------------------------------------------------ parameters and state
    def init(self, rng, dtype=np.float32):
        """Parameters drawn from a `numpy.random.Generator`, as NumPy arrays."""
        params = {
            "embedding": self.embedding.init(rng, dtype),
            "layers": [self.block.init(rng, dtype) for _ in range(self.config.n_layer)],
            "norm_f": self.norm.init(rng, dtype),
        }
        return params if self.config.tie_embeddings else params | {"lm_head": self.head.init(rng, dtype)}

    def init_state(self, params, batch):
        """The state before the first token of `batch` rows, where the parameters lie: a tuple with one `State` per block."""
        weight = self._check_params(params)
        xp, n_layer = arrays.library_of("MambaLM", "params", weight), self.config.n_layer
        whole = self.block.mixer.init_state(xp, n_layer * batch, self._dtype(weight))  # in two allocations
        return tuple(type(whole)(*(x[i * batch : (i + 1) * batch] for x in whole)) for i in range(n_layer))

    @classmethod
    def from_pretrained(cls, folder, *, dtype=None, checkpoint=False, **options):
        """`(model, params)` of a checkpoint; `options` are those of `mambacupy.weights.load`."""
        from mambacupy import weights

        config, params = weights.load(folder, **options)
        return cls(config, dtype, checkpoint), params

    def save_pretrained(self, params, folder, *, force=False):
        """Write a checkpoint that `from_pretrained` reads: `mambacupy.weights.save`."""
        from mambacupy import weights

        weights.save(self.config, params, folder, force=force)

    # ------------------------------------------------------------------------------------------------ the model
    def __call__(self, params, tokens, state=None, mask=None):
        """Logits, and what the gradient needs.

        Parameters
        ----------
        params : dict
            Of `init` or `from_pretrained`, NumPy or CuPy arrays.
        tokens : array (batch, length) of integers
            What stands at padding does not matter.
        state : tuple of State, optional
            The state before the tokens; written to. None: a text begins.
        mask : array (batch, length) of bool, optional
            True where there is a token. None: everywhere.

        Returns
        -------
        logits : array (batch, length, padded_vocab_size)
            In the dtype that the model computes in.
        backprop : callable
            `backprop(dlogits) -> grads`: gradients built and typed as params. Tokens have no gradient and are not mentioned.

        Raises
        ------
        TypeError, ValueError
            A kind, dtype or shape does not fit; the message names it.
        """
        places, lengths, tokens, state = self._check(params, tokens, state, mask)
        block = Checkpoint(self.block) if self.checkpoint else self.block
        x, embedding_backward = self.embedding(params["embedding"], tokens)
        backward = []
        for i, layer_params in enumerate(params["layers"]):
            x, backprop_layer = block(layer_params, x, state and state[i], lengths)
            backward.append(backprop_layer)
        hidden, norm_backward = self.norm(params["norm_f"], x)
        if places is not None:
            hidden = places.take(hidden)
        logits, head_backward = self.head(self._head_params(params), hidden)

        def backprop(dlogits):
            if getattr(dlogits, "shape", None) != logits_shape:
                came = getattr(dlogits, "shape", f"(type {type(dlogits).__qualname__})")
                raise ValueError(f"MambaLM: dlogits has shape {came}, wanted {logits_shape}")
            dhidden, head_grads = head_backward(dlogits)
            if places is not None:
                dhidden = places.put(dhidden)
            dx, norm_grads = norm_backward(dhidden)
            layer_grads = []
            for backprop_layer in reversed(backward):
                dx, grads = backprop_layer(dx)
                layer_grads.append(grads)
            _, embedding_grads = embedding_backward(dx)
            grads = {"embedding": embedding_grads, "layers": layer_grads[::-1], "norm_f": norm_grads}
            if not self.config.tie_embeddings:
                return grads | {"lm_head": head_grads}
            embedding_grads["weight"] += head_grads["weight"]
            return grads

        logits_shape = logits.shape
        return logits, backprop

    def advance(self, params, tokens, state=None, mask=None, *, last_only=False):
        """Logits, and nothing kept: for a prompt, a part of a text, or a single token per row.

        Parameters are those of `__call__`, and

        last_only : bool
            Only the logits of each row's last token: (batch, 1, padded_vocab_size); 0 in rows without any.

        Returns
        -------
        logits : array (batch, length, padded_vocab_size)
        """
        places, lengths, tokens, state = self._check(params, tokens, state, mask)
        x, _ = self.embedding(params["embedding"], tokens)
        for i, layer_params in enumerate(params["layers"]):
            x = self.block.advance(layer_params, x, state and state[i], lengths)
        if last_only:
            pick = _last if lengths is None else lambda part: _last_of(part, lengths)
            x = tuple(pick(part) for part in x) if isinstance(x, tuple) else pick(x)
        hidden, _ = self.norm(params["norm_f"], x)
        if places is not None and not last_only:
            hidden = places.take(hidden)
        return self.head(self._head_params(params), hidden)[0]

    # ------------------------------------------------------------------------------------------------ what comes in
    def _head_params(self, params):
        return params["embedding" if self.config.tie_embeddings else "lm_head"]

    def _dtype(self, weight):
        return arrays.FLOAT_DTYPES[self.dtype] if self.dtype else weight.dtype

    def _check_params(self, params):
        """The embedding's weight, of parameters with all parts."""
        wanted = {"embedding", "layers", "norm_f"} | (set() if self.config.tie_embeddings else {"lm_head"})
        if not isinstance(params, dict):
            names = ", ".join(sorted(wanted))
            raise TypeError(f"MambaLM: params is of type {type(params).__qualname__}, wanted a dict with {names}")
        for name in sorted(wanted - params.keys()):
            raise ValueError(f"MambaLM: params has no {name!r}; it has {', '.join(params)}")
        for name in sorted(params.keys() - wanted):
            tied = ", because tie_embeddings is True" if name == "lm_head" else ""
            raise ValueError(f"MambaLM: params has {name!r}, which this model does not use{tied}")
        if len(params["layers"]) != self.config.n_layer:
            raise ValueError(f"MambaLM: params['layers'] has {len(params['layers'])} entries, wanted {self.config.n_layer}")
        return params["embedding"]["weight"]

    def _check(self, params, tokens, state, mask):
        """Where tokens stood before the padding went behind them, and how many each row has (both None without a mask); the
        tokens in that order; the state."""
        weight = self._check_params(params)
        xp = check_tokens("MambaLM", tokens, mask, weight)
        if state is not None and (not isinstance(state, (tuple, list)) or len(state) != self.config.n_layer):
            came = f"{len(state)} entries" if isinstance(state, (tuple, list)) else f"type {type(state).__qualname__}"
            raise ValueError(f"MambaLM: state has {came}, wanted a tuple of {self.config.n_layer}, as init_state gives")
        for part in state or ():  # all of them before a block writes to its own
            self.block.mixer.check_state(part, weight, len(tokens), self._dtype(weight))
        if mask is None or not tokens.shape[1]:
            return None, None, tokens, state or None
        places = _Places(xp, mask)
        return places, mask.sum(axis=1), places.put(tokens), state or None


def check_tokens(operation, tokens, mask, weight):
    """The array library of tokens (batch, length), of a mask of their shape if there is one, and of the embedding's weight."""
    xp = arrays.namespace(operation, tokens=tokens, mask=mask, **{"params['embedding']['weight']": weight})
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"{operation}: tokens is {arrays.dtype_name(tokens.dtype)}, wanted integers")
    if tokens.ndim != 2:
        hint = "; a single row is tokens[None]" if tokens.ndim == 1 else ""
        raise ValueError(f"{operation}: tokens has shape {tokens.shape}, wanted (batch, length){hint}")
    if mask is not None and mask.dtype != bool:
        raise TypeError(f"{operation}: mask is {arrays.dtype_name(mask.dtype)}, wanted bool; write mask.astype(bool)")
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(f"{operation}: mask has shape {mask.shape}, wanted {tokens.shape}, the shape of tokens")
    return xp


class _Places:
    """The way between rows with padding anywhere and rows with their tokens first.

    With all padding behind the tokens, nothing that runs forwards in time can see it.
    """

    def __init__(self, xp, mask):
        self.xp, self.mask = xp, mask
        tokens, padding = mask.cumsum(axis=1), (~mask).cumsum(axis=1)  # (batch, length)
        after = tokens[:, -1:] + padding - 1
        self.place = xp.where(mask, tokens - 1, after)  # (batch, length): where each goes
        self.row = xp.arange(mask.shape[0])[:, None]

    def put(self, x):
        """(batch, length, …) in the order of the mask -> tokens first; 0 at padding."""
        moved = self.xp.empty_like(x)
        moved[self.row, self.place] = self._blank(x)
        return moved

    def take(self, x):
        """(batch, length, …) with tokens first -> in the order of the mask; 0 at padding."""
        return self._blank(x[self.row, self.place])

    def _blank(self, x):
        mask = self.mask.reshape(self.mask.shape + (1,) * (x.ndim - 2))  # (batch, length, 1, …)
        return arrays.choose(self.xp, ~mask, 0, x)


def _last(x):
    """(batch, length, d_model) -> (batch, 1, d_model), 0 of none"""
    return x[:, -1:] if x.shape[1] else arrays.namespace("MambaLM", x=x).zeros((x.shape[0], 1, x.shape[2]), x.dtype)


def _last_of(x, lengths):
    """(batch, length, d_model) -> (batch, 1, d_model): the last of so many, 0 of none."""
    xp = arrays.namespace("MambaLM", x=x)
    last = x[xp.arange(x.shape[0]), xp.maximum(lengths, 1) - 1][:, None]
    return arrays.choose(xp, (lengths <= 0)[:, None, None], 0, last)
