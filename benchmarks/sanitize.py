"""A few small scans that reach every kind of memory access, for compute-sanitizer: see `make sanitize`."""

import sys

import cases
import cupy as cp
import numpy as np

from mambacupy import selective_scan_bwd, selective_scan_fwd
from mambacupy.decoder import Decoder
from mambacupy.layers import map_params
from mambacupy.models import MambaConfig, MambaLM
from mambacupy.ops.loss import softmax_cross_entropy_bwd, softmax_cross_entropy_fwd

ROWS = ("base", "bfloat16", "complex-bfloat16", "channel-order-bfloat16", "groups-differ", "constant-BC", "zoh", "reverse",
        "length-1", "length-65", "state-5", "state-32-channel-order-bfloat16", "state-300", "dim-7", "float64")  # fmt: skip


def main():
    scans_only = sys.argv[1:] == ["scans"]  # initcheck takes what cuBLAS writes for unwritten
    cp.cuda.set_allocator(None)  # an allocation of its own for every array, so that stepping over an end is seen
    rows = {row: cases.ROWS[row] for row in ROWS} | {"parts of time": {"batch": 1, "dim": 3, "length": 1100}}
    for row, changes in rows.items():
        arguments, options = cases.make(**changes)
        given = {name: None if x is None else cases.to_gpu(x) for name, x in arguments.items()}
        y, last_state, saved = selective_scan_fwd(**given, **options)
        grads = selective_scan_bwd(y, saved, last_state)
        cp.cuda.get_current_stream().synchronize()
        print(row, *(f"{float(abs(x).astype(cp.float64).sum()):.6g}" for x in (y, last_state, grads.u, grads.A)), flush=True)
    for dtype in () if scans_only else ("float32", "bfloat16"):
        print("model", dtype, f"{train_and_decode(dtype):.6g}", flush=True)


def train_and_decode(dtype):
    """A step of a small model's training, and tokens one by one: every other kernel."""
    model = MambaLM(MambaConfig(d_model=48, n_layer=2, vocab_size=50), dtype)
    params = map_params(cp.asarray, model.init(np.random.default_rng(0)))
    tokens = cp.asarray(np.random.default_rng(1).integers(0, 50, (3, 70)))
    logits, backprop = model(params, tokens[:, :-1])
    loss, saved = softmax_cross_entropy_fwd(logits, tokens[:, 1:])
    grads = backprop(softmax_cross_entropy_bwd(1.0, saved).logits)
    model.advance(params, tokens[:, :1], model.init_state(params, 3))
    Decoder(model, params, 3, graph=False).step(tokens[:, 0])
    return float(loss) + float(abs(grads["embedding"]["weight"]).sum())


if __name__ == "__main__":
    main()
