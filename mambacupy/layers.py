"""Layers: hyper-parameters in a frozen dataclass, parameters outside it, gradients in a closure.

    params = layer.init(rng)                        nested dicts of NumPy arrays, float32 unless another dtype is asked for
    y, backprop = layer(params, x)
    dx, grads = backprop(dy)                        grads is nested as params is, and has its dtypes

There is no registry, no mode and no tape: who drops `backprop` has run inference. Parameters may be NumPy or CuPy arrays;
`map_params(cupy.asarray, params)` moves them. The dtype of x decides what a layer computes in: float32 parameters are rounded
to bfloat16 where a bfloat16 x meets them, and their gradients come back in float32.

The mixer and its initialisation are those of "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu & Dao,
2023), sections 3.4 and 3.6.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mambacupy import arrays, checks_dense
from mambacupy.ops.causal_conv1d import causal_conv1d_bwd, causal_conv1d_fwd, causal_conv1d_update
from mambacupy.ops.linear import LinearSaved, embedding_bwd, embedding_fwd, linear_bwd, linear_fwd
from mambacupy.ops.norm import layer_norm_bwd, layer_norm_fwd, rms_norm_bwd, rms_norm_fwd
from mambacupy.ops.scan_constants import scan_constants
from mambacupy.ops.selective_scan import SelectiveScanSaved, selective_scan, selective_scan_bwd, selective_scan_fwd
from mambacupy.ops.selective_state_update import selective_state_update
from mambacupy.ops.training import rounded

__all__ = [
    "Block",
    "Checkpoint",
    "Embedding",
    "LayerNorm",
    "Linear",
    "MambaMixer",
    "MixerSaved",
    "RMSNorm",
    "Residual",
    "Serial",
    "State",
    "map_params",
]

STANDSTILL = -1e4
"""A delta whose softplus is exactly 0 in every dtype and with every bias that occurs: the state stays as it is."""


class State(NamedTuple):
    """What a mixer carries from one token to the next. Plain arrays: `mambacupy.optim.save` keeps them.

    conv (batch, d_inner, d_conv - 1), the last inputs of the convolution, in the dtype that the layer computes in;
    ssm (batch, d_inner, d_state), float32 at least.
    """

    conv: Any
    ssm: Any

    def copy(self):
        """The same numbers in memory of their own."""
        return State(self.conv.copy(), self.ssm.copy())


# ---------------------------------------------------------------------------------------------------- parameters
def map_params(function, params, *more):
    """Apply a function to every array of a nest of dicts, lists and tuples.

    Parameters
    ----------
    function : callable
        Gets one array of `params`, and the arrays at the same place of each of `more`.
    params, *more
        Nests of the same build. None stays None.

    Returns
    -------
    nest
        Built as `params`, of what the function returned.

    Examples
    --------
    >>> params = map_params(cupy.asarray, params)
    >>> params = map_params(lambda p, g: p - 0.01 * g, params, grads)
    """
    if isinstance(params, dict):
        return {key: map_params(function, value, *(nest[key] for nest in more)) for key, value in params.items()}
    if isinstance(params, (list, tuple)):
        parts = [map_params(function, *values) for values in zip(params, *more, strict=True)]
        return type(params)(*parts) if hasattr(params, "_fields") else type(params)(parts)
    return None if params is None else function(params, *more)


def _check_params(layer, params, shapes, place="params"):
    """Complain unless `params` is nested and shaped as `shapes`: {name: shape, or such a dict}."""
    if not isinstance(params, dict):
        raise TypeError(f"{layer}: {place} is of type {type(params).__qualname__}, wanted a dict with {', '.join(shapes)}")
    if params.keys() != shapes.keys():
        missing = [name for name in shapes if name not in params]
        if missing:
            raise ValueError(f"{layer}: {place} has no {missing[0]!r}, wanted {', '.join(shapes)}")
        extra = [name for name in params if name not in shapes]
        raise ValueError(f"{layer}: {place} has {extra[0]!r}, which this layer does not use; wanted {', '.join(shapes)}")
    for name, wanted in shapes.items():
        if isinstance(wanted, dict):
            _check_params(layer, params[name], wanted, f"{place}[{name!r}]")
        elif getattr(params[name], "shape", None) != wanted:
            came = getattr(params[name], "shape", None)
            came = f"has shape {came}" if came is not None else f"is of type {type(params[name]).__qualname__}"
            raise ValueError(f"{layer}: {place}[{name!r}] {came}, wanted {wanted}")


def _check_input(layer, x, size, axes="…"):
    """Complain unless x is an array whose last axis has that size, and that has so many axes where `axes` names them."""
    arrays.library_of(layer, "x", x)
    if x.dtype not in arrays.FLOAT_DTYPES.values():
        names = ", ".join(arrays.FLOAT_DTYPES)
        raise TypeError(f"{layer}: x is {arrays.dtype_name(x.dtype)}, wanted one of {names}")
    if not x.ndim or x.shape[-1] != size or (axes != "…" and x.ndim != axes.count(",") + 2):
        raise ValueError(f"{layer}: x has shape {x.shape}, wanted ({axes}, {size})")


def _uniform(rng, shape, bound, dtype):
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"init: rng is of type {type(rng).__qualname__}, wanted numpy.random.default_rng(seed)")
    return rng.uniform(-bound, bound, shape).astype(dtype)


def _linear_init(rng, inputs, outputs, bias, dtype, scale=1.0):
    """Kaiming-uniform weights with a = √5, which is U(±1/√inputs); a bias starts at 0."""
    params = {"weight": _uniform(rng, (outputs, inputs), scale / math.sqrt(inputs), dtype)}
    return params | {"bias": np.zeros(outputs, dtype)} if bias else params


def _cast(x, dtype):
    return x if x is None or x.dtype == dtype else x.astype(dtype)


def _cast_together(weights, dtype):
    """Weights as an operation on arrays of `dtype` takes them: in that dtype or the one of its arithmetic, all in one."""
    of_arithmetic = arrays.compute_dtype(dtype)
    kinds = {p.dtype for p in weights.values() if p is not None}
    kind = kinds.pop() if len(kinds) == 1 else of_arithmetic
    return {name: _cast(p, kind if kind == dtype else of_arithmetic) for name, p in weights.items()}


def _like(grads, params):
    """Gradients in the dtypes of their parameters."""
    return map_params(lambda p, g: _cast(g, p.dtype), params, grads)


# ---------------------------------------------------------------------------------------------------- products, by parameters
class _Rounded(dict):
    """Parameters of a linear map that bring `rounded`, their weight as the map would round it."""


def round_weights(params, maps, like, dtype):
    """Parameters whose linear maps need not round their weights, once for what they give and once more for the gradient: one
    launch has done it for all.

    Parameters
    ----------
    params : nest
    maps : collection of str
        Names of dicts in `params` that are parameters of linear maps.
    like : array
        Which weights: those of its library, device and dtype.
    dtype : dtype
        What the maps will compute in.

    Returns
    -------
    nest
        Of the same arrays, for layers. The rounded weights last as long as it does.
    """
    found = []

    def rebuilt(nest, name=None):
        if isinstance(nest, (list, tuple)):
            return [rebuilt(part) for part in nest]
        if not isinstance(nest, dict):
            return nest
        if name not in maps or _kind(nest.get("weight")) != _kind(like):
            return {key: rebuilt(value, key) for key, value in nest.items()}
        found.append(_Rounded(nest))
        return found[-1]

    made = rebuilt(params)
    for one, weight in zip(found, rounded([one["weight"] for one in found], dtype) if found else (), strict=True):
        one.rounded = weight
    return made


def _kind(x):
    return type(x), getattr(x, "dtype", None), getattr(x, "device", None)


def _weight(params, dtype):
    """The weight, rounded to a dtype where that has been done."""
    weight = getattr(params, "rounded", None)
    return params["weight"] if weight is None or weight.dtype != dtype else weight


def _linear_saved(params, x, bias):
    """What `linear_bwd` wants. Made when it is wanted: what is rounded here is not kept until then."""
    return LinearSaved(x, _cast(_weight(params, x.dtype), x.dtype), _cast(params.get("bias"), x.dtype) if bias else None)


def _linear(params, x, bias=True):
    return linear_fwd(*_linear_saved(params, x, bias))[0]


def _linear_backward(params, x, dy, onto=None, bias=True):
    """dx, and gradients of weight and bias as `params` holds them. dy may be a tuple of its parts along the last axis; dx is
    added to `onto`, which may be written to. Without `bias` the map has none, whatever is in `params`."""
    dy = tuple(_cast(part, x.dtype) for part in dy) if isinstance(dy, tuple) else _cast(dy, x.dtype)
    widest = x.dtype if params["weight"].dtype.itemsize <= x.dtype.itemsize else arrays.compute_dtype(x.dtype)
    grads = linear_bwd(dy, _linear_saved(params, x, bias), dtype=widest, onto=onto)
    return grads.x, {name: _cast(getattr(grads, name), p.dtype) for name, p in params.items() if bias or name != "bias"}


@dataclass(frozen=True)
class Linear:
    """y = x @ weight.T + bias, over the last axis of x (..., inputs); y (..., outputs).

    params: weight (outputs, inputs), and bias (outputs,) if there is one. Initial weights are U(±1/√inputs), the bias 0.
    """

    inputs: int
    outputs: int
    bias: bool = False

    @property
    def shapes(self):
        """Shapes of the parameters, nested as they are."""
        return {"weight": (self.outputs, self.inputs)} | ({"bias": (self.outputs,)} if self.bias else {})

    def init(self, rng, dtype=np.float32):
        """Parameters drawn from a `numpy.random.Generator`."""
        return _linear_init(rng, self.inputs, self.outputs, self.bias, dtype)

    def __call__(self, params, x):
        """`(y, backprop)`; kept for backprop: x."""
        _check_params("Linear", params, self.shapes)
        _check_input("Linear", x, self.inputs)
        return _linear(params, x), lambda dy: _linear_backward(params, x, dy)


@dataclass(frozen=True)
class Embedding:
    """Rows of a table: tokens (...) of integers to y (..., dim).

    params: weight (count, dim), initially N(0, 0.02²). y has the weight's dtype, or `dtype` if given: this is where a model
    with float32 parameters goes over to bfloat16. backprop gives `(None, grads)`: tokens have no gradient.
    """

    count: int
    dim: int
    dtype: str | None = None

    @property
    def shapes(self):
        """Shapes of the parameters, nested as they are."""
        return {"weight": (self.count, self.dim)}

    def init(self, rng, dtype=np.float32):
        """Parameters drawn from a `numpy.random.Generator`."""
        if not isinstance(rng, np.random.Generator):
            raise TypeError(f"init: rng is of type {type(rng).__qualname__}, wanted numpy.random.default_rng(seed)")
        return {"weight": rng.normal(0.0, 0.02, (self.count, self.dim)).astype(dtype)}

    def __call__(self, params, tokens):
        """`(y, backprop)`; kept for backprop: tokens."""
        _check_params("Embedding", params, self.shapes)
        weight = params["weight"]
        dtype = np.dtype(self.dtype or weight.dtype)
        y, saved = embedding_fwd(tokens, _weight(params, dtype))
        saved = saved._replace(dtype=weight.dtype)

        def backprop(dy, onto=None):  # where the table has another gradient, which may be written to
            return None, {"weight": embedding_bwd(_cast(dy, weight.dtype), saved, onto=onto).weight}

        return _cast(y, dtype), backprop


# ---------------------------------------------------------------------------------------------------- norms
class _Norm:
    """What RMSNorm and LayerNorm share."""

    @property
    def shapes(self):
        """Shapes of the parameters, nested as they are."""
        return dict.fromkeys(self._names, (self.dim,))

    def init(self, rng=None, dtype=np.float32):
        """Weights of 1, and a bias of 0; nothing is drawn."""
        return {name: np.full(self.dim, name == "weight", dtype) for name in self._names}

    def __call__(self, params, x):
        """`(y, backprop)`; x is an array (..., dim), or a pair (hidden, residual) whose sum is meant; dx is built as x."""
        y, _, backward = self.add(params, x)

        def backprop(dy):
            return backward(dy, None)

        return y, backprop

    def add(self, params, x, residual_dtype=None):
        """Norm of a sum, and the sum itself.

        Parameters
        ----------
        params : dict
        x : array (..., dim), or pair (hidden, residual) of such
        residual_dtype : dtype, optional
            Of the sum: by default the residual's, without one x's.

        Returns
        -------
        y : array (..., dim)
            In the dtype of x or hidden.
        total : array (..., dim)
            hidden + residual.
        backprop : callable
            `backprop(dy, dtotal) -> (dx, grads)`; dtotal may be None; dx is a pair where x is.
        """
        hidden, residual = x if isinstance(x, tuple) else (x, None)
        name = type(self).__name__
        _check_params(name, params, self.shapes)
        _check_input(name, hidden, self.dim)
        forward, backward = self._pair
        weights = _cast_together(params, hidden.dtype)
        y, total, saved = forward(hidden, **weights, residual=residual, eps=self.eps, residual_dtype=residual_dtype)

        is_pair, y_dtype, total_dtype = residual is not None, y.dtype, total.dtype  # the closure holds no array but saved's

        def backprop(dy, dtotal=None):
            grads = backward(_cast(dy, y_dtype), saved, _cast(dtotal, total_dtype))
            dx = (grads.x, grads.residual) if is_pair else grads.x
            return dx, {key: _cast(getattr(grads, key), p.dtype) for key, p in params.items()}

        return y, total, backprop


@dataclass(frozen=True)
class RMSNorm(_Norm):
    """y = x / sqrt(mean(x²) + eps)·weight over the last axis, computed in float32 at least.

    params: weight (dim,).
    """

    dim: int
    eps: float = 1e-5
    _names = ("weight",)
    _pair = (rms_norm_fwd, rms_norm_bwd)


@dataclass(frozen=True)
class LayerNorm(_Norm):
    """y = (x - mean(x)) / sqrt(var(x) + eps)·weight + bias over the last axis, computed in float32 at least.

    params: weight (dim,), bias (dim,).
    """

    dim: int
    eps: float = 1e-5
    _names = ("weight", "bias")
    _pair = (layer_norm_fwd, layer_norm_bwd)


# ---------------------------------------------------------------------------------------------------- the mixer
class _MixerSaved(NamedTuple):
    x: Any
    xz: Any
    selected: Any
    y: Any
    states: Any
    constants: tuple
    before: State | None
    lengths: Any


class MixerSaved(_MixerSaved):
    """What a mixer keeps for its gradient.

    In x's dtype, numbers per token: x d_model; xz 2·d_inner, its two projections; selected dt_rank + 2·d_state, which are dt, B
    and C; y d_inner, what the scan gave. Further states (batch, ceil(length / 64), d_inner, d_state) and `constants`, A
    (d_inner, d_state), D and delta_bias (d_inner,), float32 at least. Convolution, norms, delta and rounded weights are
    computed again, these unless `round_weights` has made them. `before` is a copy of the state that came, or None. `plan` is
    the scan's, as in `SelectiveScanSaved`: its arrays are these, or made again as they were.
    """

    plan = None

    def __reduce__(self):  # what `copy` and `pickle` build may have other arrays
        return MixerSaved, tuple(self)


@dataclass(frozen=True)
class MambaMixer:
    """The Mamba block without norm and residual: x (batch, length, d_model) to y of that shape.

        x | z  = in_proj(x)                                      two times d_inner channels
        x      = silu(conv1d(x))                                 causal, each channel by itself
        dt | B | C = x_proj(x)                                   dt_rank, d_state and d_state numbers per token
        y      = scan(x, softplus(dt_proj(dt)), -exp(A_log), B, C, D)·silu(z)
        out    = out_proj(y)

    Parameters
    ----------
    d_model, d_state, d_conv, expand : int
        d_inner is int(expand·d_model).
    dt_rank : int or "auto"
        "auto" is ceil(d_model / 16).
    dt_min, dt_max, dt_init_floor : float
        Initial step sizes are log-uniform between dt_min and dt_max, and dt_init_floor at least: dt_proj's bias.
    dt_init : {"random", "constant"}
        dt_proj's initial weight is U(±dt_scale/√dt_rank), or dt_scale/√dt_rank throughout.
    dt_scale : float
    conv_bias, bias : bool
        Whether the convolution, and in_proj and out_proj, have a bias.
    bc_dt_norm : bool
        RMS norms over dt, B and C, before dt_proj and the scan. They have no weights, as in FalconMamba, unless params has
        weights for them: "dt_layernorm", "b_layernorm", "c_layernorm", each {"weight"}, as in Jamba.
    bc_dt_norm_eps : float
    n_layer : int
        out_proj's initial weight is divided by √n_layer, the number of mixers whose outputs are added up.

    Notes
    -----
    params: in_proj {"weight" (2·d_inner, d_model)}, conv1d {"weight" (d_inner, d_conv), "bias"}, x_proj {"weight"
    (dt_rank + 2·d_state, d_inner)}, dt_proj {"weight" (d_inner, dt_rank), "bias"}, A_log (d_inner, d_state), D (d_inner,),
    out_proj {"weight" (d_model, d_inner)}. A_log starts as log(1..d_state), D as 1.

    Inside, channels are contiguous in memory: a product's (batch, length, d_inner) is a scan's (batch, d_inner, length) through
    `.transpose(0, 2, 1)`, and no activation is copied. `MixerSaved` says what is kept for the gradient.
    """

    d_model: int
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int | str = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False
    bc_dt_norm: bool = False
    bc_dt_norm_eps: float = 1e-6
    n_layer: int = 1

    @property
    def d_inner(self):
        """Channels of convolution and scan."""
        return int(self.expand * self.d_model)

    @property
    def rank(self):
        """dt_rank as a number."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @cached_property
    def shapes(self):
        """Shapes of the parameters that `init` gives, nested as they are."""
        inner, bias = self.d_inner, self.bias
        return {
            "A_log": (inner, self.d_state),
            "D": (inner,),
            "in_proj": Linear(self.d_model, 2 * inner, bias).shapes,
            "conv1d": {"weight": (inner, self.d_conv)} | ({"bias": (inner,)} if self.conv_bias else {}),
            "x_proj": Linear(inner, self.rank + 2 * self.d_state).shapes,
            "dt_proj": Linear(self.rank, inner, True).shapes,
            "out_proj": Linear(inner, self.d_model, bias).shapes,
        }

    def init(self, rng, dtype=np.float32):
        """Parameters drawn from a `numpy.random.Generator`."""
        if self.dt_init not in ("random", "constant"):
            raise ValueError(f"MambaMixer: dt_init is {self.dt_init!r}, wanted 'random' or 'constant'")
        inner, rank, width = self.d_inner, self.rank, self.d_conv
        conv1d = {"weight": _uniform(rng, (inner, width), 1 / math.sqrt(width), dtype)}
        if self.conv_bias:
            conv1d["bias"] = _uniform(rng, inner, 1 / math.sqrt(width), dtype)
        bound = self.dt_scale / math.sqrt(rank)
        random = self.dt_init == "random"
        dt_weight = _uniform(rng, (inner, rank), bound, dtype) if random else np.full((inner, rank), bound, dtype)
        dt = np.exp(rng.uniform(math.log(self.dt_min), math.log(self.dt_max), inner)).clip(min=self.dt_init_floor)
        return {
            "A_log": np.tile(np.log(np.arange(1, self.d_state + 1)), (inner, 1)).astype(dtype),
            "D": np.ones(inner, dtype),
            "in_proj": _linear_init(rng, self.d_model, 2 * inner, self.bias, dtype),
            "conv1d": conv1d,
            "x_proj": _linear_init(rng, inner, rank + 2 * self.d_state, False, dtype),
            # softplus(bias) = dt: bias = log(exp(dt) - 1), written so that small dt keep their digits
            "dt_proj": {"weight": dt_weight, "bias": (dt + np.log(-np.expm1(-dt))).astype(dtype)},
            "out_proj": _linear_init(rng, inner, self.d_model, self.bias, dtype, scale=1 / math.sqrt(self.n_layer)),
        }

    def init_state(self, xp, batch, dtype):
        """The `State` before the first token: zeros, in arrays of the library xp, for a layer that computes in dtype."""
        numbers = arrays.compute_dtype(np.dtype(dtype))
        conv = xp.zeros((batch, self.d_inner, self.d_conv - 1), dtype)
        return State(conv, xp.zeros((batch, self.d_inner, self.d_state), numbers))

    def __call__(self, params, x, state=None, lengths=None):
        """Mix, and keep what the gradient needs.

        Parameters
        ----------
        params : dict
        x : array (batch, length, d_model)
            float16, bfloat16, float32 or float64.
        state : State, optional
            The state before x. Its arrays are written to: afterwards they hold the state after x. None: it is zero.
        lengths : array (batch,) of integers, optional
            Only the first `lengths[i]` tokens of row i are there; what follows them is padding. Nothing that stands in padding,
            NaN included, reaches a state, a gradient or another place; y and dx are 0 there.

        Returns
        -------
        y : array (batch, length, d_model)
        backprop : callable
            `backprop(dy) -> (dx, grads)`. The state that came is a constant to it.

        Raises
        ------
        TypeError, ValueError
            A kind, dtype or shape does not fit, or NumPy lengths are not from 0 to length. CuPy's are taken for the nearest
            that are: to look into them would mean to wait for the GPU.
        """
        y, saved = self._forward(params, x, state, lengths, save=True)
        return y, lambda dy: self._backward(params, saved, dy)

    def advance(self, params, x, state=None, lengths=None):
        """y as `__call__` gives it, and nothing kept. One token at a time updates the state where it lies."""
        return self._forward(params, x, state, lengths, save=False)[0]

    def _forward(self, params, x, state, lengths, save):
        _check_params("MambaMixer", params, self.shapes | self._norm_shapes(params))
        _check_input("MambaMixer", x, self.d_model, "batch, length")
        lengths = checks_dense.lengths("MambaMixer", x, lengths)
        if state is not None:
            self.check_state(state, x, x.shape[0], x.dtype)
        padding = _padding(x, lengths)
        x = _blank(x, padding)
        before = state.copy() if save and state is not None else state  # the gradient needs it as it came

        xz = _linear(params["in_proj"], x)
        u, z = self._halves(xz)
        if not save and state is not None and lengths is None and x.shape[1] == 1:
            return self._step(params, u, z, state), None

        c, conv_state, _ = self._convolve(params, u, before)
        selected = _linear(params["x_proj"], _turn(c))  # (batch, length, dt_rank + 2 d_state)
        scan, _ = self._scan_arguments(params, c, z, selected, before, padding)
        if save:
            y, ssm_state, scan_saved = selective_scan_fwd(**scan)
        else:
            y, ssm_state = selective_scan(**scan, return_last_state=True)
        if state is not None:
            arrays.copy_into(state.ssm, ssm_state)
            arrays.copy_into(state.conv, conv_state if lengths is None else _last_inputs(u, state.conv, lengths))
        out = _blank(_linear(params["out_proj"], _turn(y)), padding)
        if not save:
            return out, None
        constants = scan["A"], scan["D"], scan["delta_bias"]
        saved = MixerSaved(x, xz, selected, y, scan_saved.states, constants, before, lengths)
        saved.plan = scan_saved.plan
        return out, saved

    def _step(self, params, u, z, state):
        """One token: u and z (batch, d_inner, 1)."""
        kernel = self._kernel(params, u.dtype)
        c = causal_conv1d_update(state.conv, u[:, :, 0], *kernel, activation="silu")  # (batch, d_inner)
        selected = _linear(params["x_proj"], c[:, None])  # (batch, 1, dt_rank + 2 d_state)
        scan, _ = self._scan_arguments(params, c[:, :, None], z, selected, None, None)
        y = selective_state_update(
            state.ssm, c, scan["delta"][:, :, 0], scan["A"], scan["B"][:, :, 0], scan["C"][:, :, 0],
            scan["D"], z[:, :, 0], scan["delta_bias"], dt_softplus=True,
        )  # fmt: skip
        return _linear(params["out_proj"], y[:, None])  # (batch, 1, d_model)

    def _backward(self, params, saved, dy):
        x, xz, selected, y, states, constants, before, lengths = saved
        padding = _padding(x, lengths)
        u, z = self._halves(xz)
        c, _, conv_saved = self._convolve(params, u, before)
        scan, (low, norms) = self._scan_arguments(params, c, z, selected, before, padding, constants)
        options = {name: scan.pop(name) for name in ("delta_softplus", "initial_state")}
        scan_saved = SelectiveScanSaved(**scan, **options, states=states, reverse=False, discretization="euler")
        scan_saved.plan = saved.plan

        grads = {}
        dy_scan, grads["out_proj"] = _linear_backward(params["out_proj"], _turn(y), _blank(dy, padding))
        g = selective_scan_bwd(_turn(dy_scan), scan_saved)
        dlow, dt_grads = _linear_backward(params["dt_proj"], low, _turn(g.delta), bias=False)
        grads["dt_proj"] = dt_grads | {"bias": g.delta_bias}
        dselected = [dlow, _turn(g.B), _turn(g.C)]
        if self.bc_dt_norm:
            normed = [rms_norm_bwd(d, kept) for d, kept in zip(dselected, norms, strict=True)]
            dselected = [n.x for n in normed]
            grads |= {key: {"weight": n.weight} for key, n in zip(_NORMS, normed, strict=True) if key in params}
        dselected = _join(dselected)  # (batch, length, dt_rank + 2 d_state)
        dc, grads["x_proj"] = _linear_backward(params["x_proj"], _turn(c), dselected, onto=_turn(g.u))
        conv = causal_conv1d_bwd(_turn(dc), conv_saved)
        grads["conv1d"] = {name: getattr(conv, name) for name in params["conv1d"]}
        dx, grads["in_proj"] = _linear_backward(params["in_proj"], x, (_turn(conv.x), _turn(g.z)))
        grads |= {"A_log": g.A * scan["A"], "D": g.D}  # A = -exp(A_log): dA/dA_log = A
        return _blank(dx, padding), _like({key: grads[key] for key in params}, params)

    # ------------------------------------------------------------------------------------------------ what both directions need
    def _halves(self, xz):
        """x and z: (batch, length, 2 d_inner) -> two views (batch, d_inner, length), channel-contiguous."""
        return _turn(xz[:, :, : self.d_inner]), _turn(xz[:, :, self.d_inner :])

    def _kernel(self, params, dtype):
        """Weight and bias of the convolution, for an input of that dtype."""
        return _cast_together({name: params["conv1d"].get(name) for name in ("weight", "bias")}, dtype).values()

    def _convolve(self, params, u, before):
        initial = None if before is None else before.conv
        return causal_conv1d_fwd(u, *self._kernel(params, u.dtype), activation="silu", initial_state=initial)

    def _scan_arguments(self, params, c, z, selected, before, padding, constants=None):
        """Arguments of the scan, by name; and dt as dt_proj takes it, with what the three norms saved. A, D and delta_bias are
        None or known."""
        numbers, rank = arrays.compute_dtype(c.dtype), self.rank
        low, B, C = (
            selected[..., :rank], selected[..., rank : rank + self.d_state], selected[..., rank + self.d_state :],
        )  # fmt: skip
        norms = None
        if self.bc_dt_norm:
            xp = arrays.namespace("MambaMixer", x=c)
            results = []
            for key, v in zip(_NORMS, (low, B, C), strict=True):
                weight = _cast(params[key]["weight"], numbers) if key in params else xp.ones(v.shape[-1], numbers)
                results.append(rms_norm_fwd(v, weight, eps=self.bc_dt_norm_eps))
            (low, B, C), norms = (y for y, _, _ in results), [kept for _, _, kept in results]
        delta = _turn(_linear(params["dt_proj"], low, bias=False))  # (batch, d_inner, length)
        if padding is not None and before is not None:
            xp = arrays.namespace("MambaMixer", delta=delta)
            delta = arrays.choose(xp, padding[:, None, :], STANDSTILL, delta)
        A, D, delta_bias = constants or scan_constants(params["A_log"], params["D"], params["dt_proj"]["bias"], numbers)
        scan = {
            "u": c,
            "delta": delta,
            "A": A,
            "B": _turn(B),
            "C": _turn(C),
            "D": D,
            "z": z,
            "delta_bias": delta_bias,
            "delta_softplus": True,
            "initial_state": None if before is None else before.ssm,
        }
        return scan, (low, norms)

    def _norm_shapes(self, params):
        """Shapes of such weights of the norms of dt, B and C as there are."""
        if not self.bc_dt_norm or not isinstance(params, dict):
            return {}
        sizes = dict(zip(_NORMS, (self.rank, self.d_state, self.d_state), strict=True))
        return {key: {"weight": (size,)} for key, size in sizes.items() if key in params}

    def check_state(self, state, x, batch, dtype):
        """Complain unless `state` is one for so many rows of a dtype, and lives where x does."""
        if not isinstance(state, State):
            raise TypeError(f"MambaMixer: state is of type {type(state).__qualname__}, wanted State(conv, ssm)")
        wanted = State((self.d_inner, self.d_conv - 1), (self.d_inner, self.d_state))
        arrays.namespace("MambaMixer", x=x, **{"state.conv": state.conv, "state.ssm": state.ssm})
        for name, number in (("conv", dtype), ("ssm", arrays.compute_dtype(dtype))):
            array, shape = getattr(state, name), (batch, *getattr(wanted, name))
            if array.shape != shape:
                raise ValueError(f"MambaMixer: state.{name} has shape {array.shape}, wanted {shape}")
            if array.dtype != number:
                names = arrays.dtype_name(array.dtype), arrays.dtype_name(number), arrays.dtype_name(dtype)
                raise TypeError("MambaMixer: state.{} is {}, wanted {} because x is {}".format(name, *names))


