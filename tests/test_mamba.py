"""The language model: finite differences, loops written from its equations, and what it promises about states and padding."""

import itertools
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import small_models
from test_layers import bytes_kept, check, flat, naive_mixer, normal, without

from mambacupy.layers import Block, Linear, MambaMixer, RMSNorm, Serial, State, map_params
from mambacupy.models import MambaConfig, MambaLM
from mambacupy.ops.loss import softmax_cross_entropy_bwd, softmax_cross_entropy_fwd

SIZES = {"d_model": 6, "n_layer": 2, "vocab_size": 11, "d_state": 3, "dt_rank": 2}
SHARED = [field.name for field in fields(MambaMixer)]  # a model's mixers have these of its config
LENGTH = 6
TOKENS = np.random.default_rng(5).integers(0, 11, (3, LENGTH))


def make(dtype=np.float64, compute=None, checkpoint=False, **changes):
    """A small model, and its parameters in a dtype."""
    return small_models.make(SIZES | changes, 0.3, dtype, compute, checkpoint)


def naive(model, params, tokens):
    """Logits of one row of tokens, and the states after it, from the equations."""
    config, residual, states = model.config, params["embedding"]["weight"][tokens], []

    def norm(p, x):
        if not config.rms_norm:
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * p["weight"] + p.get("bias", 0)

    mixer = MambaMixer(**{name: getattr(config, name) for name in SHARED})
    for layer in params["layers"]:
        y, state = naive_mixer(mixer, layer["mixer"], norm(layer["norm"], residual))
        residual = residual + y
        states.append(state)
    head = params["embedding" if config.tie_embeddings else "lm_head"]["weight"]
    return norm(params["norm_f"], residual) @ head.T, states


MODELS = small_models.VARIANTS | {
    "conv-2": {"d_conv": 2},
    "vocabulary-as-it-is": {"pad_vocab_size_multiple": 1},
    "rank-auto": {"dt_rank": "auto"},
    "expand-1.5": {"expand": 1.5},
}


# ---------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("row", MODELS)
def test_logits_are_the_equations(row):
    model, params = make(**MODELS[row])
    logits, _ = model(params, TOKENS)
    assert logits.shape == (3, LENGTH, 11 if row == "vocabulary-as-it-is" else 16)
    for tokens, got in zip(TOKENS, logits, strict=True):
        np.testing.assert_allclose(got, naive(model, params, tokens)[0], rtol=1e-11, atol=1e-12)


def splits(length):
    """Every way to cut a sequence into parts: lists of slices."""
    for cuts in itertools.product([False, True], repeat=length - 1):
        borders = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), length]
        yield [slice(*pair) for pair in itertools.pairwise(borders)]


