"""AdamW against its formula step by step, clipping, the schedule, and training that goes on bit for bit from a file."""

import math

import cases
import dense
import emulator
import ml_dtypes
import numpy as np
import pytest

from mambacupy import arrays, optim
from mambacupy.layers import map_params
from mambacupy.models import MambaConfig, MambaLM
from mambacupy.ops import training
from mambacupy.ops.loss import softmax_cross_entropy_bwd, softmax_cross_entropy_fwd


def nest(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = {"weight": (3, 4), "A_log": (3, 2), "D": (3,), "bias": (4,)}
    return {"layers": [{name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}]}


def test_adamw_follows_its_formula():
    params, adam = nest(0), optim.AdamW(0.01, betas=(0.8, 0.9), eps=1e-6, decay=0.3)
    state, wanted = adam.init(params), nest(0)["layers"][0]
    m, v = ({name: np.zeros_like(p) for name, p in wanted.items()} for _ in range(2))
    for t in range(1, 6):
        grads = nest(t)
        params, state = adam.update(params, grads, state)
        for name, g in grads["layers"][0].items():
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g * g
            change = (m[name] / (1 - 0.8**t)) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-6)
            wanted[name] = wanted[name] - 0.01 * (change + (0.3 * wanted[name] if name == "weight" else 0))
            assert np.allclose(params["layers"][0][name], wanted[name], rtol=1e-13)
    assert state.step == 5


def test_what_decays_in_a_model():
    params = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=40)).init(np.random.default_rng(0))
    decays = optim.which_decay(params)
    mixer = decays["layers"][0]["mixer"]
    assert decays["embedding"]["weight"] and mixer["in_proj"]["weight"] and mixer["dt_proj"]["weight"]
    kept = (mixer["A_log"], mixer["D"], mixer["dt_proj"]["bias"], mixer["conv1d"]["bias"])
    assert not any((*kept, decays["layers"][0]["norm"]["weight"], decays["norm_f"]["weight"]))


def test_16_bit_parameters_have_float32_means():
    params = {"weight": np.ones((2, 2), ml_dtypes.bfloat16)}
    adam = optim.AdamW(0.1)
    params, state = adam.update(params, params, adam.init(params))
    assert params["weight"].dtype == ml_dtypes.bfloat16 and state.mean["weight"].dtype == np.float32


@pytest.mark.parametrize("most", [0.5, 1e6])
def test_clipping(most):
    grads = nest(1)
    clipped, norm = optim.clip_by_norm(grads, most)
    values = np.concatenate([g.ravel() for g in grads["layers"][0].values()])
    after = np.concatenate([g.ravel() for g in clipped["layers"][0].values()])
    assert norm == pytest.approx(np.linalg.norm(values))
    assert np.linalg.norm(after) == pytest.approx(min(most, np.linalg.norm(values)), rel=1e-5)
    assert np.allclose(after / np.linalg.norm(after), values / np.linalg.norm(values))


def test_what_does_not_fit_is_named():
    params, adam = nest(0), optim.AdamW(0.1)
    grads, state = nest(1), adam.init(params)
    grads["layers"][0]["D"] = np.zeros(4)
    with pytest.raises(ValueError, match=r"grads has an array of shape \(4,\), wanted \(3,\) as in params"):
        adam.update(params, grads, state)
    grads["layers"][0]["D"] = [0, 0, 0]
    with pytest.raises((TypeError, ValueError, AttributeError)):
        adam.update(params, grads, state)


def test_nests_without_arrays():
    adam = optim.AdamW(0.1)
    params, state = adam.update({}, {}, adam.init({}))
    assert params == {} and state.step == 1
    assert optim.clip_by_norm({"a": None}, 1.0) == ({"a": None}, 0)


def test_schedule():
    rate = optim.warmup_cosine(2.0, 10, 110, floor=0.5)
    assert [rate(5), rate(10), rate(60), rate(110), rate(500)] == pytest.approx([1.0, 2.0, 1.25, 0.5, 0.5])
    assert rate(35) == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)
    with pytest.raises(ValueError, match="warmup is 5, wanted at least 0 and less than total = 5"):
        optim.warmup_cosine(1.0, 5, 5)


def train(model, params, state, rng, steps):
    adam = optim.AdamW(optim.warmup_cosine(1e-2, 2, 20))
    for _ in range(steps):
        tokens = rng.integers(0, 40, (2, 12))
        logits, backprop = model(params, tokens[:, :-1])
        loss, saved = softmax_cross_entropy_fwd(logits, tokens[:, 1:])
        grads, _ = optim.clip_by_norm(backprop(softmax_cross_entropy_bwd(np.ones_like(loss), saved).logits), 1.0)
        params, state = adam.update(params, grads, state)
    return params, state


