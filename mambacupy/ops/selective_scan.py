"""The selective scan and its gradient: the public calls.

    h_t = exp(Δ_t·A)·h_{t-1} + Δ_t·B_t·u_t,    y_t = (Σ_n C_t·h_t + D·u_t)·silu(z_t)

after "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu & Dao, 2023), algorithm 2. NumPy arrays run
`mambacupy.reference`; CuPy arrays run cuda_src/selective_scan_fwd.cu and cuda_src/selective_scan_bwd.cu.
"""

import numpy as np

from mambacupy import checks, kernels, reference
from mambacupy.ops import plans, scan_kernels
from mambacupy.reference import SelectiveScanGrads, SelectiveScanSaved

__all__ = [
    "SelectiveScanGrads",
    "SelectiveScanSaved",
    "selective_scan",
    "selective_scan_bwd",
    "selective_scan_fwd",
]


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    *,
    delta_softplus=False,
    initial_state=None,
    reverse=False,
    discretization="euler",
    return_last_state=False,
):
    """Scan a batch of sequences through Mamba's selective state space model.

    Parameters
    ----------
    u : array (batch, dim, length)
        Input. float16, bfloat16, float32 or float64. Length-contiguous and channel-contiguous memory (a
        `(batch, length, dim)` array seen through `.transpose(0, 2, 1)`) are both native; other views are copied.
    delta : array (batch, dim, length)
        Step sizes before bias and softplus, in the unit of time that 1/A has. u's dtype.
    A : array (dim, state)
        Diagonal of the state matrix. float32 or complex64; float64 or complex128 with float64 `u`.
    B, C : array
        Constant `(dim, state)` in A's dtype, or varying `(batch, state, length)` or `(batch, groups, state, length)` in any
        of u's dtypes. Channel d reads group `d // (dim // groups)`. With complex A varying B and C are complex, or real of
        length `2 * length` holding re, im, re, im, ….
    D : array (dim,), optional
        Weight of the skip connection.
    z : array (batch, dim, length), optional
        Gate: the output is multiplied by silu(z). u's dtype.
    delta_bias : array (dim,), optional
        Added to delta.
    delta_softplus : bool
        Whether softplus is applied to delta + delta_bias.
    initial_state : array (batch, dim, state), optional
        State before the first step, in A's dtype. Zero where None.
    reverse : bool
        Let time run from the last step to the first.
    discretization : {"euler", "zoh"}
        Input term Δ·B·u, as Mamba's own kernels have it, or the exact zero-order hold (exp(ΔA) - 1)/A·B·u.
    return_last_state : bool
        Also return the state after the final step.

    Returns
    -------
    y : array (batch, dim, length)
        In u's dtype and memory order.
    last_state : array (batch, dim, state)
        Only with `return_last_state`. In A's dtype.

    Raises
    ------
    TypeError
        An argument is no NumPy or CuPy array, has a dtype that is not supported, or lives elsewhere than u.
    ValueError
        A shape does not fit, or there is no such discretization.

    Notes
    -----
    CuPy arrays are scanned on their device and the current stream, without synchronising. Arithmetic and states are float32
    at least. Results are bit-identical from run to run. Few channels and many steps are scanned in parts of time side by side:
    there a NaN reaches later parts only within the memory of the states (docs/gradient.md, "Time in parts").
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    y, last_state, _ = _scan("selective_scan", tensors, delta_softplus, reverse, discretization, save=False)
    return (y, last_state) if return_last_state else y


def selective_scan_fwd(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    *,
    delta_softplus=False,
    initial_state=None,
    reverse=False,
    discretization="euler",
):
    """Scan, and keep what the gradient needs: `selective_scan` for training.

    Parameters are those of `selective_scan`.

    Returns
    -------
    y, last_state : array
        As `selective_scan` gives them.
    saved : SelectiveScanSaved
        The arguments, by reference, and the states at every 64th step: state / 64 numbers of A's dtype an element of u.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return _scan("selective_scan_fwd", tensors, delta_softplus, reverse, discretization, save=True)


