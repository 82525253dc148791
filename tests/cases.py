"""The scans that the tests run: one base case, and rows that each change exactly one thing of it."""

import ml_dtypes
import numpy as np

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}

BASE = {
    "batch": 2,
    "dim": 24,
    "length": 70,
    "state": 16,
    "dtype": "float32",
    "complex": False,
    "B": "varying",  # varying | constant | number of groups | interleaved (complex only)
    "C": "varying",
    "D": True,
    "z": True,
    "delta_bias": True,
    "initial_state": True,
    "order": "length",  # length | channel
    "delta_softplus": True,
    "reverse": False,
    "discretization": "euler",
}

ROWS = {
    "base": {},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
    "complex": {"complex": True},
    "complex-bfloat16": {"complex": True, "dtype": "bfloat16", "B": "interleaved", "C": "interleaved"},
    "complex-float64": {"complex": True, "dtype": "float64"},
    "complex-interleaved-B": {"complex": True, "B": "interleaved"},
    "complex-groups": {"complex": True, "B": 3, "C": 3},
    "complex-constant": {"complex": True, "B": "constant", "C": "constant"},
    "constant-B": {"B": "constant"},
    "constant-C": {"C": "constant"},
    "constant-BC": {"B": "constant", "C": "constant"},
    "groups-3": {"B": 3, "C": 3},
    "groups-differ": {"B": 4, "C": 6},
    "groups-dim": {"B": 24, "C": 24},
    "groups-B-constant-C": {"B": 2, "C": "constant"},
    "no-D": {"D": False},
    "no-z": {"z": False},
    "no-bias": {"delta_bias": False},
    "no-initial-state": {"initial_state": False},
    "no-softplus": {"delta_softplus": False},
    "reverse": {"reverse": True},
    "reverse-complex": {"reverse": True, "complex": True},
    "zoh": {"discretization": "zoh"},
    "zoh-complex": {"discretization": "zoh", "complex": True},
    "zoh-reverse": {"discretization": "zoh", "reverse": True},
    "zoh-float64": {"discretization": "zoh", "dtype": "float64"},
    "channel-order": {"order": "channel"},
    "channel-order-bfloat16": {"order": "channel", "dtype": "bfloat16"},
    "channel-order-groups-bfloat16": {"order": "channel", "dtype": "bfloat16", "B": 2, "C": 2},  # borders at 24 bytes
    "channel-order-reverse": {"order": "channel", "reverse": True},
    **{f"length-{n}": {"length": n} for n in (1, 2, 33, 63, 64, 65, 128, 200, 1000)},
    **{f"length-{n}-reverse-bfloat16": {"length": n, "reverse": True, "dtype": "bfloat16"} for n in (1, 65, 72)},
    "length-197-blocks-bfloat16": {"length": 197, "dim": 128, "dtype": "bfloat16"},  # whole ones
    "length-197-blocks-reverse-bfloat16": {"length": 197, "dim": 128, "reverse": True, "dtype": "bfloat16"},
    **{f"state-{n}": {"state": n} for n in (1, 2, 3, 5, 8, 17, 32, 64, 100, 256, 300)},
    "state-32-channel-order-bfloat16": {"state": 32, "order": "channel", "dtype": "bfloat16"},
    "state-256-channel-order-float16": {"state": 256, "order": "channel", "dtype": "float16"},
    "state-300-channel-order": {"state": 300, "order": "channel"},
    "state-70-complex": {"state": 70, "complex": True},
    "state-64-zoh": {"state": 64, "discretization": "zoh"},
    "state-40-float64": {"state": 40, "dtype": "float64"},
    "state-40-constant-B": {"state": 40, "B": "constant"},
    "state-20-complex-zoh": {"state": 20, "complex": True, "discretization": "zoh"},
    # Rows across packs, and no columns that their ends could lie in.
    "length-197-constant-BC-bfloat16": {"length": 197, "state": 40, "B": "constant", "C": "constant", "dtype": "bfloat16"},
    **{f"dim-{n}": {"dim": n} for n in (1, 7, 64, 130)},
    "dim-130-channel-order": {"dim": 130, "order": "channel"},
    "batch-1": {"batch": 1},
}

FEW_CHANNELS = (
    "base",
    "bfloat16",
    "complex",
    "channel-order-bfloat16",
    "reverse",
    "constant-B",
    "length-65",
    "state-5",
    "state-64",
)
"""Rows to be run as on a GPU that they do not fill, too: states are then spread over more lanes."""