_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")


def _turn(x):
    """(batch, length, channels) <-> (batch, channels, length), a view."""
    return x.transpose(0, 2, 1)


def _join(parts):
    """Arrays (batch, length, …) beside each other along the last axis."""
    return np.concatenate(parts, axis=-1)  # CuPy answers for its own


def _padding(x, lengths):
    """Where x (batch, length, …) is padding: (batch, length), or None where nowhere."""
    return None if lengths is None else arrays.namespace("MambaMixer", x=x).arange(x.shape[1]) >= lengths[:, None]


def _blank(x, padding):
    """x (batch, length, channels) with 0 at padding. It is chosen, not multiplied: 0·NaN is NaN."""
    if padding is None:
        return x
    xp = arrays.namespace("MambaMixer", x=x, padding=padding)
    return arrays.choose(xp, padding[:, :, None], 0, x)


def _last_inputs(u, before, lengths):
    """The convolution's state after `lengths` tokens of u (batch, dim, length), and the state before them."""
    width = before.shape[2]  # one less than the convolution's: before is (batch, dim, width)
    xp = arrays.namespace("MambaMixer", u=u)
    step = lengths[:, None, None] + xp.arange(-width, 0)  # (batch, 1, width - 1): steps of u; what is negative lies in `before`
    recent = xp.take_along_axis(u, xp.maximum(step, 0), axis=2)
    earlier = xp.take_along_axis(before, xp.minimum(step + width, width - 1), axis=2)
    return arrays.choose(xp, step < 0, earlier, recent)


