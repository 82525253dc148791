"""The causal depthwise convolution of the Mamba block, its gradient, and its one-step update: the public calls.

    p_t = bias + Σ_j weight_j·x_{t-(width-1-j)},    y_t = silu(p_t) or p_t

after "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu & Dao, 2023), section 3.4. What lies before the
first step comes from the initial state. NumPy arrays run `mambacupy.reference.conv`; CuPy arrays cuda_src/causal_conv1d*.cu.
"""

from mambacupy import checks_conv, kernels
from mambacupy.ops import conv_kernels
from mambacupy.reference import conv as reference
from mambacupy.reference.conv import CausalConv1dGrads, CausalConv1dSaved

__all__ = [
    "CausalConv1dGrads",
    "CausalConv1dSaved",
    "causal_conv1d",
    "causal_conv1d_bwd",
    "causal_conv1d_fwd",
    "causal_conv1d_update",
]


def causal_conv1d(
    x, weight, bias=None, *, activation=None, initial_state=None, reverse=False, return_final_state=False
):  # fmt: skip
    """Convolve each channel of a batch of sequences with a filter of its own that looks back only.

    Parameters
    ----------
    x : array (batch, dim, length)
        Input. float16, bfloat16, float32 or float64. Length-contiguous and channel-contiguous memory (a
        `(batch, length, dim)` array seen through `.transpose(0, 2, 1)`) are both native; other views are copied.
    weight : array (dim, width)
        Filters, of which the last tap meets the current step. float16, bfloat16 or float32; float64 with float64 `x`.
        Any width; up to 8 it lives in registers.
    bias : array (dim,), optional
        In weight's dtype.
    activation : {None, "silu"}
        Applied to the sums.
    initial_state : array (batch, dim, width - 1), optional
        The steps before the first, the latest of them last, in x's dtype. Zeros where None.
    reverse : bool
        Let time run from the last step to the first: filter, initial and final state turn with it.
    return_final_state : bool
        Also return the last `width - 1` steps walked, which continue the sequence as an initial state.

    Returns
    -------
    y : array (batch, dim, length)
        In x's dtype and memory order.
    final_state : array (batch, dim, width - 1)
        Only with `return_final_state`. In x's dtype, C-contiguous.

    Raises
    ------
    TypeError
        An argument is no NumPy or CuPy array, has a dtype that is not supported, or lives elsewhere than x.
    ValueError
        A shape does not fit, the filter has no tap, or there is no such activation.

    Notes
    -----
    CuPy arrays are convolved on their device and the current stream, without synchronising. Arithmetic is float32 at least.
    """
    args = checks_conv.causal_conv1d("causal_conv1d", x, weight, bias, activation, initial_state, reverse)
    if args.xp.__name__ == "numpy":
        y, final_state, _ = reference.causal_conv1d_fwd(
            x, weight, bias, activation=activation, initial_state=initial_state, reverse=reverse
        )
    else:
        with kernels.device_of(x):
            y, final_state = conv_kernels.forward(args, return_final_state)
    return (y, final_state) if return_final_state else y


def causal_conv1d_fwd(x, weight, bias=None, *, activation=None, initial_state=None, reverse=False):
    """Convolve, and keep what the gradient needs: `causal_conv1d` for training.

    Parameters are those of `causal_conv1d`.

    Returns
    -------
    y, final_state : array
        As `causal_conv1d` gives them.
    saved : CausalConv1dSaved
        The arguments, by reference; nothing else is kept.
    """
    args = checks_conv.causal_conv1d("causal_conv1d_fwd", x, weight, bias, activation, initial_state, reverse)
    if args.xp.__name__ == "numpy":
        return reference.causal_conv1d_fwd(
            x, weight, bias, activation=activation, initial_state=initial_state, reverse=reverse
        )  # fmt: skip
    with kernels.device_of(x):
        y, final_state = conv_kernels.forward(args, True)
    return y, final_state, CausalConv1dSaved(x, weight, bias, initial_state, activation, reverse)


def causal_conv1d_bwd(dy, saved, dfinal_state=None):
    """Gradient of a causal convolution.

    Parameters
    ----------
    dy : array (batch, dim, length)
        Gradient of y: ∂L/∂y. x's dtype, or float32 where that is a 16-bit one.
    saved : CausalConv1dSaved
        Third result of `causal_conv1d_fwd`; its arrays must not have been written to since.
    dfinal_state : array (batch, dim, width - 1), optional
        Gradient of final_state, in x's dtype. Zero where None.

    Returns
    -------
    CausalConv1dGrads
        Gradients of x (in its memory order), weight, bias and initial_state, each in its argument's shape and dtype, and None
        where the argument was None.

    Raises
    ------
    TypeError
        dy or dfinal_state is no array of x's library and device, or has another dtype; `saved` is something else.
    ValueError
        A shape does not fit.

    Notes
    -----
    dp = dy·σ(p)(1 + p(1 - σ(p))), dx_t = Σ_j w_j·dp_{t+width-1-j}, dw_j = Σ dp_t·x_{t-(width-1-j)}, dbias = Σ dp. The sums of
    dw and dbias have a fixed order and no atomics: results are bit-identical from run to run.
    """
    args = checks_conv.causal_conv1d_bwd("causal_conv1d_bwd", saved, dy, dfinal_state)
    if args.xp.__name__ == "numpy":
        return reference.causal_conv1d_bwd(dy, saved, dfinal_state)
    with kernels.device_of(args.x):
        return conv_kernels.backward(args, dy, dfinal_state)


def causal_conv1d_update(state, x, weight, bias=None, *, activation=None):
    """One step of a causal convolution.

    Parameters
    ----------
    state : array (batch, dim, width - 1)
        The steps before this one, the latest of them last, in x's dtype: an initial or final state of `causal_conv1d`. x is
        shifted in, in place; any strides.
    x : array (batch, dim)
        The step. float16, bfloat16, float32 or float64.
    weight, bias, activation
        As `causal_conv1d` takes them.

    Returns
    -------
    y : array (batch, dim)
        In x's dtype.

    Raises
    ------
    TypeError, ValueError
        As `causal_conv1d`; or state is read-only, or a broadcast view.
    """
    xp, width = checks_conv.causal_conv1d_update("causal_conv1d_update", state, x, weight, bias, activation)
    if xp.__name__ == "numpy":
        return reference.causal_conv1d_update(state, x, weight, bias, activation=activation)
    with kernels.device_of(x):
        return conv_kernels.update(xp, state, x, weight, bias, activation == "silu", width)
