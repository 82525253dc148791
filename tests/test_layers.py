"""Layers against finite differences, against loops written from the equations, and for what they promise about memory."""

import copy
import math
import pickle
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from scipy.stats import kstest

from mambacupy import layers
from mambacupy.gradients import check_gradients
from mambacupy.layers import (
    Block,
    Checkpoint,
    Embedding,
    LayerNorm,
    Linear,
    MambaMixer,
    Residual,
    RMSNorm,
    Serial,
    State,
    map_params,
)

SMALL = MambaMixer(d_model=3, d_state=2, d_conv=3, expand=2, dt_rank=2)
NORMED = replace(SMALL, bc_dt_norm=True)
LENGTHS = np.array([5, 0])


def random_params(layer, seed=0, dtype=np.float64):
    """Initial parameters, moved so that none is 0 or 1, and so that steps of time are long enough to matter."""
    rng = np.random.default_rng(seed)
    return map_params(lambda p: (p + 0.3 * rng.standard_normal(p.shape)).astype(dtype), layer.init(rng, dtype))


def normal(*shape, seed=1, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def state_of(mixer, batch, dtype=np.float64):
    return State(normal(batch, mixer.d_inner, mixer.d_conv - 1, dtype=dtype), normal(batch, mixer.d_inner, mixer.d_state))


def flat(nest, place=""):
    """{path: array} of a nest of dicts and lists."""
    steps = nest.items() if isinstance(nest, dict) else enumerate(nest) if isinstance(nest, (list, tuple)) else None
    if steps is None:
        return {place: nest}
    return {path: x for key, inner in steps for path, x in flat(inner, f"{place}/{key}").items()}


def unflat(nest, arrays, place=""):
    """The nest with its arrays replaced by those of {path: array}."""
    if isinstance(nest, dict):
        return {key: unflat(inner, arrays, f"{place}/{key}") for key, inner in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)(unflat(inner, arrays, f"{place}/{i}") for i, inner in enumerate(nest))
    return arrays[place]


def check(call, params, x, directions=3):
    """Finite differences of `call(params, x) -> (y, backprop)` over all of params and x."""
    nest = {"params": params, "x": x}

    def fwd(**arrays):
        y, backprop = call(*unflat(nest, arrays).values())
        return (*y, backprop) if isinstance(y, tuple) else (y, backprop)

    def bwd(dy, backprop, *more):
        dx, grads = backprop((dy, *more) if more else dy)
        return flat({"params": grads, "x": dx})

    inputs = flat(nest)
    errors = check_gradients(fwd, bwd, inputs, tolerance=1e-6, directions=directions)
    assert len(errors) == sum(array.dtype == np.float64 for array in inputs.values())


def naive_mixer(mixer, params, x, state=None):
    """The block, token by token and channel by channel as its equations stand, for one sequence x (length, d_model)."""
    p, inner, rank, N = params, mixer.d_inner, mixer.rank, mixer.d_state
    window = np.zeros((inner, mixer.d_conv - 1)) if state is None else state.conv.copy()
    h = np.zeros((inner, N)) if state is None else state.ssm.copy()

    def silu(v):
        return v / (1 + np.exp(-v))

    def normed(v):
        return v / np.sqrt(np.mean(v**2) + mixer.bc_dt_norm_eps) if mixer.bc_dt_norm else v

    y = np.empty_like(x)
    for t, token in enumerate(x):
        xz = p["in_proj"]["weight"] @ token + p["in_proj"].get("bias", 0)
        window = np.concatenate([window, xz[:inner, None]], axis=1)
        c = silu((window * p["conv1d"]["weight"]).sum(1) + p["conv1d"].get("bias", 0))
        window = window[:, 1:]
        selected = p["x_proj"]["weight"] @ c
        low, B, C = (normed(v) for v in np.split(selected, [rank, rank + N]))
        dt = np.log1p(np.exp(p["dt_proj"]["weight"] @ low + p["dt_proj"]["bias"]))
        for d in range(inner):
            h[d] = np.exp(-np.exp(p["A_log"][d]) * dt[d]) * h[d] + dt[d] * B * c[d]
        out = (h @ C + p["D"] * c) * silu(xz[inner:])
        y[t] = p["out_proj"]["weight"] @ out + p["out_proj"].get("bias", 0)
    return y, State(window, h)


# ---------------------------------------------------------------------------------------------------- gradients
PLAIN = {
    "linear": (Linear(4, 3), normal(2, 5, 4)),
    "linear-bias": (Linear(4, 3, bias=True), normal(2, 5, 4)),
    "linear-1-axis": (Linear(4, 3, bias=True), normal(4)),
    "rms-norm": (RMSNorm(4), normal(2, 5, 4)),
    "rms-norm-eps": (RMSNorm(4, eps=0.5), normal(2, 5, 4)),
    "rms-norm-pair": (RMSNorm(4), (normal(2, 5, 4), normal(2, 5, 4, seed=2))),
    "layer-norm": (LayerNorm(4), normal(2, 5, 4)),
    "layer-norm-pair": (LayerNorm(4), (normal(2, 5, 4), normal(2, 5, 4, seed=2))),
    "residual": (Residual(Linear(4, 4)), normal(2, 5, 4)),
    "serial": (Serial((Linear(4, 3), RMSNorm(3), Linear(3, 2, bias=True))), normal(2, 5, 4)),
    "serial-of-none": (Serial(()), normal(2, 5, 4)),
    "checkpoint": (Checkpoint(Serial((Linear(4, 3), RMSNorm(3)))), normal(2, 5, 4)),
    "block": (Block(RMSNorm(3), SMALL), normal(2, 5, 3)),
    "block-pair": (Block(LayerNorm(3), SMALL), (normal(2, 5, 3), normal(2, 5, 3, seed=2))),
    "block-checkpoint": (Checkpoint(Block(RMSNorm(3), SMALL)), (normal(2, 5, 3), normal(2, 5, 3, seed=2))),
    "blocks": (Serial((Block(RMSNorm(3), SMALL), Block(RMSNorm(3), NORMED), RMSNorm(3), Linear(3, 4))), normal(2, 5, 3)),
}


@pytest.mark.parametrize("row", PLAIN)
def test_gradient(row):
    layer, x = PLAIN[row]
    check(layer, random_params(layer), x)


MIXERS = {
    "base": {},
    "bias": {"bias": True},
    "no-conv-bias": {"conv_bias": False},
    "auto-rank": {"dt_rank": "auto"},
    "state-1": {"d_state": 1},
    "conv-1": {"d_conv": 1},
    "conv-2": {"d_conv": 2},
    "expand-1": {"expand": 1},
    "norms": {"bc_dt_norm": True},
}


@pytest.mark.parametrize(("row", "length"), [*((row, 5) for row in MIXERS), ("base", 1), ("base", 66), ("norms", 66)])
def test_gradient_of_a_mixer(row, length):
    mixer = replace(SMALL, **MIXERS[row])
    check(mixer, random_params(mixer), normal(2, length, 3), directions=2)


def test_gradient_of_a_mixer_whose_norms_have_weights():
    params = random_params(NORMED) | {
        name: {"weight": normal(2, seed=i)} for i, name in enumerate(("dt_layernorm", "b_layernorm", "c_layernorm"))
    }
    check(NORMED, params, normal(2, 5, 3), directions=2)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
@pytest.mark.parametrize("wrap", [lambda mixer: mixer, Checkpoint], ids=["plain", "checkpoint"])
def test_gradient_after_a_state(wrap, lengths):
    """The state is written to in place; the gradient is that of the one which came."""
    layer, came = wrap(SMALL), state_of(SMALL, 2)
    check(lambda params, x: layer(params, x, came.copy(), lengths), random_params(SMALL), normal(2, 5, 3))


def test_gradient_of_an_embedding():
    layer, tokens = Embedding(5, 3), np.array([[1, 4, 1], [0, 1, 1]])
    y, backprop = layer(random_params(layer), tokens)
    dx, grads = backprop(normal(*y.shape))
    wanted = np.zeros((5, 3))
    for place, token in np.ndenumerate(tokens):
        wanted[token] += normal(*y.shape)[place]
    assert dx is None
    np.testing.assert_allclose(grads["weight"], wanted, rtol=1e-14)


@pytest.mark.parametrize("layer", [SMALL, Checkpoint(SMALL)], ids=["plain", "checkpoint"])
def test_backprop_can_be_called_again(layer):
    y, backprop = layer(random_params(layer), normal(2, 5, 3), state_of(SMALL, 2))
    first, second = flat(backprop(np.ones_like(y))), flat(backprop(np.ones_like(y)))
    assert all(np.array_equal(first[path], second[path]) for path in first)


# ---------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("row", MIXERS)
@pytest.mark.parametrize("came", [False, True], ids=["fresh", "state"])
def test_mixer_is_its_equations(row, came):
    mixer = replace(SMALL, **MIXERS[row])
    params, x = random_params(mixer), normal(2, 7, 3)
    before = state_of(mixer, 2) if came else mixer.init_state(np, 2, np.float64)
    states = {"call": before.copy(), "advance": before.copy(), "steps": before.copy()}
    results = {
        "call": mixer(params, x, states["call"])[0],
        "advance": mixer.advance(params, x, states["advance"]),
        "steps": np.concatenate([mixer.advance(params, x[:, t : t + 1], states["steps"]) for t in range(7)], axis=1),
    }
    for i in range(2):
        wanted, last = naive_mixer(mixer, params, x[i], State(before.conv[i], before.ssm[i]))
        for how, y in results.items():
            np.testing.assert_allclose(y[i], wanted, rtol=1e-11, atol=1e-13, err_msg=how)
            np.testing.assert_allclose(states[how].conv[i], last.conv, rtol=1e-12, atol=1e-14, err_msg=how)
            np.testing.assert_allclose(states[how].ssm[i], last.ssm, rtol=1e-12, atol=1e-14, err_msg=how)


@pytest.mark.parametrize("lengths", [[7, 0], [3, 1], [2, 6]])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_padding_behind_never_reaches_a_state(lengths, width):
    mixer = replace(SMALL, d_conv=width)
    params, x, before = random_params(mixer), normal(2, 7, 3), state_of(mixer, 2)
    x[np.arange(7) >= np.array(lengths)[:, None]] = 1e3
    for run in (mixer.__call__, mixer.advance):
        state = before.copy()
        run(params, x, state, np.array(lengths))
        for i, length in enumerate(lengths):
            _, wanted = naive_mixer(mixer, params, x[i, :length], State(before.conv[i], before.ssm[i]))
            np.testing.assert_allclose(state.conv[i], wanted.conv, rtol=1e-12)
            np.testing.assert_allclose(state.ssm[i], wanted.ssm, rtol=1e-12)
            if not length:
                assert np.array_equal(state.ssm[i], before.ssm[i])
                assert np.array_equal(state.conv[i], before.conv[i])


@pytest.mark.parametrize("mixer", [SMALL, NORMED, Checkpoint(SMALL)], ids=["plain", "normed", "checkpoint"])
@pytest.mark.parametrize("came", [False, True], ids=["fresh", "state"])
def test_what_is_not_a_number_stays_in_padding(mixer, came):
    """Rows with NaN and infinity behind their tokens are rows with zeros there, in all that a call gives."""
    inner = getattr(mixer, "layer", mixer)
    lengths = np.array([4, 0, 6], np.uint8)
    padding = np.arange(6) >= lengths[:, None]
    x, dy, params = normal(3, 6, 3), normal(3, 6, 3, seed=2), random_params(inner)
    x[padding], dy[padding] = np.nan, np.inf
    results = []
    for tokens, incoming in ((x, dy), (np.where(padding[..., None], 0, x), np.where(padding[..., None], 0, dy))):
        state = state_of(inner, 3) if came else None
        y, backprop = mixer(params, tokens, state, lengths)
        dx, grads = backprop(incoming)
        results.append({"y": y, "dx": dx, "grads": grads, "state": state._asdict() if came else {}})
        assert not y[padding].any() and not dx[padding].any()
        for i, length in enumerate(lengths):
            alone = State(state_of(inner, 3).conv[i : i + 1], state_of(inner, 3).ssm[i : i + 1]) if came else None
            np.testing.assert_allclose(y[i, :length], inner.advance(params, x[i : i + 1, :length], alone)[0], rtol=1e-12)
    one, two = map(flat, results)
    for path, value in one.items():
        assert np.isfinite(value).all() and np.array_equal(value, two[path]), path
    if came:
        state = state_of(inner, 3)
        assert np.array_equal(inner.advance(params, x, state, lengths), results[0]["y"])
        assert np.array_equal(state.ssm, results[0]["state"]["ssm"])


def test_lengths_of_no_steps():
    state = state_of(SMALL, 2)
    y, backprop = SMALL(random_params(SMALL), normal(2, 0, 3), state, np.array([0, 0]))
    assert y.shape == backprop(y)[0].shape == (2, 0, 3)
    assert np.array_equal(state.ssm, state_of(SMALL, 2).ssm) and np.array_equal(state.conv, state_of(SMALL, 2).conv)


def test_residual_and_block_add():
    params, x, layer = random_params(SMALL), normal(2, 5, 3), Block(RMSNorm(3, eps=1e-3), SMALL)
    np.testing.assert_array_equal(Residual(SMALL)(params, x)[0], x + SMALL(params, x)[0])
    hidden, residual = normal(2, 5, 3, seed=2), x + normal(2, 5, 3, seed=2)
    (y, total), _ = layer({"norm": {"weight": np.full(3, 2.0)}, "mixer": params}, (hidden, x))
    np.testing.assert_allclose(total, residual, rtol=1e-15)
    normed = 2 * residual / np.sqrt((residual**2).mean(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(y, SMALL(params, normed)[0], rtol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)])
def test_empty(shape):
    params, x = random_params(SMALL), np.zeros(shape)
    y, backprop = SMALL(params, x)
    dx, grads = backprop(y)
    assert y.shape == dx.shape == shape
    assert all(not g.any() for g in flat(grads).values())


# ---------------------------------------------------------------------------------------------------- initialisation
LARGE = MambaMixer(d_model=256, dt_rank=16, n_layer=9, bias=True)


@pytest.fixture(scope="module")
def large():
    return LARGE.init(np.random.default_rng(0))


def test_initial_shapes_are_those_of_the_checkpoints():
    shapes = map_params(lambda p: p.shape, MambaMixer(768).init(np.random.default_rng(0)))
    assert shapes == MambaMixer(768).shapes
    assert flat({name: s for name, s in shapes.items() if isinstance(s, dict)}).keys() == {
        *(f"/{name}_proj/weight/{i}" for name in ("in", "x", "dt", "out") for i in range(2)),
        *(f"/conv1d/{place}" for place in ("weight/0", "weight/1", "bias/0")),
        "/dt_proj/bias/0",
    }
    assert (shapes["A_log"], shapes["D"], shapes["in_proj"]["weight"]) == ((1536, 16), (1536,), (3072, 768))
    assert (shapes["conv1d"]["weight"], shapes["x_proj"]["weight"]) == ((1536, 4), (80, 1536))
    assert (shapes["dt_proj"]["weight"], shapes["out_proj"]["weight"]) == ((1536, 48), (768, 1536))


@pytest.mark.parametrize(
    ("path", "bound"),
    {
        "/in_proj/weight": 1 / math.sqrt(256),
        "/conv1d/weight": 1 / math.sqrt(4),
        "/conv1d/bias": 1 / math.sqrt(4),
        "/x_proj/weight": 1 / math.sqrt(512),
        "/dt_proj/weight": 1 / math.sqrt(16),
        "/out_proj/weight": 1 / math.sqrt(512) / 3,
    }.items(),
)
def test_initial_weights_are_uniform(large, path, bound):
    weights = flat(large)[path].ravel()
    assert kstest(weights, "uniform", args=(-bound, 2 * bound)).pvalue > 1e-3


def test_initial_step_sizes_are_log_uniform(large):
    steps = np.log1p(np.exp(large["dt_proj"]["bias"].astype(float)))  # softplus: what the scan sees where its input is 0
    assert kstest(np.log(steps), "uniform", args=(math.log(1e-3), math.log(100))).pvalue > 1e-3
    floor = replace(LARGE, dt_init_floor=0.02).init(np.random.default_rng(0))["dt_proj"]["bias"]
    np.testing.assert_allclose(np.log1p(np.exp(floor.astype(float))).min(), 0.02, rtol=1e-5)


def test_initial_constants(large):
    np.testing.assert_allclose(np.exp(large["A_log"]), np.tile(np.arange(1, 17), (512, 1)), rtol=1e-6)
    assert (large["D"] == 1).all()
    assert not large["in_proj"]["bias"].any()
    assert not large["out_proj"]["bias"].any()
    constant = replace(LARGE, dt_init="constant", dt_scale=0.5).init(np.random.default_rng(0))
    assert (constant["dt_proj"]["weight"] == 0.125).all()
    assert (RMSNorm(3).init()["weight"] == 1).all()
    assert not LayerNorm(3).init()["bias"].any()


def test_initial_dtype_and_seed():
    again, double = SMALL.init(np.random.default_rng(3)), SMALL.init(np.random.default_rng(3), np.float64)
    for path, p in flat(SMALL.init(np.random.default_rng(3))).items():
        assert p.dtype == np.float32
        assert np.array_equal(p, flat(again)[path])
        assert np.array_equal(p, flat(double)[path].astype(np.float32))


def test_initial_embedding_is_normal():
    weights = Embedding(500, 40).init(np.random.default_rng(0))["weight"]
    assert kstest(weights.ravel(), "norm", args=(0, 0.02)).pvalue > 1e-3


def test_what_is_built_from_a_mixers_saved_has_no_plan():
    """A plan stands for the very arrays it was made for."""
    _, saved = SMALL._forward(random_params(SMALL), normal(2, 5, 3), None, None, save=True)
    saved.plan = object()
    assert pickle.loads(pickle.dumps(saved)).plan is None
    assert copy.deepcopy(saved).plan is None
    assert saved._replace(x=saved.x).plan is None


# ---------------------------------------------------------------------------------------------------- memory
def owners(kept):
    """{address: bytes} of the memory that arrays, nests of them and closures hold."""
    if isinstance(kept, np.ndarray):
        while isinstance(kept.base, np.ndarray):
            kept = kept.base
        return {kept.ctypes.data: kept.nbytes}
    inner = kept if isinstance(kept, (list, tuple)) else ()
    if isinstance(kept, dict):
        inner = [*kept.values(), getattr(kept, "rounded", None)]  # as `layers.round_weights` leaves it
    if hasattr(kept, "__closure__"):
        inner = [*(cell.cell_contents for cell in kept.__closure__ or ()), *(kept.__defaults__ or ())]
    return {address: size for part in inner for address, size in owners(part).items()}


def bytes_kept(backprop, params):
    """Bytes that a closure holds, parameters left out."""
    not_counted = owners(params)
    return sum(size for address, size in owners(backprop).items() if address not in not_counted)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
def test_memory_that_a_mixer_keeps(dtype, norms):
    mixer, batch, length = MambaMixer(d_model=32, d_state=16, bc_dt_norm=norms), 2, 130
    params = mixer.init(np.random.default_rng(0))
    y, backprop = mixer(params, normal(batch, length, 32, dtype=dtype))
    numbers = 32 + 3 * 64 + 2 + 2 * 16  # x; xz and y; dt, B and C
    states = (batch * math.ceil(length / 64) + 1) * 64 * 16 * 4  # A as well
    kept = bytes_kept(backprop, params)
    assert kept == batch * length * numbers * np.dtype(dtype).itemsize + states
    backprop(y)
    assert bytes_kept(backprop, params) == kept


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_memory_that_a_block_keeps(dtype):
    """The mixer's, and for its norm the float32 residual and a number a token."""
    mixer, tokens = MambaMixer(d_model=32), 2 * 130
    block = Block(RMSNorm(32), mixer)
    params, x = block.init(np.random.default_rng(0)), normal(2, 130, 32, dtype=dtype)
    alone = bytes_kept(mixer(params["mixer"], x)[1], params)
    assert bytes_kept(block(params, (x, x.astype(np.float32)))[1], params) == alone + tokens * (32 * 4 + 4)


def test_memory_that_a_checkpoint_keeps():
    params, x = random_params(SMALL), normal(2, 130, 3)
    assert bytes_kept(Checkpoint(SMALL)(params, x)[1], params) == x.nbytes
    state = SMALL.init_state(np, 2, np.float64)
    kept = x.nbytes + state.conv.nbytes + state.ssm.nbytes
    assert bytes_kept(Checkpoint(SMALL)(params, x, state)[1], params) == kept


def test_memory_that_a_linear_keeps_has_no_rounded_weights():
    params, x = Linear(64, 64).init(np.random.default_rng(0)), normal(2, 64, dtype=ml_dtypes.bfloat16)
    assert bytes_kept(Linear(64, 64)(params, x)[1], params) == x.nbytes


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_activations_are_views(monkeypatch, dtype):
    """Channels lie next to each other throughout, and the halves of one product are never copied."""
    seen = {}

    def spy(name):
        operation = getattr(layers, name)

        def call(*args, **keywords):
            result = operation(*args, **keywords)
            seen[name] = args, keywords, result
            return result

        monkeypatch.setattr(layers, name, call)

    spy("selective_scan_fwd")
    spy("causal_conv1d_fwd")
    _, saved = SMALL._forward(random_params(SMALL, dtype=np.float32), normal(2, 70, 3, dtype=dtype), None, None, save=True)
    (u, *_), _, (c, *_) = seen["causal_conv1d_fwd"]
    _, scan, (y, *_) = seen["selective_scan_fwd"]
    assert scan["u"] is c
    assert np.shares_memory(u, saved.xz)
    assert np.shares_memory(scan["z"], saved.xz)
    assert np.shares_memory(scan["B"], saved.selected)
    assert np.shares_memory(scan["C"], saved.selected)
    for x in (u, c, scan["delta"], scan["z"], y):
        assert x.strides[1] == x.itemsize


# ---------------------------------------------------------------------------------------------------- checkpoint, dtypes
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16], ids=["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("came", [False, True], ids=["fresh", "state"])
def test_checkpoint_has_the_same_bits(dtype, came):
    block = Block(RMSNorm(3), NORMED)
    params, x = random_params(block, dtype=np.float64 if dtype is np.float64 else np.float32), normal(2, 70, 3, dtype=dtype)
    results = []
    for layer in (block, Checkpoint(block)):
        state = None
        if came:
            state = State(*(s + np.ones((), s.dtype) for s in NORMED.init_state(np, 2, dtype)))
        (y, residual), backprop = layer(params, x, state, LENGTHS if came else None)
        results.append(flat([y, residual, backprop((y, residual)), list(state or ())]))
    assert results[0].keys() == results[1].keys()
    for path, array in results[0].items():
        assert array.dtype == results[1][path].dtype
        assert array.tobytes() == results[1][path].tobytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("fp32", [True, False], ids=["residual-float32", "residual-16-bit"])
def test_mixed_precision(dtype, fp32):
    """float32 parameters, 16-bit compute: gradients are float32, and as near to float64 as the rounding allows."""
    block = Block(RMSNorm(16), MambaMixer(16, dt_rank=4, bc_dt_norm=True, bias=True), residual_in_fp32=fp32)
    params, x = block.init(np.random.default_rng(0)), normal(2, 40, 16, dtype=dtype)
    hidden, residual = x, normal(2, 40, 16, seed=2, dtype=np.float32 if fp32 else dtype)
    (y, total), backprop = block(params, (hidden, residual))
    assert (y.dtype, total.dtype) == (dtype, np.float32 if fp32 else dtype)
    dy = normal(2, 40, 16, seed=3, dtype=dtype), normal(2, 40, 16, seed=4, dtype=total.dtype)
    (dhidden, dresidual), grads = backprop(dy)
    assert (dhidden.dtype, dresidual.dtype) == (dtype, total.dtype)

    double = map_params(lambda p: p.astype(np.float64), params)
    (y64, _), backprop64 = block(double, (hidden.astype(np.float64), residual.astype(np.float64)))
    (dhidden64, _), grads64 = backprop64(tuple(d.astype(np.float64) for d in dy))
    tolerance = 2e-2 if dtype is ml_dtypes.bfloat16 else 4e-3
    got, wanted = flat([y, dhidden, grads]), flat([y64, dhidden64, grads64])
    assert got.keys() == wanted.keys()
    for path, array in got.items():
        assert path in ("/0", "/1") or array.dtype == np.float32, path
        assert np.linalg.norm(array - wanted[path]) <= tolerance * np.linalg.norm(wanted[path]), path


def test_parameters_of_16_bits_give_gradients_of_16_bits():
    params = random_params(SMALL, dtype=ml_dtypes.bfloat16)
    y, backprop = SMALL(params, normal(2, 5, 3, dtype=ml_dtypes.bfloat16))
    assert {g.dtype.name for g in flat(backprop(y)).values()} == {y.dtype.name} == {"bfloat16"}
    state = SMALL.init_state(np, 2, y.dtype)
    assert SMALL.advance(params, normal(2, 1, 3, dtype=ml_dtypes.bfloat16), state).dtype == y.dtype
    assert (state.conv.dtype, state.ssm.dtype) == (y.dtype, np.float32)


def test_embedding_goes_over_to_another_dtype():
    layer = Embedding(5, 3, dtype="bfloat16")
    params = layer.init(np.random.default_rng(0))
    y, backprop = layer(params, np.array([[1, 2, 1]]))
    assert y.dtype == ml_dtypes.bfloat16
    assert backprop(y)[1]["weight"].dtype == np.float32


def test_map_params():
    params = {"a": [np.ones(2), {"b": np.ones(3)}], "c": None, "d": State(np.ones(1), np.ones(4))}
    doubled = map_params(lambda p, q: p + q, params, params)
    assert {path: None if p is None else p.tolist() for path, p in flat(doubled).items()} == {
        "/a/0": [2, 2], "/a/1/b": [2, 2, 2], "/c": None, "/d/0": [2], "/d/1": [2] * 4,
    }  # fmt: skip
    assert isinstance(doubled["d"], State)


# ---------------------------------------------------------------------------------------------------- what is refused
def without(nest, name):
    return {key: inner for key, inner in nest.items() if key != name}


GOOD = random_params(SMALL)
X = normal(2, 5, 3)
FRESH = SMALL.init_state(np, 2, np.float64)
REFUSED = {
    "x-shape": (SMALL, GOOD, (X[0],), ValueError, r"MambaMixer: x has shape \(5, 3\), wanted \(batch, length, 3\)"),
    "x-size": (SMALL, GOOD, (X[..., :2],), ValueError, r"MambaMixer: x has shape \(2, 5, 2\), wanted"),
    "x-integers": (SMALL, GOOD, (X.astype(int),), TypeError, "MambaMixer: x is int64, wanted one of float16"),
    "x-list": (SMALL, GOOD, (X.tolist(),), TypeError, "MambaMixer: x is of type list"),
    "no-dict": (SMALL, [GOOD], (X,), TypeError, "MambaMixer: params is of type list, wanted a dict with A_log"),
    "missing": (SMALL, without(GOOD, "D"), (X,), ValueError, "MambaMixer: params has no 'D', wanted A_log"),
    "missing-inside": (
        SMALL, GOOD | {"conv1d": without(GOOD["conv1d"], "bias")}, (X,), ValueError,
        r"MambaMixer: params\['conv1d'\] has no 'bias'",
    ),
    "extra": (SMALL, GOOD | {"E": X}, (X,), ValueError, "MambaMixer: params has 'E', which this layer does not use"),
    "shape": (SMALL, GOOD | {"D": X}, (X,), ValueError, r"MambaMixer: params\['D'\] has shape \(2, 5, 3\), wanted \(6,\)"),
    "no-array": (SMALL, GOOD | {"D": 1.0}, (X,), ValueError, r"MambaMixer: params\['D'\] is of type float, wanted \(6,\)"),
    "norm-not-asked": (
        SMALL, GOOD | {"dt_layernorm": {"weight": X}}, (X,), ValueError, "params has 'dt_layernorm', which this layer does not",
    ),
    "state-shape": (
        SMALL, GOOD, (X[:1], FRESH), ValueError, r"MambaMixer: state.conv has shape \(2, 6, 2\), wanted \(1, 6, 2\)",
    ),
    "state-dtype": (
        SMALL, GOOD, (X.astype(np.float32), FRESH), TypeError, "MambaMixer: state.conv is float64, wanted float32 because x is",
    ),
    "lengths-list": (SMALL, GOOD, (X, None, [5, 5]), TypeError, "MambaMixer: lengths is of type list, wanted a NumPy or CuPy"),
    "lengths-float": (
        SMALL, GOOD, (X, None, np.array([5.0, 5.0])), TypeError, "MambaMixer: lengths is float64, wanted int32 or int64; write",
    ),
    "lengths-mask": (SMALL, GOOD, (X, FRESH, np.array([True, True])), TypeError, "MambaMixer: lengths is bool, wanted int32"),
    "lengths-shape": (
        SMALL, GOOD, (X, FRESH, np.array([[5, 5]])), ValueError, r"MambaMixer: lengths has shape \(1, 2\), wanted \(batch=2,\)",
    ),
    "lengths-negative": (
        SMALL, GOOD, (X, FRESH, np.array([5, -1])), ValueError, r"MambaMixer: lengths holds -1 at \(1,\), wanted 0 to 5",
    ),
    "lengths-long": (
        SMALL, GOOD, (X, FRESH, np.array([6, 5])), ValueError, r"MambaMixer: lengths holds 6 at \(0,\), wanted 0 to 5, the",
    ),
    "linear": (Linear(4, 2), {"weight": X[0, :2, :]}, (X,), ValueError, r"Linear: params\['weight'\] has shape \(2, 3\)"),
    "linear-x": (Linear(4, 2), {"weight": np.ones((2, 4))}, (X,), ValueError, r"Linear: x has shape .*, wanted \(…, 4\)"),
    "embedding": (Embedding(4, 2), {"weight": np.ones((2, 4))}, (X,), ValueError, r"Embedding: params\['weight'\] has shape"),
    "norm": (RMSNorm(4), {"weight": np.ones(4)}, (X,), ValueError, r"RMSNorm: x has shape \(2, 5, 3\), wanted \(…, 4\)"),
    "block": (Block(RMSNorm(3), SMALL), GOOD, (X,), ValueError, "Block: params is A_log, .*, wanted a dict with norm"),
    "serial": (Serial((SMALL,)), [], (X,), ValueError, "Serial: params is a list of 1, one entry a layer; got 0 entries"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_refused(row):
    layer, params, arguments, error, message = REFUSED[row]
    with pytest.raises(error, match=message):
        layer(params, *arguments)


def test_initialisation_refuses():
    with pytest.raises(TypeError, match=r"init: rng is of type int, wanted numpy.random.default_rng\(seed\)"):
        SMALL.init(0)
    with pytest.raises(ValueError, match="MambaMixer: dt_init is 'zero', wanted 'random' or 'constant'"):
        replace(SMALL, dt_init="zero").init(np.random.default_rng(0))