def make(seed=0, **changes):
    """Arrays and options of a case.

    Returns
    -------
    (dict, dict)
        Arguments by name (None where left out), and keyword options.
    """
    case = BASE | changes
    rng = np.random.default_rng(seed)
    batch, dim, length, state = (case[k] for k in ("batch", "dim", "length", "state"))
    dtype = DTYPES[case["dtype"]]
    real = np.dtype(np.float64 if case["dtype"] == "float64" else np.float32)
    state_dtype = np.result_type(real, np.complex64) if case["complex"] else real

    def number(*shape):
        x = rng.standard_normal(shape)
        return x + 1j * rng.standard_normal(shape) if case["complex"] else x

    def tensor(shift=0.0):
        x = (rng.standard_normal((batch, dim, length)) + shift).astype(dtype)
        return x if case["order"] == "length" else np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)

    def coefficient(kind):
        if kind == "constant":
            return number(dim, state).astype(state_dtype)
        shape = (batch, state, length) if kind in ("varying", "interleaved") else (batch, kind, state, length)
        x = number(*shape)
        if not case["complex"]:
            return x.astype(dtype)
        if kind == "interleaved":
            return np.stack((x.real, x.imag), -1).reshape(*shape[:-1], 2 * length).astype(dtype)
        return x.astype(state_dtype)

    A = -np.exp(rng.uniform(-2, 2, (dim, state)))
    if case["complex"]:
        A = A + 1j * 3 * rng.standard_normal((dim, state))
    arguments = {
        "u": tensor(),
        "delta": tensor(-2.0) if case["delta_softplus"] else np.abs(tensor()) * dtype.type(0.25),
        "A": A.astype(state_dtype),
        "B": coefficient(case["B"]),
        "C": coefficient(case["C"]),
        "D": rng.standard_normal(dim).astype(real) if case["D"] else None,
        "z": tensor() if case["z"] else None,
        "delta_bias": rng.uniform(0, 1, dim).astype(real) if case["delta_bias"] else None,
        "initial_state": number(batch, dim, state).astype(state_dtype) if case["initial_state"] else None,
    }
    if case["order"] == "channel":  # np.abs gives length-contiguous memory back
        arguments["delta"] = np.ascontiguousarray(arguments["delta"].swapaxes(1, 2)).swapaxes(1, 2)
    options = {k: case[k] for k in ("delta_softplus", "reverse", "discretization")}
    return arguments, options


def in_double(arguments):
    """The same numbers as float64 and complex128: what the oracle is given."""
    wide = {"c": np.complex128}
    return {k: None if x is None else x.astype(wide.get(x.dtype.kind, np.float64)) for k, x in arguments.items()}


def relative_error(got, wanted):
    """Relative error in the 2-norm; NaN anywhere gives NaN, which fails any comparison."""
    wanted = np.asarray(wanted)
    got = np.asarray(got).astype(wanted.dtype)
    norm = np.linalg.norm(wanted)
    return float(np.linalg.norm(got - wanted) / norm) if norm else float(np.linalg.norm(got))


def like(x, values):
    """Values in the dtype and memory order of x."""
    values = values.astype(x.dtype)
    if is_channel_contiguous(x):
        return np.ascontiguousarray(values.swapaxes(1, 2)).swapaxes(1, 2)
    return values


def is_channel_contiguous(x):
    return x.ndim == 3 and x.strides[1] == x.itemsize and x.strides[2] != x.itemsize


def to_gpu(x):
    """x on the GPU with its memory order kept."""
    import cupy

    if is_channel_contiguous(x):
        return cupy.asarray(np.ascontiguousarray(x.swapaxes(1, 2))).swapaxes(1, 2)
    return cupy.asarray(x)


def make_for_peer(dtype, order):
    """The case on which the original implementation's errors were measured: B2 D64 L1000 N16, A = -(1..16)."""
    arguments, options = make(dim=64, length=1000, dtype=dtype, order=order, initial_state=False)
    rng = np.random.default_rng(5)
    arguments["A"] = np.tile(-np.arange(1.0, 17.0, dtype=np.float32), (64, 1))
    arguments["delta"] = like(arguments["u"], 0.5 * rng.random(arguments["u"].shape))
    arguments["delta_bias"] = (0.5 * rng.random(64)).astype(np.float32)
    return arguments, options