@pytest.mark.parametrize("how", ["advance", "call", "mask"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_every_split_gives_the_same_logits(dtype, how):
    model, params = make(dtype, bc_dt_norm=True)
    run = (lambda *args: model(*args)[0]) if how == "call" else model.advance
    whole, tolerance = model(params, TOKENS)[0], {np.float64: 1e-12, np.float32: 1e-5}[dtype]
    last = [naive(model, map_params(np.float64, params), tokens)[1] for tokens in TOKENS] if dtype is np.float64 else []
    tried = 0
    for parts in splits(LENGTH):
        state, tried = model.init_state(params, 3), tried + 1
        more = (np.ones((3, LENGTH), bool),) if how == "mask" else ()
        logits = [run(params, TOKENS[:, part], state, *(mask[:, part] for mask in more)) for part in parts]
        np.testing.assert_allclose(np.concatenate(logits, axis=1), whole, rtol=tolerance, atol=tolerance, err_msg=str(parts))
        for i, row in enumerate(last):
            for got, wanted in zip(state, row, strict=True):
                np.testing.assert_allclose(got.conv[i], wanted.conv, rtol=1e-11, atol=1e-13)
                np.testing.assert_allclose(got.ssm[i], wanted.ssm, rtol=1e-11, atol=1e-13)
    assert tried == 2 ** (LENGTH - 1)


def test_one_token_in_16_bits_agrees_with_the_whole():
    model, params = make(np.float32, "bfloat16")
    state = model.init_state(params, 3)
    whole, _ = model(params, TOKENS)
    steps = np.concatenate([model.advance(params, TOKENS[:, t : t + 1], state) for t in range(LENGTH)], axis=1)
    assert whole.dtype == steps.dtype == state[0].conv.dtype == ml_dtypes.bfloat16
    assert state[0].ssm.dtype == np.float32
    assert np.linalg.norm(steps.astype(float) - whole.astype(float)) <= 1e-2 * np.linalg.norm(whole.astype(float))


MASKS = {
    "left": ["000111", "011111", "111111"],
    "right": ["111000", "110000", "111111"],
    "ragged": ["011110", "000011", "110000"],
    "holes": ["101101", "010010", "100001"],
    "nothing": ["000000", "111111", "000001"],
}


@pytest.mark.parametrize("came", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("row", MASKS)
def test_padding_changes_nothing(row, came):
    """Logits, states and gradients are those of each row by itself without its padding; junk stands where padding is."""
    model, params = make()
    mask = np.array([[letter == "1" for letter in line] for line in MASKS[row]])
    padded = np.where(mask, TOKENS, np.array([-7, 10**6, 3, -1, 99, 5]))
    before = model.init_state(params, 3)
    if came:
        model.advance(params, TOKENS[:, ::-1], before)
    states = {"call": [s.copy() for s in before], "advance": [s.copy() for s in before], "last": [s.copy() for s in before]}
    logits, backprop = model(params, padded, states["call"], mask)
    np.testing.assert_allclose(model.advance(params, padded, states["advance"], mask), logits, rtol=1e-12)
    last = model.advance(params, padded, states["last"], mask, last_only=True)
    assert last.shape == (3, 1, 16)
    if not came:
        np.testing.assert_allclose(model(params, padded, None, mask)[0], logits, rtol=1e-12)
    assert not logits[~mask].any()
    dlogits = normal(*logits.shape)  # not zero at padding: those of padding must not count
    summed = map_params(np.zeros_like, params)
    for i in range(3):
        state = [State(s.conv[i : i + 1].copy(), s.ssm[i : i + 1].copy()) for s in before]
        wanted, alone = model(params, TOKENS[i : i + 1, mask[i]], state)
        np.testing.assert_allclose(logits[i, mask[i]], wanted[0], rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(last[i], wanted[0, -1:] if mask[i].any() else np.zeros((1, 16)), rtol=1e-11, atol=1e-13)
        summed = map_params(np.add, summed, alone(dlogits[i : i + 1, mask[i]]))
        for how, layer in itertools.product(states, range(2)):
            np.testing.assert_allclose(states[how][layer].conv[i], state[layer].conv[0], rtol=1e-11, atol=1e-14)
            np.testing.assert_allclose(states[how][layer].ssm[i], state[layer].ssm[0], rtol=1e-11, atol=1e-14)
            if not mask[i].any():
                assert np.array_equal(states[how][layer].ssm[i], before[layer].ssm[i])
    got, wanted = flat(backprop(dlogits)), flat(summed)
    for path in wanted:
        np.testing.assert_allclose(got[path], wanted[path], rtol=1e-9, atol=1e-12, err_msg=path)


def test_rows_that_have_ended_keep_their_state():
    """A step with a mask: how generation goes on while some rows have stopped."""
    model, params = make()
    state = model.init_state(params, 3)
    model.advance(params, TOKENS, state)
    before, going = [s.copy() for s in state], np.array([[True], [False], [True]])
    logits = model.advance(params, TOKENS[:, :1], state, going)
    free = [s.copy() for s in before]
    np.testing.assert_allclose(logits[::2], model.advance(params, TOKENS[:, :1], free)[::2], rtol=1e-12)
    for old, new, other in zip(before, state, free, strict=True):
        for a, b, c in zip(old, new, other, strict=True):
            assert np.array_equal(a[1], b[1])
            np.testing.assert_allclose(b[::2], c[::2], rtol=1e-12)


def test_last_only():
    model, params = make()
    whole = model.advance(params, TOKENS)
    np.testing.assert_allclose(model.advance(params, TOKENS, last_only=True), whole[:, -1:], rtol=1e-13)


def test_a_state_survives_a_file(tmp_path):
    model, params = make()
    state = model.init_state(params, 3)
    model.advance(params, TOKENS[:, :4], state)
    np.savez(tmp_path / "state.npz", **{f"{i}.{name}": x for i, s in enumerate(state) for name, x in s._asdict().items()})
    wanted = model.advance(params, TOKENS[:, 4:], state)
    with np.load(tmp_path / "state.npz") as file:
        read = [State(file[f"{i}.conv"], file[f"{i}.ssm"]) for i in range(2)]
    assert np.array_equal(model.advance(params, TOKENS[:, 4:], read), wanted)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_empty(shape, masked):
    model, params = make()
    tokens, mask, state = np.zeros(shape, int), np.ones(shape, bool) if masked else None, model.init_state(params, shape[0])
    logits, backprop = model(params, tokens, state, mask)
    assert logits.shape == (*shape, 16)
    assert all(not g.any() for g in flat(backprop(logits)).values())
    assert not any(x.any() for s in state for x in s)


# ---------------------------------------------------------------------------------------------------- gradients
def check_model(model, params, tokens=TOKENS, state=None, mask=None):
    def call(params, tokens):
        logits, backprop = model(params, tokens, state and [s.copy() for s in state], mask)
        return logits, lambda dlogits: (tokens, backprop(dlogits))

    check(call, params, tokens, directions=2)


@pytest.mark.parametrize("row", MODELS)
def test_gradient(row):
    check_model(*make(**MODELS[row]))


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("mask", [None, TOKENS % 3 > 0], ids=["whole", "mask"])
def test_gradient_after_a_state(checkpoint, mask):
    model, params = make(checkpoint=checkpoint)
    state = model.init_state(params, 3)
    model.advance(params, TOKENS[:, ::-1], state)
    check_model(model, params, TOKENS, state, mask)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_checkpoint_has_the_same_bits_and_keeps_less(dtype):
    results, kept = [], []
    for checkpoint in (False, True):
        model, params = make(np.float64 if dtype == "float64" else np.float32, dtype, checkpoint)
        logits, backprop = model(params, TOKENS)
        results.append(flat([logits, backprop(np.ones_like(logits))]))
        kept.append(bytes_kept(backprop, params))
    assert all(results[1][path].tobytes() == array.tobytes() for path, array in results[0].items())
    rounded = rounded_bytes(params) if dtype == "bfloat16" else 0
    assert kept[1] - rounded < (kept[0] - rounded) / 3


def rounded_bytes(params):
    """Of what mixed precision rounds for linear maps: 2 a weight."""
    maps = [layer["mixer"][name] for layer in params["layers"] for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    return 2 * sum(p["weight"].size for p in [*maps, params.get("lm_head", params["embedding"])])


@pytest.mark.parametrize("row", ["base", "untied"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpoint"])
def test_rounded_weights_are_kept_once(row, checkpoint, monkeypatch):
    model = MambaLM(MambaConfig(**SIZES | MODELS[row]), "bfloat16", checkpoint=checkpoint)
    params = model.init(np.random.default_rng(7))
    kept = bytes_kept(model(params, TOKENS)[1], params)
    monkeypatch.setattr(MambaLM, "_with_rounded_weights", lambda self, params: params)
    assert kept == bytes_kept(model(params, TOKENS)[1], params) + rounded_bytes(params)


@pytest.mark.parametrize("row", ["base", "untied", "residual-as-computed"])
def test_mixed_precision(row, monkeypatch):
    """float32 parameters, bfloat16 compute: logits bfloat16, gradients float32, as near to float64 as rounding allows. Weights
    rounded together are those that layers would round."""
    model = MambaLM(MambaConfig(**SIZES | {"d_model": 32, "dt_rank": 4} | MODELS[row]), "bfloat16")
    params = model.init(np.random.default_rng(7))
    reference, double = MambaLM(model.config), map_params(np.float64, params)
    (logits, backprop), (logits64, backprop64) = model(params, TOKENS), reference(double, TOKENS)
    assert logits.dtype == ml_dtypes.bfloat16
    dlogits = normal(*logits.shape, dtype=ml_dtypes.bfloat16)
    got, wanted = flat([logits, backprop(dlogits)]), flat([logits64, backprop64(dlogits.astype(np.float64))])
    assert got.keys() == wanted.keys()
    for path, array in got.items():
        assert path == "/0" or array.dtype == np.float32
        assert np.linalg.norm(array - wanted[path]) <= 3e-2 * np.linalg.norm(wanted[path]), path
    monkeypatch.setattr(MambaLM, "_with_rounded_weights", lambda self, params: params)
    logits, backprop = model(params, TOKENS)
    again = flat([logits, backprop(dlogits)])
    assert all(again[path].tobytes() == array.tobytes() for path, array in got.items())


def test_gradients_are_built_as_parameters():
    for row in ("base", "untied"):
        model, params = make(np.float32, **MODELS[row])
        logits, backprop = model(params, TOKENS)
        built = flat(map_params(lambda p: (p.shape, p.dtype.name), params))
        assert built == flat(map_params(lambda p: (p.shape, p.dtype.name), backprop(logits)))


def test_a_line_is_learnt():
    """What the parts are for: 150 steps of plain gradient descent, and the model says the line by heart."""
    model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=12))
    params, line = model.init(np.random.default_rng(0)), np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]])
    for _ in range(150):
        logits, backprop = model(params, line[:, :-1])
        loss, saved = softmax_cross_entropy_fwd(logits, line[:, 1:])
        grads = backprop(softmax_cross_entropy_bwd(np.ones_like(loss), saved).logits)
        params = map_params(lambda p, g: p - 0.5 * g, params, grads)
    state = model.init_state(params, 1)
    said, token = [3], line[:, :1]
    for _ in range(15):
        token = model.advance(params, token, state).argmax(-1)
        said.append(int(token[0, 0]))
    assert said == line[0].tolist()


# ---------------------------------------------------------------------------------------------------- parts
def test_shapes_are_those_of_the_checkpoints():
    config = MambaConfig(d_model=768, n_layer=24, vocab_size=50277)
    assert (config.padded_vocab_size, config.rank, config.d_inner) == (50280, 48, 1536)
    _, params = make()
    assert flat(params).keys() == {
        "/embedding/weight", "/norm_f/weight",
        *(f"/layers/{i}/{name}" for i in range(2) for name in (
            "norm/weight", "mixer/A_log", "mixer/D", "mixer/in_proj/weight", "mixer/conv1d/weight", "mixer/conv1d/bias",
            "mixer/x_proj/weight", "mixer/dt_proj/weight", "mixer/dt_proj/bias", "mixer/out_proj/weight",
        )),
    }  # fmt: skip


def test_mixers_are_those_of_the_config():
    config = MambaConfig(
        6, 3, 11, 5, 2, 1.5, 7, 0.01, 0.2, "constant", 0.5, 1e-3, False, True, bc_dt_norm=True, bc_dt_norm_eps=1.0
    )
    mixer = MambaLM(config).block.mixer
    assert {name: getattr(mixer, name) for name in SHARED} == {name: getattr(config, name) for name in SHARED}
    assert all(field.name in ("d_model", "n_layer") or getattr(mixer, field.name) != field.default for field in fields(mixer))


def test_the_page_about_models_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    names = {}
    exec("".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    assert names["loss"] < 0.7 * np.log(256)
    assert names["logits"].shape == (2, 1, 256)


def test_a_checkpoint_there_and_back(tmp_path):
    model, params = make(np.float32)
    model.save_pretrained(params, tmp_path / "model")
    again, read = MambaLM.from_pretrained(tmp_path / "model", dtype="float32")
    assert isinstance(again, MambaLM)
    assert again.dtype == "float32"
    assert np.array_equal(again.advance(read, TOKENS), model.advance(params, TOKENS))


def test_models_are_not_imported_unasked():
    code = "import mambacupy, sys; print({'mambacupy.models', 'mambacupy.layers', 'cupy'} & set(sys.modules) or 'none')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "none"


# ---------------------------------------------------------------------------------------------------- on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("row", ["base", "untied", "layer-norm", "bc-dt-norm", "biases"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_gpu_is_numpy(row, dtype):
    """Logits, gradients and states of the whole and in parts, with padding; and bits that are the same every time."""
    import cupy

    tolerance = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 5e-2}[dtype]
    model = MambaLM(MambaConfig(**SIZES | {"d_model": 32, "dt_rank": 4} | MODELS[row]), dtype)
    params = model.init(np.random.default_rng(7), np.float64 if dtype == "float64" else np.float32)
    tokens = np.random.default_rng(5).integers(0, 11, (3, 70))
    mask = np.arange(70) >= np.array([[0], [3], [68]])

    def run(xp):
        p, t, m = map_params(xp.asarray, params), xp.asarray(tokens), xp.asarray(mask)
        state, parts = model.init_state(p, 3), model.init_state(p, 3)
        logits, backprop = model(p, t, state, m)
        pieces = [model.advance(p, t[:, part], parts, m[:, part]) for part in (slice(66), slice(66, 69))]
        pieces.append(model.advance(p, t[:, 69:], parts))
        dlogits = xp.asarray(normal(3, 70, 16)).astype(logits.dtype)
        return flat([logits, xp.concatenate(pieces, axis=1), backprop(dlogits), list(state), list(parts)])

    wanted, got, again = run(np), run(cupy), run(cupy)
    for path, array in wanted.items():
        on_host = cupy.asnumpy(got[path])
        assert on_host.dtype == array.dtype
        assert on_host.tobytes() == cupy.asnumpy(again[path]).tobytes(), path
        assert np.linalg.norm(on_host.astype(float) - array) <= tolerance * np.linalg.norm(array.astype(float)), path


# ---------------------------------------------------------------------------------------------------- what is refused
MODEL, PARAMS = make()
STATE = MODEL.init_state(PARAMS, 3)
CALLS = {
    "tokens-float": ((PARAMS, TOKENS * 1.0), TypeError, "MambaLM: tokens is float64, wanted integers"),
    "tokens-1-axis": ((PARAMS, TOKENS[0]), ValueError, r"MambaLM: tokens has shape \(6,\), wanted \(batch, length\); a single"),
    "tokens-list": ((PARAMS, TOKENS.tolist()), TypeError, "MambaLM: tokens is of type list, wanted a NumPy or CuPy array"),
    "params-list": (([PARAMS], TOKENS), TypeError, "MambaLM: params is of type list, wanted a dict with embedding, layers"),
    "no-norm": ((without(PARAMS, "norm_f"), TOKENS), ValueError, "MambaLM: params has no 'norm_f'; it has embedding, layers"),
    "head": ((PARAMS | {"lm_head": {}}, TOKENS), ValueError, "params has 'lm_head', .* because tie_embeddings is True"),
    "layers": ((PARAMS | {"layers": PARAMS["layers"][:1]}, TOKENS), ValueError, r"params\['layers'\] has 1 entries, wanted 2"),
    "embedding": (
        (PARAMS | {"embedding": {"weight": np.ones((11, 6))}}, TOKENS), ValueError, r"has shape \(11, 6\), wanted \(16, 6\)",
    ),
    "state-number": ((PARAMS, TOKENS, STATE[:1]), ValueError, "MambaLM: state has 1 entries, wanted a tuple of 2, as"),
    "state-array": ((PARAMS, TOKENS, STATE[0].conv), ValueError, "MambaLM: state has type ndarray, wanted a tuple of 2"),
    "state-batch": ((PARAMS, TOKENS[:2], STATE), ValueError, r"state.conv has shape \(3, 12, 3\), wanted \(2, 12, 3\)"),
    "mask-dtype": ((PARAMS, TOKENS, None, TOKENS), TypeError, r"MambaLM: mask is int64, wanted bool; write mask.astype"),
    "mask-shape": ((PARAMS, TOKENS, None, TOKENS[:2] > 0), ValueError, r"mask has shape \(2, 6\), wanted \(3, 6\), the shape"),
}  # fmt: skip


@pytest.mark.parametrize("how", ["__call__", "advance"])
@pytest.mark.parametrize("row", CALLS)
def test_call_refuses(row, how):
    arguments, error, message = CALLS[row]
    with pytest.raises(error, match=message):
        getattr(MODEL, how)(*arguments)


def test_backprop_refuses():
    with pytest.raises(ValueError, match=r"MambaLM: dlogits has shape \(3, 6, 11\), wanted \(3, 6, 16\)"):
        MODEL(PARAMS, TOKENS)[1](np.ones((3, 6, 11)))


CONFIGS = {
    "float": ({"d_model": 6.0}, TypeError, "MambaConfig: d_model is 6.0, wanted an integer"),
    "bool": ({"n_layer": True}, TypeError, "MambaConfig: n_layer is True, wanted an integer"),
    "none": ({"vocab_size": 0}, ValueError, "MambaConfig: vocab_size is 0, wanted 1 or more"),
    "rank": ({"dt_rank": "full"}, TypeError, "MambaConfig: dt_rank is 'full', wanted an integer or 'auto'"),
    "init": ({"dt_init": "zero"}, ValueError, "MambaConfig: dt_init is 'zero', wanted 'random' or 'constant'"),
    "dt": ({"dt_min": 0.2}, ValueError, "MambaConfig: dt_min is 0.2 and dt_max 0.1, wanted 0 < dt_min <= dt_max"),
    "eps": ({"norm_eps": 0.0}, ValueError, "MambaConfig: norm_eps is 0.0, wanted a number above 0"),
    "expand": ({"expand": 0.1}, ValueError, "MambaConfig: expand is 0.1 and d_model 6, wanted a product of 1 or more"),
    "token": ({"pad_token_id": (0, 1)}, TypeError, r"MambaConfig: pad_token_id is \(0, 1\), wanted the number of a token, or"),
    "flag": ({"rms_norm": 1}, TypeError, "MambaConfig: rms_norm is 1, wanted True or False"),
}


@pytest.mark.parametrize("row", CONFIGS)
def test_config_refuses(row):
    changes, error, message = CONFIGS[row]
    with pytest.raises(error, match=message):
        MambaConfig(**SIZES | changes)


def test_model_refuses():
    with pytest.raises(ValueError, match="MambaLM: dtype is 'bf16', wanted one of float16, bfloat16, float32, float64, or"):
        MambaLM(MambaConfig(**SIZES), "bf16")
    with pytest.raises(TypeError, match="MambaLM: config is of type dict, wanted a MambaConfig"):
        MambaLM(SIZES)


def test_a_bad_state_changes_none():
    model = MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=40))
    params = model.init(np.random.default_rng(0))
    good, bad = model.init_state(params, 2), model.init_state(params, 1)
    with pytest.raises(ValueError, match=r"state.conv has shape \(1, 32, 3\), wanted \(2, 32, 3\)"):
        model.advance(params, np.ones((2, 4), int), (good[0], bad[1]))
    with pytest.raises(TypeError, match=r"state is of type tuple, wanted State\(conv, ssm\)"):
        model.advance(params, np.ones((2, 4), int), [(s.conv, s.ssm) for s in good])
    assert not any(x.any() for s in good for x in s)


def test_the_last_logits_of_an_empty_text():
    model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=40))
    params = model.init(np.random.default_rng(0))
    for mask in (None, np.ones((2, 0), bool)):
        logits = model.advance(params, np.ones((2, 0), int), mask=mask, last_only=True)
        assert logits.shape == (2, 1, 40) and not logits.any()
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\), wanted \(2, 0\)"):
        model.advance(params, np.ones((2, 0), int), mask=np.ones((2, 3), bool))


def test_a_block_takes_any_layer():
    net = Serial((Linear(1, 8), Block(RMSNorm(8), Linear(8, 8)), RMSNorm(8)))
    rng = np.random.default_rng(0)
    params = net.init(rng)
    y, backprop = net(params, rng.standard_normal((2, 5, 1), dtype=np.float32))
    dx, grads = backprop(np.ones_like(y))
    assert y.shape == (2, 5, 8) and dx.shape == (2, 5, 1) and len(grads) == len(params)
