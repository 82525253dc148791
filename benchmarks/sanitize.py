"""Small calls that reach every kernel and every kind of memory access, for compute-sanitizer: see `make sanitize`."""

import sys

import cases
import cupy as cp
import numpy as np

from mambacupy import (
    causal_conv1d_bwd,
    causal_conv1d_fwd,
    causal_conv1d_update,
    decode_step,
    selective_scan_bwd,
    selective_scan_fwd,
    selective_state_update,
)
from mambacupy.decoder import Decoder
from mambacupy.layers import map_params
from mambacupy.models import MambaConfig, MambaLM
from mambacupy.ops import plans
from mambacupy.ops.linear import embedding_bwd, embedding_fwd
from mambacupy.ops.loss import softmax_cross_entropy_bwd, softmax_cross_entropy_fwd
from mambacupy.ops.norm import layer_norm_bwd, layer_norm_fwd, rms_norm_bwd, rms_norm_fwd
from mambacupy.optim import AdamW, clip_by_norm

ROWS = ("base", "bfloat16", "complex-bfloat16", "channel-order-bfloat16", "groups-differ", "constant-BC", "zoh", "reverse",
        "length-1", "length-65", "state-5", "state-32-channel-order-bfloat16", "state-300", "dim-7", "float64")  # fmt: skip


def main():
    if sys.argv[1:] not in ([], ["without-library"]):
        sys.exit(f"benchmarks.sanitize: got {sys.argv[1:]}, wanted nothing or without-library; compute-sanitizer runs it")
    without_library = len(sys.argv) > 1  # initcheck takes what cuBLAS writes for unwritten
    cp.cuda.set_allocator(None)  # an allocation of its own for every array, so that stepping over an end is seen
    plans.TOGETHER = 0
    parts = [scans(), *(operations(dtype) for dtype in ("float32", "bfloat16"))]
    if not without_library:
        parts += [with_library(dtype) for dtype in ("float32", "bfloat16")]
    for part in parts:
        for name, results in part:
            sums = (f"{float(abs(x).astype(cp.float64).sum()):.6g}" for x in results if x is not None)
            print(name, *sums, flush=True)


def scans():
    rows = {row: cases.ROWS[row] for row in ROWS}
    rows |= {
        "parts of time": {"batch": 1, "dim": 3, "length": 4300},
        "parts in a relay": {"batch": 1, "dim": 40, "length": 1000},
    }
    rows["rows across packs"] = {"length": 197, "dtype": "bfloat16"}
    rows["rows across packs, more threads than items"] = {"batch": 1, "dim": 160, "length": 100, "dtype": "bfloat16"}
    for row, changes in rows.items():
        arguments, options = cases.make(**changes)
        given = {name: None if x is None else cases.to_gpu(x) for name, x in arguments.items()}
        y, last_state, saved = selective_scan_fwd(**given, **options)
        grads = selective_scan_bwd(y, saved, last_state)
        yield row, (y, last_state, grads.u, grads.A)


def operations(dtype):
    """Those of our own kernels alone."""
    rng = np.random.default_rng(0)

    def tensor(*shape):
        return cases.to_gpu(rng.standard_normal(shape).astype(cases.DTYPES[dtype]))

    def floats(*shape):
        return cases.to_gpu(rng.standard_normal(shape).astype(np.float32))

    for width in (4, 11):  # in registers, and any
        weight, bias, before = floats(7, width), floats(7), tensor(2, 7, width - 1)
        for order, x in (("length", tensor(2, 7, 67)), ("channel", tensor(2, 67, 7).swapaxes(1, 2))):
            y, last, saved = causal_conv1d_fwd(x, weight, bias, activation="silu", initial_state=before)
            yield f"conv {dtype} width {width}, {order}", (y, last, *causal_conv1d_bwd(y, saved, last))
        yield (
            f"conv update {dtype} width {width}",
            (causal_conv1d_update(before, tensor(2, 7), weight, bias, activation="silu"), before),
        )

    for batch in (2, 9):  # one entry a thread, and four
        state, A, (x, dt, z) = floats(batch, 7, 5), -abs(floats(7, 5)), (tensor(batch, 7) for _ in "xdz")
        B, C = tensor(batch, 5), tensor(batch, 5)
        y = selective_state_update(state, x, dt, A, B, C, floats(7), z, floats(7), dt_softplus=True)
        yield f"state update {dtype}, batch {batch}", (y, state)

    for dim in (50, 20001):  # in registers, and longer rows
        x, residual, weight = tensor(5, dim), floats(5, dim), floats(dim)
        y, total, saved = rms_norm_fwd(x, weight, residual)
        yield f"RMS norm {dtype}, {dim}", (y, total, *rms_norm_bwd(y, saved, total))
        y, total, saved = layer_norm_fwd(x, weight, floats(dim), residual)
        yield f"layer norm {dtype}, {dim}", (y, total, *layer_norm_bwd(y, saved, total))

    for vocabulary in (50, 2501):  # a warp, and a block a row
        targets = cases.to_gpu(rng.integers(-1, vocabulary, 9))
        loss, saved = softmax_cross_entropy_fwd(tensor(9, vocabulary), targets)
        yield f"cross entropy {dtype}, {vocabulary}", (loss, softmax_cross_entropy_bwd(1.0, saved).logits)

    params, adam = {"weight": tensor(67, 65), "bias": tensor(7)}, AdamW(0.01)  # more than a block's, and no whole pack
    grads, norm = clip_by_norm(params, 1.0)
    params, after = adam.update(params, grads, adam.init(params))
    yield f"clipping and AdamW {dtype}", (norm, *grads.values(), *params.values(), *after.mean.values(), *after.square.values())


def with_library(dtype):
    """What CuPy's sorting and products have a part in: embedding, a step of a small model's training, and of generation."""
    rows = np.random.default_rng(0).standard_normal((5, 7)).astype(cases.DTYPES[dtype])
    y, saved = embedding_fwd(cp.asarray(np.random.default_rng(1).integers(0, 5, (3, 70))), cp.asarray(rows))
    yield f"embedding {dtype}", (y, embedding_bwd(y, saved).weight)

    model = MambaLM(MambaConfig(d_model=48, n_layer=2, vocab_size=50), dtype)
    params = map_params(cp.asarray, model.init(np.random.default_rng(0)))
    tokens = cp.asarray(np.random.default_rng(1).integers(0, 50, (9, 70)))
    logits, backprop = model(params, tokens[:, :-1])
    loss, saved = softmax_cross_entropy_fwd(logits, tokens[:, 1:])
    grads = backprop(softmax_cross_entropy_bwd(1.0, saved).logits)
    yield f"model {dtype}", (loss, grads["embedding"]["weight"])
    decode_step.LEAST_MULTIPLIED = 33, 0
    for batch in (3, 9, 33):  # norms within maps; by themselves; maps that are products by the library
        decoder, given = Decoder(model, params, batch, graph=False), tokens[cp.arange(batch) % 9]
        state = model.init_state(params, batch)
        model.advance(params, given[:, :5], state)
        logits = model.advance(params, given[:, 5:6], state)
        yield f"steps {dtype}, batch {batch}", (logits, decoder.step(given[:, 5]))
    model = MambaLM(MambaConfig(d_model=48, n_layer=1, vocab_size=9000), dtype)  # blocks take the rows of logits in turn
    params = map_params(cp.asarray, model.init(np.random.default_rng(0)))
    yield f"step {dtype}, many logits", (Decoder(model, params, 3, graph=False).step(tokens[:3, 0]),)


if __name__ == "__main__":
    main()
