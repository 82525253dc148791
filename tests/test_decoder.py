"""The decoding step: its kernels compiled and emulated without a GPU, its graph on one, against the model itself."""

import re
import shutil
from types import SimpleNamespace

import emulator
import library as stand_in
import numpy as np
import pytest
import small_models

from mambacupy import decode_step, kernels
from mambacupy.decode_step import DecodeStep
from mambacupy.decoder import Decoder
from mambacupy.generation import generate
from mambacupy.layers import map_params
from mambacupy.models import MambaConfig, MambaLM
from mambacupy.ops import products

SIZES = {"d_model": 40, "n_layer": 2, "vocab_size": 75, "d_state": 16, "dt_rank": 8}
ROWS = small_models.VARIANTS | {
    "conv-1": {"d_conv": 1},
    "odd-sizes": {"d_model": 33, "dt_rank": 3, "d_state": 5, "d_conv": 3, "pad_vocab_size_multiple": 1},
    "state-70": {"d_state": 70},
}
ERRORS = {"float32": 2e-5, "float16": 3e-3, "bfloat16": 3e-2}
"""Relative error in the 2-norm of logits and states after some steps, by the dtype that the model computes in."""


def make(dtype, **changes):
    """A small model that computes in a dtype, and its parameters."""
    return small_models.make(SIZES | changes, 0.1, np.float32, dtype)


def error(got, wanted):
    wanted = wanted.astype(np.float64)
    return np.linalg.norm(got.astype(np.float64) - wanted) / max(np.linalg.norm(wanted), 1e-30)


def follow(model, params, batch, step, state, steps=2):
    """Worst error of logits and states over some steps from a prompt's state; the largest logits are checked on the way."""
    rng = np.random.default_rng(2)
    prompt = rng.integers(0, model.config.vocab_size, (batch, 5))
    wanted_state = model.init_state(params, batch)
    model.advance(params, prompt, wanted_state)
    for part, wanted in zip(state, wanted_state, strict=True):
        for array, value in zip(part, wanted, strict=True):
            array[...] = value
    worst = 0.0
    for _ in range(steps):
        tokens = rng.integers(0, model.config.vocab_size, batch)
        wanted = model.advance(params, tokens[:, None], wanted_state)[:, 0]
        logits, largest = step(tokens)
        assert np.array_equal(largest, logits[:, : model.config.vocab_size].argmax(1))
        worst = max(worst, error(logits, wanted))
    for part, wanted in zip(state, wanted_state, strict=True):
        worst = max(worst, *(error(array, value) for array, value in zip(part, wanted, strict=True) if value.size))
    return worst