# ---------------------------------------------------------------------------------------------------- layers made of layers
@dataclass(frozen=True)
class Residual:
    """y = x + layer(x), in x's dtype. params are the layer's."""

    layer: Any

    def init(self, rng, dtype=np.float32):
        """The layer's parameters."""
        return self.layer.init(rng, dtype)

    def __call__(self, params, x):
        """`(y, backprop)`; kept for backprop: what the layer keeps."""
        y, backward = self.layer(params, x)

        def backprop(dy):
            dx, grads = backward(dy)
            return dy + dx, grads

        return x + y, backprop


@dataclass(frozen=True)
class Block:
    """A norm and a mixer along a residual stream: residual += hidden; hidden = mixer(norm(residual)).

    x is an array (batch, length, d_model), at the start of the stream, or a pair (hidden, residual); y is a pair. Whatever ends
    the stream adds the two up, as `RMSNorm` and `LayerNorm` do when they are given a pair. Adding and norm are one operation.

    params: {"norm": ..., "mixer": ...}. With `residual_in_fp32` the residual is float32 even where hidden has 16 bits.
    """

    norm: Any
    mixer: Any
    residual_in_fp32: bool = True

    def init(self, rng, dtype=np.float32):
        """Parameters drawn from a `numpy.random.Generator`."""
        return {"norm": self.norm.init(rng, dtype), "mixer": self.mixer.init(rng, dtype)}

    def __call__(self, params, x, state=None, lengths=None):
        """`((hidden, residual), backprop)`; `backprop((dhidden, dresidual)) -> (dx, grads)`. state, lengths: as the mixer's."""
        normed, residual, norm_backward = self._add(params, x)
        given = () if state is None and lengths is None else (state, lengths)  # the mixer may know neither
        hidden, mixer_backward = self.mixer(params["mixer"], normed, *given)

        def backprop(dy):
            dhidden, dresidual = dy
            dnormed, mixer_grads = mixer_backward(dhidden)
            dx, norm_grads = norm_backward(dnormed, dresidual)
            return dx, {"norm": norm_grads, "mixer": mixer_grads}

        return (hidden, residual), backprop

    def advance(self, params, x, state=None, lengths=None):
        """The pair that `__call__` gives, and nothing kept."""
        normed, residual, _ = self._add(params, x)
        return self.mixer.advance(params["mixer"], normed, state, lengths), residual

    def _add(self, params, x):
        if not isinstance(params, dict) or params.keys() != {"norm", "mixer"}:
            came = ", ".join(map(str, params)) if isinstance(params, dict) else f"an object of type {type(params).__qualname__}"
            raise ValueError(f"Block: params is {came or 'empty'}, wanted a dict with norm and mixer")
        hidden = x[0] if isinstance(x, tuple) else x
        _check_input("Block", hidden, self.norm.dim)
        return self.norm.add(params["norm"], x, arrays.compute_dtype(hidden.dtype) if self.residual_in_fp32 else hidden.dtype)


