"""Times of the model's operations, and of whole models with random weights: `python -m benchmarks.models [--only TEXT]`.

`peer_ms` is what the original implementation (state-spaces/mamba 2.3.2, causal-conv1d 1.6) takes on one NVIDIA H100 80GB HBM3.
"""

import argparse
import json

import cupy as cp
import numpy as np

from benchmarks import generation
from benchmarks.generation import VOCABULARY
from benchmarks.timing import free, median_seconds
from mambacupy import arrays, causal_conv1d, causal_conv1d_bwd, causal_conv1d_fwd, optim, selective_state_update
from mambacupy.layers import map_params
from mambacupy.models import MambaConfig, MambaLM
from mambacupy.ops.loss import softmax_cross_entropy_bwd, softmax_cross_entropy_fwd
from mambacupy.ops.norm import rms_norm_fwd

BFLOAT16 = arrays.FLOAT_DTYPES["bfloat16"]
SIZES = generation.SIZES | {"370m": (1024, 48)}


def conv(order, batch=8, dim=2048, length=4096):
    """Width 4, silu."""
    shape = (batch, dim, length) if order == "length" else (batch, length, dim)
    x, dy = (_normal(*shape) if order == "length" else _normal(*shape).swapaxes(1, 2) for _ in range(2))
    weight, bias = _normal(dim, 4), _normal(dim)
    saved = causal_conv1d_fwd(x, weight, bias, activation="silu")[-1]
    yield "forward", lambda: causal_conv1d(x, weight, bias, activation="silu")
    yield "backward", lambda: causal_conv1d_bwd(dy, saved)


def state_update(batch, dim=5120):
    """One token, 16 states a channel."""
    state = cp.zeros((batch, dim, 16), cp.float32)
    x, dt, z, B, C = _normal(batch, dim), _normal(batch, dim), _normal(batch, dim), _normal(batch, 16), _normal(batch, 16)
    A = -cp.tile(cp.arange(1, 17, dtype=cp.float32), (dim, 1))
    D, bias = cp.ones(dim, cp.float32), cp.zeros(dim, cp.float32)
    yield "", lambda: selective_state_update(state, x, dt, A, B, C, D, z, bias, dt_softplus=True)


def norm(rows=32768, dim=2048):
    """RMS norm of the sum of x and a float32 residual."""
    x, residual, weight = _normal(rows, dim), _normal(rows, dim).astype(cp.float32), cp.ones(dim, cp.float32)
    yield "", lambda: rms_norm_fwd(x, weight, residual, residual_dtype=arrays.FLOAT32)


def prefill(size, length=8192):
    """One sequence in float16, and the logits of its last token."""
    model = _model(size, "float16")
    params, tokens = generation.random_params(model), _tokens(1, length)
    yield "", lambda: model.advance(params, tokens, model.init_state(params, 1), last_only=True)


def training(size, batch, length=2048):
    """A step of AdamW: bfloat16 from float32 parameters, gradients clipped."""
    model = _model(size, "bfloat16")
    params = map_params(lambda p: p.astype(cp.float32), generation.random_params(model))
    adam, tokens = optim.AdamW(1e-4), _tokens(batch, length + 1)
    now = {"params": params, "state": adam.init(params)}

    def step():
        logits, backprop = model(now["params"], tokens[:, :-1])
        _, saved = softmax_cross_entropy_fwd(logits, tokens[:, 1:])
        grads, _ = optim.clip_by_norm(backprop(softmax_cross_entropy_bwd(1.0, saved).logits), 1.0)
        now["params"], now["state"] = adam.update(now["params"], grads, now["state"])

    yield "", step


ROWS = [
    # name, what makes its calls, arguments, peer's milliseconds of each
    ("conv bfloat16, length-contiguous", conv, ("length",), (0.098, 0.157)),
    ("conv bfloat16, channel-contiguous", conv, ("channel",), (0.109, 0.276)),
    ("state update bfloat16, batch 1", state_update, (1,), (0.096,)),
    ("state update bfloat16, batch 64", state_update, (64,), (0.117,)),
    ("add and RMS norm bfloat16", norm, (), (0.273,)),
    ("prefill 130m float16", prefill, ("130m",), (30.6,)),
    ("prefill 1.4b float16", prefill, ("1.4b",), (73.2,)),
    ("training 130m bfloat16, 8 x 2048", training, ("130m", 8), (104.9,)),
    ("training 370m bfloat16, 4 x 2048", training, ("370m", 4), (187.6,)),
]


def measure(only=""):
    """A dict of name, ms and peer_ms for each row whose name contains `only`; generation's are per token."""
    found = []
    for name, make, arguments, peers in ROWS:
        if only in name:
            found += _times(name, make(*arguments), peers, repeats=5 if make in (prefill, training) else 20)
            free()
    for row in generation.measure(only):
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def _times(name, calls, peers, repeats):
    found = []
    for (part, call), peer in zip(calls, peers, strict=True):
        ms = median_seconds([call], repeats) * 1e3
        found.append({"row": f"{name} {part}".strip(), "ms": float(f"{ms:.4g}"), "peer_ms": peer})
        print(json.dumps(found[-1]), flush=True)
    return found


def _model(size, dtype):
    d_model, n_layer = SIZES[size]
    return MambaLM(MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=VOCABULARY), dtype)


def _normal(*shape):
    return cp.random.default_rng(0).standard_normal(shape, dtype=cp.float32).astype(BFLOAT16)


def _tokens(batch, length):
    return cp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (batch, length)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    only = parser.parse_args().only
    if not measure(only):
        parser.error(f"no row's name contains {only!r}")


if __name__ == "__main__":
    main()