# ---------------------------------------------------------------------------------------------------- without a GPU
@pytest.fixture
def memory(monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    emulator.install(monkeypatch, emulator.H100._replace(multiprocessors=4))
    return emulator.Memory()


def emulated(memory, model, params, batch, tensor_cores=True):
    step = DecodeStep(memory, model, params, batch, tensor_cores, overlap=False)

    def run(tokens):
        step.tokens[...] = tokens
        step.run()
        return step.logits, step.tokens

    return follow(model, params, batch, run, step.state)


OTHER = {"tie_embeddings": False, "rms_norm": False, "bc_dt_norm": True, "bias": True, "conv_bias": False,
         "residual_in_fp32": False, **ROWS["odd-sizes"]}  # fmt: skip
EMULATED = {
    "base": ("float32", 3, {}, True),
    "all-otherwise-without-tensor-cores": ("float16", 2, OTHER, False),
    "norms-by-themselves": ("float32", 9, {"n_layer": 1}, True),
    "tensor-cores": ("float16", 1, {"n_layer": 1, "d_model": 32, "vocab_size": 20}, True),
    "tensor-cores-batch-20": ("bfloat16", 20, {"n_layer": 1, "d_model": 32, "vocab_size": 20}, True),
    "conv-1-state-70": ("float32", 1, {"n_layer": 1, "d_conv": 1, "d_state": 70}, True),
    "no-layer": ("float32", 1, {"n_layer": 0}, True),
    "rows-in-turn": ("float32", 2, {"n_layer": 1, "vocab_size": 700}, True),
    "rows-in-turn-tensor-cores": ("float16", 2, {"n_layer": 1, "vocab_size": 700, "bias": True}, True),
    "four-sequences-a-thread": ("float32", 34, {"n_layer": 1}, True),
    "four-sequences-a-thread-tensor-cores": ("float16", 34, {"n_layer": 1, "d_model": 32, "vocab_size": 20}, True),
}


@pytest.mark.parametrize("row", EMULATED)
def test_a_step_is_the_models(memory, row):
    dtype, batch, changes, tensor_cores = EMULATED[row]
    assert emulated(memory, *make(dtype, **changes), batch, tensor_cores) <= ERRORS[dtype]


@pytest.mark.parametrize("row", ["base", "biases", "bc-dt-norm", "untied"])
def test_a_step_of_products_is_the_models(memory, monkeypatch, row):
    model, params = make("float16", **ROWS[row] | {"n_layer": 1, "d_model": 24, "vocab_size": 20, "dt_rank": 5})
    library = stand_in.install(monkeypatch, memory)
    monkeypatch.setattr(decode_step, "LEAST_MULTIPLIED", (33, 0))
    step = DecodeStep(memory, model, params, 33, True, overlap=False, library=True)

    def run(tokens):
        step.tokens[...] = tokens
        step.run()
        return step.logits, step.tokens

    assert follow(model, params, 33, run, step.state) <= ERRORS["float16"]
    assert library.calls == 2 * (1 if row == "biases" else 3)


def test_the_same_bits_again(memory):
    model, params = make("float32", n_layer=1)
    results = []
    for _ in range(2):
        step = DecodeStep(memory, model, params, 3, True, overlap=False)
        step.tokens[...] = [5, 0, 74]
        for _ in range(2):
            step.run()
        results.append([x.tobytes() for x in (step.logits, step.tokens, *step.state[0])])
    assert results[0] == results[1]
    step.clear()
    assert not any(x.any() for x in (step.tokens, *step.state[0]))


def test_the_largest_is_the_first_of_equals_and_a_token(memory):
    """Ties everywhere, and larger numbers in the columns that only round the vocabulary up."""
    model, params = make("float32", n_layer=0, tie_embeddings=False)
    params["lm_head"]["weight"][...] = 0
    params["lm_head"]["weight"][75:] = 9 * np.sign(params["norm_f"]["weight"])
    step = DecodeStep(memory, model, params, 2, True, overlap=False)
    step.run()
    assert step.tokens.tolist() == [0, 0] and step.logits[:, 75:].any()


def zeros(shapes, dtype):
    """Parameters of those shapes that take no memory until they are touched."""
    return {name: zeros(s, dtype) if isinstance(s, dict) else np.zeros(s, dtype) for name, s in shapes.items()}


def recorded(d_model, dtype, batch, tensor_cores=True, overlap=False, library=False):
    """Kernels (file, name, constants) with their blocks, threads and numbers of a step of a model of that size, by launch; of
    products by the library, nothing."""
    found = []
    with pytest.MonkeyPatch.context() as patch:

        def get(file, name, constants, shared_bytes=0):
            def prepare(blocks, threads, numbers, overlap=False):
                return lambda arrays: found.append((file, name, constants, blocks, threads, numbers, arrays))

            return SimpleNamespace(prepare=prepare)

        patch.setattr(kernels, "get", get)
        patch.setattr(kernels, "device", lambda: emulator.H100)
        patch.setattr(kernels, "address", lambda x: 0)
        patch.setattr(products, "product", lambda *_, **__: None)
        model = MambaLM(MambaConfig(d_model=d_model, n_layer=2, vocab_size=50277), dtype)
        layer = {"norm": zeros(model.norm.shapes, dtype), "mixer": zeros(model.block.mixer.shapes, dtype)}
        params = {"embedding": zeros(model.embedding.shapes, dtype), "layers": [layer] * 2, "norm_f": layer["norm"]}
        DecodeStep(np, model, params, batch, tensor_cores, overlap, library).run()
    return found


def distinct():
    """Kernels of published sizes: (file, constants), each once."""
    found = {}
    every = [(768, "float16", 1), (768, "float16", 64), (2048, "float16", 1), (2048, "float16", 64), (768, "float32", 3)]
    every += [(2048, "float16", 2), (2048, "float16", 8), (2560, "float16", 1), (4096, "float16", 1)]
    for d_model, dtype, batch in every:
        launches = recorded(d_model, dtype, batch, overlap=d_model == 768) + recorded(d_model, dtype, batch, library=True)
        for file, name, constants, *_ in launches:
            found.setdefault((file, tuple(constants.items())), f"{name}-{d_model}-{dtype}-{batch}")
    return [pytest.param(file, dict(constants), id=f"{row}-{i}") for i, ((file, constants), row) in enumerate(found.items())]


@pytest.mark.parametrize(("file", "constants"), distinct())
def test_compiles_without_spills(file, constants, request):
    pytest.importorskip("cupy", reason="the compile tests need CuPy and NVRTC (the extra `test`)")
    every = "768-float16-1-" in request.node.callspec.id  # for all architectures; the rest for the one we measure on
    for architecture in kernels.ARCHITECTURES if every else ("90",):
        constants |= {"TENSOR": 0} if architecture == "75" and "TENSOR" in constants else {}
        if architecture == "75" and constants.get("BATCH") == 8:
            constants |= {"BATCH": 1}
        _, log = kernels.compile_for(architecture, kernels.specialise(file, constants))
        assert re.findall(r"Used \d+ registers", log)
        assert not any(map(int, re.findall(r"(\d+) bytes (?:stack|spill)", log))), f"sm_{architecture}: {log}"
        assert max(map(int, re.findall(r"(\d+) bytes smem", log)), default=0) <= 48 * 1024


def test_launches_get_what_the_struct_names():
    launches = recorded(768, "float16", 1)
    assert len(launches) == 2 * 4 + 2, "four launches a block, then the head and the largest logit"
    assert len(recorded(768, "float16", 64)) == 2 * 5 + 3, "and one more for each norm by itself"
    for file, name, constants, blocks, threads, numbers, arrays in launches:
        source = kernels.specialise(file, constants)
        assert f" {name}(const Params p)" in source
        assert f"WARPS = {threads // 32}," in source
        pointers, wanted = kernels.parameter_names(source)
        assert set(arrays) == set(pointers) and set(numbers) == set(wanted) - {"first_block"}
        assert blocks >= numbers.get("blocks", 1) > 0


def test_small_kernels_fetch_for_later_ones():
    for _, name, _, blocks, _, numbers, arrays in recorded(768, "float16", 1):
        if name == "selective_step" or (name == "matrix_vector" and numbers["rows"] == 80):
            assert blocks == 132 > numbers["blocks"]
            assert numbers["ahead_bytes"] == min(arrays["ahead"].nbytes, decode_step.AHEAD_BYTES) >= 2**20


def test_a_decoder_refuses():
    model, params = make("float32")
    with pytest.raises(TypeError, match="Decoder: params are NumPy arrays, wanted CuPy's; map_params"):
        Decoder(model, params, 1)
    with pytest.raises(ValueError, match="Decoder: batch is 0, wanted an integer, 1 or more"):
        Decoder(model, params, 0)
    assert Decoder.takes(model, params)
    assert not Decoder.takes(*make("float64")) and not Decoder.takes(*make("float32", d_conv=17))


# ---------------------------------------------------------------------------------------------------- on a GPU
def on_gpu(model, params, batch, **options):
    """Worst error of the decoder against the plain path on the same GPU."""
    import cupy

    params = map_params(cupy.asarray, params)
    decoder = Decoder(model, params, batch, **options)
    rng = np.random.default_rng(2)
    prompt = cupy.asarray(rng.integers(0, model.config.vocab_size, (batch, 5)))
    state = model.init_state(params, batch)
    model.advance(params, prompt, state)
    model.advance(params, prompt, decoder.fresh_state())
    worst = 0.0
    for _ in range(4):
        tokens = cupy.asarray(rng.integers(0, model.config.vocab_size, batch))
        wanted = model.advance(params, tokens[:, None], state)[:, 0]
        logits = decoder.step(tokens)
        logits = logits.get()
        assert np.array_equal(decoder.tokens.get(), logits[:, : model.config.vocab_size].argmax(1))
        worst = max(worst, error(logits, wanted.get()))
    pairs = [
        (a, b) for mine, other in zip(decoder.state, state, strict=True) for a, b in zip(mine, other, strict=True) if b.size
    ]
    return max([worst, *(error(a.get(), b.get()) for a, b in pairs)])


ON_GPU = [("base", dtype, batch) for dtype in ("float32", "float16", "bfloat16") for batch in (1, 3, 64)]
ON_GPU += [(row, *how) for row in ROWS if row != "base" for how in (("float32", 3), ("float16", 64))]


@pytest.mark.gpu
@pytest.mark.parametrize(("row", "dtype", "batch"), ON_GPU)
def test_gpu_graph_is_the_plain_path(row, dtype, batch):
    assert on_gpu(*make(dtype, **ROWS[row]), batch) <= ERRORS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gpu_products_in_the_graph_are_the_plain_path(row, dtype, monkeypatch):
    monkeypatch.setattr(decode_step, "LEAST_MULTIPLIED", (1, 0))
    assert on_gpu(*make(dtype, **ROWS[row]), 10) <= ERRORS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"graph": False}, {"overlap": False}, {}], ids=["launches", "graph", "overlapping"])
