"""Milliseconds a token of generation, with random weights of published sizes: `python -m benchmarks.generation`.

`peer_ms` is what the original implementation (state-spaces/mamba 2.3.2, its CUDA graph) takes on one NVIDIA H100 80GB HBM3.
"""

import itertools
import json
import time

import cupy as cp
import numpy as np

from benchmarks.timing import free
from mambacupy.decoder import Decoder
from mambacupy.generation import generate
from mambacupy.models import MambaConfig, MambaLM

SIZES = {"130m": (768, 24), "1.4b": (2048, 48)}
PEER_MS = {("130m", 1): 0.737, ("130m", 64): 0.936, ("1.4b", 1): 2.42, ("1.4b", 64): 3.55}
PROMPT, STEPS = 32, 200
VOCABULARY = 50277


def measure(only=""):
    """For each size and batch whose row's name contains `only`: milliseconds of `generate`, callback included, and of one
    step's graph alone."""
    for size in SIZES:
        names = {batch: f"generation {size} float16, batch {batch}, a token" for batch in (1, 64)}
        yield from _measure_size(size, {batch: name for batch, name in names.items() if only in name})
        free()


def _measure_size(size, names):
    if not names:
        return
    d_model, n_layer = SIZES[size]
    model = MambaLM(MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=VOCABULARY), "float16")
    params = random_params(model)
    for batch, name in names.items():
        graph_ms, generate_ms = time_model(model, params, batch)
        yield {"row": name, "ms": round(generate_ms, 4), "peer_ms": PEER_MS[size, batch], "graph_ms": round(graph_ms, 4)}


def random_params(model, seed=0):
    """Weights of the model's shapes in float16, drawn on the GPU: of a size that keeps all numbers finite, with the step sizes
    that models begin with. How far states remember decides how much a scan computes whose time is cut into parts."""
    rng = cp.random.default_rng(seed)

    def draw(shapes):
        return {name: draw(s) if isinstance(s, dict) else _draw(rng, name, s) for name, s in shapes.items()}

    block = {"norm": model.norm.shapes, "mixer": model.block.mixer.shapes}
    layers = [draw(block) for _ in range(model.config.n_layer)]
    for layer in layers:
        layer["mixer"]["dt_proj"]["bias"] = _step_sizes(rng, model.config.d_inner)
    return {"embedding": draw(model.embedding.shapes), "layers": layers, "norm_f": draw(model.norm.shapes)}


def _draw(rng, name, shape):
    if name == "A_log":
        return cp.tile(cp.log(cp.arange(1, shape[1] + 1, dtype=cp.float32)), (shape[0], 1)).astype(cp.float16)
    if len(shape) == 1:
        return cp.ones(shape, cp.float16)
    return (rng.standard_normal(shape, dtype=cp.float32) / shape[1] ** 0.5).astype(cp.float16)


def _step_sizes(rng, count):
    """Biases whose softplus is log-uniform between 0.001 and 0.1."""
    dt = 0.001 * cp.exp(np.log(100.0) * rng.random(count, dtype=cp.float32))
    return (dt + cp.log(-cp.expm1(-dt))).astype(cp.float16)


def time_model(model, params, batch):
    """Milliseconds of a step: of its graph, and of generation with the host."""
    decoder = Decoder(model, params, batch)
    for _ in range(10):
        decoder.step()
    events = [cp.cuda.Event() for _ in range(6)]
    events[0].record()
    for event in events[1:]:
        for _ in range(STEPS):
            decoder.step()
        event.record()
    events[-1].synchronize()
    graph_ms = float(np.median([cp.cuda.get_elapsed_time(a, b) for a, b in itertools.pairwise(events)])) / STEPS

    prompt = cp.random.default_rng(1).integers(0, VOCABULARY, (batch, PROMPT))
    times = []
    generate(model, params, prompt, 4, decoder=decoder, on_step=lambda tokens: times.append(time.perf_counter()))
    times.clear()
    generate(model, params, prompt, STEPS, decoder=decoder, on_step=lambda tokens: times.append(time.perf_counter()))
    return graph_ms, (times[-1] - times[0]) / (len(times) - 1) * 1e3


def main():
    for row in measure():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