@dataclass(frozen=True)
class Serial:
    """One layer after another. params is a list of theirs."""

    layers: tuple

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))

    def init(self, rng, dtype=np.float32):
        """Parameters drawn from a `numpy.random.Generator`, in the order of the layers."""
        return [layer.init(rng, dtype) for layer in self.layers]

    def __call__(self, params, x):
        """`(y, backprop)`; kept for backprop: what the layers keep."""
        if not isinstance(params, (list, tuple)) or len(params) != len(self.layers):
            came = f"{len(params)} entries" if isinstance(params, (list, tuple)) else f"type {type(params).__qualname__}"
            raise ValueError(f"Serial: params is a list of {len(self.layers)}, one entry a layer; got {came}")
        backward = []
        for layer, layer_params in zip(self.layers, params, strict=True):
            x, backprop = layer(layer_params, x)
            backward.append(backprop)
        return x, lambda dy: _backward_through(backward, dy)


def _backward_through(backward, dy):
    """Through closures, last first; gradients of parameters in the order of the layers."""
    grads = []
    for backprop in reversed(backward):
        dy, layer_grads = backprop(dy)
        grads.append(layer_grads)
    return dy, grads[::-1]


@dataclass(frozen=True)
class Checkpoint:
    """The layer, keeping nothing but its input: backprop runs it forward again. Results and gradients have the same bits.

    params are the layer's. A state goes in and out as without: what came is copied, for the second run.
    """

    layer: Any

    def init(self, rng, dtype=np.float32):
        """The layer's parameters."""
        return self.layer.init(rng, dtype)

    def __call__(self, params, x, state=None, lengths=None):
        """`(y, backprop)` of the layer; kept for backprop: x, and a copy of the state that came."""
        if state is None:
            given = () if lengths is None else (None, lengths)  # the layer may know neither
            return self.layer(params, x, *given)[0], lambda dy: self.layer(params, x, *given)[1](dy)
        before = state.copy()
        return self.layer(params, x, state, lengths)[0], lambda dy: self.layer(params, x, before.copy(), lengths)[1](dy)