@pytest.mark.parametrize("batch", [1, 8, 9, 100])
def test_gpu_sizes_of_a_real_model(batch, options):
    model = MambaLM(MambaConfig(d_model=768, n_layer=3, vocab_size=9000), "float16")
    params = map_params(lambda p: p.astype(np.float16) if p.ndim == 2 else p, model.init(np.random.default_rng(0)))
    assert on_gpu(model, params, batch, **options) <= ERRORS["float16"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_gpu_generates_the_plain_paths_tokens(dtype, batch, monkeypatch):
    """Greedy and sampled: the same tokens in float32; in 16 bits rows may part where two logits are all but equal."""
    import cupy

    model, params = make(dtype, vocab_size=300, d_model=64)
    params["embedding"]["weight"] *= 4
    params = map_params(cupy.asarray, params)
    tokens = cupy.asarray(np.random.default_rng(1).integers(0, 300, (batch, 7)))
    for options in ({}, {"temperature": 0.02, "seed": 3, "top_k": 40}):
        options |= {"stop": range(5)} if dtype == "float32" else {}
        fast = generate(model, params, tokens, 24, **options).tokens
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "takes", lambda *_: False)
            plain = generate(model, params, tokens, 24, **options).tokens
        assert fast.shape == plain.shape
        assert (fast == plain).mean() >= (1 if dtype == "float32" else 0.5)


@pytest.mark.gpu
def test_gpu_a_decoder_serves_again_with_the_same_bits():
    import cupy

    model, params = make("bfloat16")
    params = map_params(cupy.asarray, params)
    tokens = cupy.asarray(np.random.default_rng(1).integers(0, 75, (2, 7)))
    decoder = Decoder(model, params, 2)
    made = [generate(model, params, tokens, 30, decoder=decoder).tokens.get() for _ in range(2)]
    logits = decoder.logits.get().tobytes()
    made.append(generate(model, params, tokens, 30).tokens.get())
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])
    generate(model, params, tokens, 30, decoder=decoder)
    assert decoder.logits.get().tobytes() == logits
    with pytest.raises(ValueError, match="generate: decoder is one for 2 sequences and other params or another model"):
        generate(model, params, tokens[:1], 3, decoder=decoder)


@pytest.mark.gpu
def test_gpu_a_step_allocates_nothing():
    import cupy

    model, params = make("float16")
    decoder = Decoder(model, map_params(cupy.asarray, params), 3)
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes(), pool.total_bytes()
    for _ in range(20):
        decoder.step()
    assert (pool.used_bytes(), pool.total_bytes()) == before
