"""Kernels of the model's operations without a GPU: their text run by the emulator, against float64."""

import shutil

import cases
import emulator
import numpy as np
import pytest

from mambacupy import checks_conv
from mambacupy.ops import conv_kernels
from mambacupy.reference import conv

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")

TOLERANCE = {"float16": 6e-4, "bfloat16": 4e-3, "float32": 2e-6, "float64": 1e-14}
BASE = {"dim": 24, "length": 70, "width": 4, "dtype": "bfloat16", "order": "length", "activation": "silu", "reverse": False}
ROWS = {
    "base": {},
    "float32": {"dtype": "float32"},
    "float64": {"dtype": "float64"},
    "channel-order": {"order": "channel"},
    "channel-order-reverse": {"order": "channel", "reverse": True},
    "reverse": {"reverse": True},
    "no-activation": {"activation": None},
    "width-1": {"width": 1},
    "width-8": {"width": 8, "order": "channel"},
    "width-11": {"width": 11},
    "length-2": {"length": 2},
    "length-520-dim-7": {"length": 520, "dim": 7},
}


@pytest.mark.parametrize("row", ROWS)
def test_convolution(monkeypatch, row):
    case = BASE | ROWS[row]
    rng = np.random.default_rng(0)
    dtype, shape = cases.DTYPES[case["dtype"]], (2, case["dim"], case["length"])
    like = cases.make(**{k: case[k] for k in ("dim", "length", "dtype", "order")})[0]["u"]
    x, dy = (cases.like(like, rng.standard_normal(shape)) for _ in range(2))
    wide = np.float64 if case["dtype"] == "float64" else np.float32
    weight, bias = rng.standard_normal((case["dim"], case["width"])).astype(wide), rng.standard_normal(case["dim"]).astype(wide)
    first, dlast = (rng.standard_normal((2, case["dim"], case["width"] - 1)).astype(dtype) for _ in range(2))

    emulator.install(monkeypatch)
    monkeypatch.setattr(conv_kernels, "_plans", {})
    args = checks_conv.causal_conv1d("test", x, weight, bias, case["activation"], first, case["reverse"])
    args = args._replace(xp=emulator.Memory())
    y, last = conv_kernels.forward(args, True)
    grads = conv_kernels.backward(args, dy, dlast)

    double = (a.astype(np.float64) for a in (x, weight, bias))
    options = {"activation": case["activation"], "reverse": case["reverse"]}
    wanted, wanted_last, saved = conv.causal_conv1d_fwd(*double, initial_state=first.astype(np.float64), **options)
    wanted_grads = conv.causal_conv1d_bwd(dy.astype(np.float64), saved, dlast.astype(np.float64))
    assert cases.relative_error(y, wanted) <= TOLERANCE[case["dtype"]]
    assert np.array_equal(last.astype(np.float64), wanted_last)
    for name, one, two in zip(grads._fields, grads, wanted_grads, strict=True):
        assert cases.relative_error(one, two) <= TOLERANCE[one.dtype.name], name