def flat(tree):
    found = {}
    optim._flatten(tree, "", found)
    return {place: x.tobytes() for place, x in found.items()}


def test_training_goes_on_bit_for_bit(tmp_path):
    model = MambaLM(MambaConfig(d_model=16, n_layer=1, vocab_size=40))
    params = model.init(np.random.default_rng(0))
    state = optim.AdamW(0).init(params)
    whole = train(model, params, state, np.random.default_rng(1), 6)
    rng = np.random.default_rng(1)
    half = train(model, params, state, rng, 3)
    optim.save(tmp_path / "training.npz", {"params": half[0], "optimizer": half[1]}, rng=rng.bit_generator.state)
    tree, facts = optim.load(tmp_path / "training.npz")
    rng = np.random.default_rng(99)
    rng.bit_generator.state = facts["rng"]
    resumed = train(model, tree["params"], optim.AdamWState(*tree["optimizer"]), rng, 3)
    assert flat(resumed) == flat(whole)
    assert resumed[1].step == 6


def test_files_keep_dtypes_and_are_complete_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    tree = {
        "b": np.arange(4, dtype=ml_dtypes.bfloat16).reshape(2, 2),
        "empty": np.zeros((0, 3)),
        "scalar": np.float32(2),
        "n": None,
    }
    optim.save(path, tree, step=3)
    again, facts = optim.load(path)
    assert again["b"].dtype == ml_dtypes.bfloat16 and again["b"].tobytes() == tree["b"].tobytes()
    assert again["empty"].shape == (0, 3) and again["scalar"] == 2 and again["n"] is None and facts == {"step": 3}
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        optim.save(path, tree)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_of_something_else(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"has no structure.json, wanted a file that mambacupy.optim.save wrote"):
        optim.load(tmp_path / "x.npz")


# ---------------------------------------------------------------------------------------------------- kernels
DTYPES = ["float32", "bfloat16", "float16", "float64"]


def launch_all(dtype):
    p, m = np.ones((3, 40), cases.DTYPES[dtype]), np.ones((3, 40), arrays.compute_dtype(cases.DTYPES[dtype]))
    memory = emulator.Memory()
    training._adamw(memory, [p, p], [p, m], [m, m], [m, m], [True, False], (0.5,) * 9)
    training._clip(memory, [p, m], 1.0)
    if p.itemsize == 2:
        training._rounded(memory, [m, m], p.dtype)


@pytest.mark.parametrize(("file", "constants"), dense.instantiations(launch_all, DTYPES))
def test_compiles_for_every_architecture(file, constants):
    dense.compiles(file, constants)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype):
    """Steps of training on the GPU are those on the host, and have the same bits when repeated."""
    cupy = pytest.importorskip("cupy")
    params = nest(0, cases.DTYPES[dtype])
    params["large"] = np.random.default_rng(1).standard_normal((129, 301)).astype(cases.DTYPES[dtype])
    grads = map_params(lambda p: (p.astype(np.float64) * 0.5 + 0.1).astype(p.dtype), params)
    adam = optim.AdamW(0.01)

    def steps(params, grads):
        state = adam.init(params)
        for _ in range(3):
            clipped, norm = optim.clip_by_norm(grads, 1.0)
            params, state = adam.update(params, clipped, state)
        return {"params": params, "mean": state.mean, "square": state.square, "norm": norm}

    on_gpu = [steps(*(map_params(cases.to_gpu, nest) for nest in (params, grads))) for _ in range(2)]
    wanted = {}
    optim._flatten(steps(params, grads), "", wanted)
    got, again = {}, {}
    optim._flatten(map_params(cupy.asnumpy, on_gpu[0]), "", got)
    optim._flatten(map_params(cupy.asnumpy, on_gpu[1]), "", again)
    for place, x in wanted.items():
        of_dtype = cases.DTYPES[dtype] if x.dtype == np.uint16 else x.dtype
        assert got[place].tobytes() == again[place].tobytes()
        error = cases.relative_error(got[place].view(of_dtype), x.view(of_dtype))
        assert error <= 3 * max(dense.STORED[np.dtype(of_dtype).name], dense.STORED[dtype]), place  # of clipped gradients


def test_keys_with_slashes_are_kept_apart(tmp_path):
    tree = {"a/b": np.array([1.0]), "a": {"b": np.array([2.0]), "~1": np.array([3.0])}, "a~1": np.array([4.0])}
    optim.save(tmp_path / "x.npz", tree)
    read, _ = optim.load(tmp_path / "x.npz")
    assert read == tree


def test_keys_are_strings(tmp_path):
    with pytest.raises(TypeError, match="key 1, wanted strings"):
        optim.save(tmp_path / "x.npz", {1: np.zeros(1)})
    assert not list(tmp_path.iterdir())