def selective_scan_bwd(dy, saved, dlast_state=None):
    """Gradient of a scan.

    Parameters
    ----------
    dy : array (batch, dim, length)
        Gradient of y: ∂L/∂y. u's dtype, or float32 where that is a 16-bit one.
    saved : SelectiveScanSaved
        Third result of `selective_scan_fwd`; its arrays must not have been written to since.
    dlast_state : array (batch, dim, state), optional
        Gradient of last_state, in A's dtype. Zero where None.

    Returns
    -------
    SelectiveScanGrads
        Gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, each in its argument's shape, layout and dtype, and
        None where the argument was None. Those of complex numbers are ∂L/∂Re + i·∂L/∂Im.

    Raises
    ------
    TypeError
        dy or dlast_state is no array of u's library and device, or has another dtype; `saved` is something else.
    ValueError
        A shape does not fit.

    Notes
    -----
    docs/gradient.md derives the equations. There are no floating-point atomics: results are bit-identical from run to run.
    """
    if type(saved) is not SelectiveScanSaved:
        checks.selective_scan_bwd("selective_scan_bwd", saved, dy, dlast_state)
    if type(dy) is np.ndarray:  # which passes the gate there, as all that comes with it
        return reference.selective_scan_bwd(dy, saved, dlast_state)
    tensors = saved[:10]  # the arguments, and states
    if saved.plan is None:
        known, options = (*tensors, dy, dlast_state), (bool(saved.delta_softplus), bool(saved.reverse), saved.discretization)
    else:  # which follows from all but these; u's shape is one that may have been set since
        known, options = (dy, dlast_state), (saved.plan, saved.u.shape)
    plan = plans.planned(_plan_backward, (saved, dy, dlast_state), known, options)
    if plan is None:
        return reference.selective_scan_bwd(dy, saved, dlast_state)
    with kernels.device_of(dy):
        return scan_kernels.backward(plan, (*tensors, dy, dlast_state))


def _scan(operation, tensors, delta_softplus, reverse, discretization, save):
    """y, last_state, and what `SelectiveScanSaved` holds or, without `save`, None."""
    options = (bool(delta_softplus), bool(reverse), discretization)
    plan = None
    if type(tensors[0]) is not np.ndarray:
        plan = plans.planned(_plan_forward, (operation, tensors, *options, save), tensors, (*options, save))
    if plan is None:  # the host's, which passes the gate there
        *arguments, initial_state = tensors
        options = {"delta_softplus": delta_softplus, "initial_state": initial_state, "reverse": reverse}
        options["discretization"] = discretization
        if save:
            return reference.selective_scan_fwd(*arguments, **options)
        y, last_state = reference.selective_scan(*arguments, return_last_state=True, **options)
        return y, last_state, None
    with kernels.device_of(tensors[0]):
        y, last_state, states = scan_kernels.forward(plan, tensors)
    if not save:
        return y, last_state, None
    saved = SelectiveScanSaved(*tensors, states, delta_softplus, reverse, discretization)
    saved.plan = plan
    return y, last_state, saved


def _plan_forward(operation, tensors, delta_softplus, reverse, discretization, save):
    """Check the arguments. The plan of a scan on a GPU, None for one on the host."""
    args = checks.selective_scan(operation, *tensors, discretization)
    if args.xp.__name__ == "numpy":
        return None
    with kernels.device_of(args.u):
        return scan_kernels.plan_forward(args, delta_softplus, reverse, save)


def _plan_backward(saved, dy, dlast_state):
    """As `_plan_forward`, for the gradient."""
    operation = "selective_scan_bwd"
    checks.selective_scan_bwd(operation, saved, dy, dlast_state)
    checks.saved_states(operation, saved)
    *tensors, _, delta_softplus, reverse, discretization = saved
    args = checks.selective_scan(operation, *tensors, discretization)
    if args.xp.__name__ == "numpy":
        return None
    with kernels.device_of(args.u):
        return scan_kernels.plan_backward(args, bool(delta_softplus), bool(reverse), dy, dlast_state, saved.B, saved.C)
