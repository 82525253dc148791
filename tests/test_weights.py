"""Checkpoints: other writers' files are read, ours are read by others, and bad files give one line that names them."""

import base64
import builtins
import dataclasses
import errno
import json
import mmap
import os
import pickle
import sys
import tracemalloc
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from mambacupy import checkpoint_config, checkpoint_folder, environment, safetensors_files, stored_tensors, torch_files, weights
from mambacupy.models.config import MambaConfig

NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
CLASSES = {"float16": "Half", "bfloat16": "BFloat16", "float32": "Float", "float64": "Double"}

# d_model 4, d_inner 8, dt_rank 1, 3 states, width 2, 10 tokens in 16 rows
BLOCK = {
    "norm.weight": (4,),
    "mixer.A_log": (8, 3),
    "mixer.D": (8,),
    "mixer.in_proj.weight": (16, 4),
    "mixer.conv1d.weight": (8, 1, 2),
    "mixer.conv1d.bias": (8,),
    "mixer.x_proj.weight": (7, 8),
    "mixer.dt_proj.weight": (8, 1),
    "mixer.dt_proj.bias": (8,),
    "mixer.out_proj.weight": (4, 8),
}
ORIGINAL = {
    "d_model": 4, "n_layer": 2, "vocab_size": 10, "ssm_cfg": {"d_state": 3, "d_conv": 2}, "rms_norm": True,
    "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip
HF = {
    "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 4, "intermediate_size": 8, "expand": 2,
    "num_hidden_layers": 2, "state_size": 3, "conv_kernel": 2, "time_step_rank": 1, "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 0.0001, "time_step_scale": 1.0, "time_step_init_scheme": "random", "layer_norm_epsilon": 1e-05,
    "hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True, "rescale_prenorm_residual": False,
    "vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS = {name: 0 for name in HF if "token_id" in name}
NORMED = {"dt": 1, "b": 3, "c": 3}
CONFIG = MambaConfig(d_model=4, n_layer=2, vocab_size=10, d_state=3, d_conv=2)


def stored(config=HF, dtype="float32", seed=0):
    """Tensors as a checkpoint has them, by key."""
    rng = np.random.default_rng(seed)
    shapes = {f"backbone.layers.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()}
    embedding = "backbone.embeddings.weight" if "hidden_size" in config else "backbone.embedding.weight"
    shapes |= {embedding: (16, 4), "backbone.norm_f.weight": (4,)}
    return {key: rng.normal(size=shape).astype(dtype) for key, shape in shapes.items()}


def same(a, b):
    """Whether two trees of arrays have the same keys, dtypes, shapes and bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def is_read_as(params, tensors):
    """Whether params hold what was stored, each tensor at its place."""
    seen = 0
    for key, x in tensors.items():
        inner = params
        for step in key.removeprefix("backbone.").replace("embeddings.", "embedding.").split("."):
            inner = inner[int(step)] if step.isdigit() else inner[step]
        seen += same(inner, x.reshape(8, 2) if "conv1d.weight" in key else x)
    return seen == len(tensors)


# ---------------------------------------------------------------------------------------------------- writers of the tests' own
def safetensors_bytes(tensors, **changes):
    header, data = {}, b""
    for name, x in tensors.items():
        header[name] = {"dtype": NAMES[x.dtype.name], "shape": x.shape, "data_offsets": [len(data), len(data) + x.nbytes]}
        data += x.tobytes()
    text = json.dumps(header | changes).encode()
    return len(text).to_bytes(8, "little") + text + data


class Global(str):
    """`c` opcode: "module\nname"."""


class Call(tuple):
    """`R` opcode: (function, arguments)."""


class Reference(tuple):
    """`Q` opcode: a persistent id."""


def pickled(x):
    """Protocol 2, opcode by opcode, as torch.save has it."""
    if isinstance(x, Global):
        return b"c" + x.encode() + b"\n"
    if isinstance(x, Call):
        return pickled(x[0]) + pickled(x[1]) + b"R"
    if isinstance(x, Reference):
        return pickled(tuple(x)) + b"Q"
    if isinstance(x, dict):
        return b"}(" + b"".join(pickled(key) + pickled(value) for key, value in x.items()) + b"u"
    if isinstance(x, tuple):
        return b"(" + b"".join(map(pickled, x)) + b"t"
    if isinstance(x, bool):
        return b"\x88" if x else b"\x89"
    if isinstance(x, int):
        return b"\x8a\x09" + x.to_bytes(9, "little", signed=True)
    return b"X" + len(x.encode()).to_bytes(4, "little") + x.encode()


REBUILD, ORDERED_DICT = Global("torch._utils\n_rebuild_tensor_v2"), Global("collections\nOrderedDict")


def storage(kind, key, count):
    return Reference(("storage", Global(f"torch\n{kind}Storage"), key, "cpu", count))


def rebuilt(source, offset, shape, strides):
    return Call((REBUILD, (source, offset, shape, strides, False, Call((ORDERED_DICT, ())))))


def torch_file(path, tensors, transposed=()):
    """A file as torch.save writes it. Those named in `transposed` are stored in Fortran order."""
    entries, content = {}, {}
    for i, (name, x) in enumerate(tensors.items()):
        order = "F" if name in transposed else "C"
        strides = tuple(stride // x.itemsize for stride in np.array(x, order=order).strides)
        entries[name] = rebuilt(storage(CLASSES[x.dtype.name], str(i), x.size), 0, x.shape, strides)
        content[str(i)] = x.tobytes(order)
    raw_torch_file(path, b"\x80\x02" + pickled(entries) + b"}b.", content)


def raw_torch_file(path, pickle_bytes, storages, **more):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_bytes)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in {"version": b"3\n", **more}.items():
            archive.writestr(f"archive/{name}", content)


def write(folder, config, tensors, kind="safetensors", shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    name = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin"}[kind]
    names, places = list(tensors), {}
    for i in range(shards):
        shard = name if shards == 1 else f"{i}-of-{shards}.{name}"
        part = {key: tensors[key] for key in names[i::shards]}
        places |= dict.fromkeys(part, shard)
        if kind == "torch":
            torch_file(folder / shard, part, transposed=[key for key in part if "proj.weight" in key])
        else:
            (folder / shard).write_bytes(safetensors_bytes(part))
    if shards > 1:
        (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


# ---------------------------------------------------------------------------------------------------- read
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("config", [ORIGINAL, HF], ids=["original", "hf"])
def test_every_layout_is_read(tmp_path, config, kind, shards):
    tensors = stored(config)
    found, params = weights.load(write(tmp_path, config, tensors, kind, shards))
    wanted = {} if config is ORIGINAL else {"vocab_size": 16, "pad_vocab_size_multiple": 1} | TOKENS
    assert found == dataclasses.replace(CONFIG, **wanted)
    assert is_read_as(params, tensors) and "lm_head" not in params


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("dtype", NAMES)
def test_dtypes_are_kept(tmp_path, dtype, kind):
    tensors = stored(HF, dtype) | {"backbone.layers.0.mixer.A_log": np.full((8, 3), 0.1, "float32")}
    assert is_read_as(weights.load(write(tmp_path, HF, tensors, kind))[1], tensors)


ROWS = {
    "a tied head that is stored": ({}, lambda t: {"lm_head.weight": t["backbone.embeddings.weight"]}, {}),
    "its own head": ({"tie_word_embeddings": False}, {"lm_head.weight": (16, 4)}, {"tie_embeddings": False}),
    "biases": (
        {"use_bias": True},
        {f"backbone.layers.{i}.mixer.{name}_proj.bias": (n,) for i in range(2) for name, n in (("in", 16), ("out", 4))},
        {"bias": True},
    ),
    "biases that it does not mention": (
        {"use_bias": None},
        {f"backbone.layers.{i}.mixer.{name}_proj.bias": (n,) for i in range(2) for name, n in (("in", 16), ("out", 4))},
        {"bias": True},
    ),
    "FalconMamba": ({"model_type": "falcon_mamba", "mixer_rms_eps": 1e-4}, {}, {"bc_dt_norm": True, "bc_dt_norm_eps": 1e-4}),
    "weights of inner norms": (
        {},
        {f"backbone.layers.{i}.mixer.{name}_layernorm.weight": (n,) for i in range(2) for name, n in NORMED.items()},
        {"bc_dt_norm": True},
    ),
    "intermediate_size counts, not expand": ({"expand": 16}, {}, {}),
    "vocabulary padded by the original": ({"pad_vocab_size_multiple": 8}, {}, {"pad_vocab_size_multiple": 8}),
    "epsilon": ({"layer_norm_epsilon": 1e-6}, {}, {"norm_eps": 1e-6}),
    "tokens": ({"bos_token_id": 1, "eos_token_id": [2, 3]}, {}, {"bos_token_id": 1, "eos_token_id": (2, 3)}),
    "tokens that it does not mention": (dict.fromkeys(TOKENS), {}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("change", "more", "wanted"), ROWS.values(), ids=ROWS)
def test_what_configs_say(tmp_path, change, more, wanted):
    tensors = stored()
    more = more(tensors) if callable(more) else {key: np.full(shape, 0.5, "float32") for key, shape in more.items()}
    spoken = {key: value for key, value in (HF | change).items() if value is not None}
    config, params = weights.load(write(tmp_path, spoken, tensors | more))
    assert config == dataclasses.replace(CONFIG, **{"vocab_size": 16, "pad_vocab_size_multiple": 1, **TOKENS, **wanted})
    assert is_read_as(params, tensors | ({} if config.tie_embeddings and "lm_head.weight" in more else more))


def test_original_names_of_ssm_cfg(tmp_path):
    ssm = {"d_state": 3, "d_conv": 2, "expand": 2, "dt_rank": "auto", "dt_min": 0.01, "dt_init": "constant", "layer": "Mamba1"}
    config = ORIGINAL | {"ssm_cfg": ssm, "residual_in_fp32": False, "tie_embeddings": True}
    found, _ = weights.load(write(tmp_path, config, stored(config)))
    assert found == dataclasses.replace(CONFIG, dt_min=0.01, dt_init="constant", residual_in_fp32=False)


def test_nothing_is_read_before_it_is_used(tmp_path):
    """Eight GB that are a hole in a file: a copy would need the memory."""
    config = HF | {"num_hidden_layers": 0, "hidden_size": 4096, "intermediate_size": 8192, "vocab_size": 1 << 20}
    ends = {"backbone.embeddings.weight": ((1 << 20, 4096), 0), "backbone.norm_f.weight": ((4096,), 1 << 33)}
    header = {
        key: {"dtype": "BF16", "shape": shape, "data_offsets": [begin, begin + 2 * int(np.prod(shape))]}
        for key, (shape, begin) in ends.items()
    }
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (1 << 33) + 8192)
    tracemalloc.start()
    _, params = weights.load(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert params["embedding"]["weight"].nbytes == 1 << 33 and peak < 1 << 20


def test_arrays_are_read_only_views_of_the_file(tmp_path):
    tensors = stored()
    text = safetensors_bytes(tensors)
    write(tmp_path, HF, tensors)
    length = int.from_bytes(text[:8], "little")  # padded so that float32 is aligned
    header = text[8 : 8 + length] + b" " * (-length % 8)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + text[8 + length :])
    x = weights.load(tmp_path)[1]["layers"][1]["mixer"]["in_proj"]["weight"]
    assert not x.flags.writeable and type(x) is np.ndarray
    while isinstance(x, np.ndarray):
        x = x.base
    assert isinstance(x.obj if isinstance(x, memoryview) else x, mmap.mmap)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", NAMES)
def test_weights_move_to_the_device(tmp_path, dtype):
    import cupy

    _, params = weights.load(write(tmp_path, HF, stored(HF, dtype), "torch"), device=0)
    moved = params["layers"][1]["mixer"]["in_proj"]["weight"]
    assert isinstance(moved, cupy.ndarray) and same(moved.get(), stored(HF, dtype)["backbone.layers.1.mixer.in_proj.weight"])
    weights.save(weights.load(tmp_path)[0], params, tmp_path / "again")
    assert same(weights.load(tmp_path / "again")[1], weights.load(tmp_path)[1])


def test_a_device_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "explain_missing", lambda: "no driver")
    with pytest.raises(RuntimeError, match="load: device is 1, but no driver"):
        weights.load(write(tmp_path, HF, stored()), device=1)


GOLDEN_TORCH = (
    "c-p0v&u`;I6vxL->!fbCO-tGSU@1Qr61JN<c7Ar*O=PVsBqPxVAw^t*lemqAo9weEU4gVx5NaiEfH)$waN^7bZk#!;xN=wti60UY@E<VaNwOYSY1r;4&"
    "Lorhe%^QD_n!C6*bG961UfU4Xa!kbtK%HoJ8cVFnLF>hhQ5g2<;Fm4wR)~=x3JUe`tn;|+xG1CZKs80K<OF?sXF1Kj^!SJ*up&m%ryGgaecYr+0DM=wj"
    "0>)`aQ34tjZ8erRs6A-zPh*LmOt8M1F(l-)3tv%+>|6MFFWEBXjFcAL6EjA+c{FQ#ye;Q#b+nlMW3(k71z(m+BJP*gSB17KX(R3DOyXb%QQu3uE|F0MA"
    "0Q6F`?KR5W9!uwuqc;S`=?;8hGy*Whvh_MPsbYr`4`4!C3LdO%fSgHbmrHD-#Z@Qf)?_!UNd7Q<Ezo(rh$UcX7G&vVq<!QvSELV(raMTUK8pU}h;c$vO"
    "kWyn`Byjp`)eU@yrT*vYu&4``#&d|+k`{aZob#skO<c!-)dL2Wi20QGGEz7k$P)6Dya1OGBAYf3*dD3a7(lF#|kni7vLVb>GY8=_vq6q}W;P+CUW*3z2"
    "!ESJ?k8RH<xdS&$!T0@UX3vZ#s^9&j)<lHpwKp+C*HC(#p_zl8cVywlkY?ytBZ)d;WNEnX|NiA;dLDXB4!4PlkHQTTv_byT!|svY#fGl^zli)O<fwtlU"
    "HFq66^Z8>SVonxf#wI;?$Kg1^cxq6I~uNov1?NgCpUlHpm$n2*TW*Z#dU=p#n5-3zyQr6R6@Jxb##-uFy36av_KXYrno5aF0zK6Ll=ubxP>a!%Aj(;Lg"
    "WASb>`;_#8)pKpN>I=yj97ITmy35uTn2-pZ@;YI{9IJikEHPi)QF4^my?{<Dbg#LzPX5;hY@KtAVc#;o83n?Z8uft@6HdhMq)c<39|T?;ZU%M;{b3=Q5"
    "W<6)>*!C(3_KrqLgKb@<No`rAV4qXrNh$+ta+bbt>n`t)l!Z9~sIrWr-a=d)!cTgq#yqUFm<u~bxwWT}`h<&;9ctSaR~siaYtAN}z#o+3U{flEOQ?$FR"
    "@xML>IIFCNZqv~)2T;r7Ah-gxejY7grY?E(XF?3GnjB>(_Xqn@D9^#A}U{oINAd8&*@(hafuBbL#{k-<es5TqbhO3p=UYU(()u=XHQM~rss8)+=!<EBp"
    "t5QUpi)zDpzr<<32x%wW?{GS9apILYno=lxrX+2T$|`n!telU`KZ<PrA<kx^3qIYI*?0EDo|TwpKG@Ip{s#-fRs{"
)
"""torch 2.13: torch.save of an OrderedDict (with `_metadata`) of float16 arange(6)/4, bfloat16 arange(6)/4 as (2, 3), float32
arange(6) as (2, 3) transposed, float64 arange(6)[1:5:2], and of the same float32 storage [2:] as (2, 2); a scalar 7."""


def test_golden_torch_file(tmp_path):
    (tmp_path / "x.bin").write_bytes(zlib.decompress(base64.b85decode(GOLDEN_TORCH)))
    found = {name: x.array() for name, x in torch_files.read(tmp_path / "x.bin").items()}
    x = np.arange(6, dtype="float32")
    wanted = {
        "half": (x / 4).astype("float16"),
        "bfloat": (x / 4).astype(ml_dtypes.bfloat16).reshape(2, 3),
        "single": np.ascontiguousarray(x.reshape(2, 3).T),
        "double": np.array([1.0, 3.0]),
        "alias": x[2:].reshape(2, 2),
        "scalar": np.array(7, "float32"),
    }
    assert same(found, wanted) and all(x.flags.c_contiguous for x in found.values())


def test_golden_safetensors_file(tmp_path):
    """Bytes from the format's description; the odd header puts float32 at an odd address."""
    text = b'{"__metadata__":{"a":"b"},"w":{"dtype":"F32","shape":[2],"data_offsets":[2,10]},"v":{"dtype":"BF16","shape":[1,1],'
    text += b'"data_offsets":[0,2]},"none":{"dtype":"F16","shape":[0,3],"data_offsets":[10,10]}}'
    text += b" " * (1 - len(text) % 2)
    data = b"\x80\x3f" + b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = {name: x.array() for name, x in safetensors_files.read(tmp_path / "x.safetensors").items()}
    wanted = {"w": np.array([1, -2], "float32"), "v": np.ones((1, 1), ml_dtypes.bfloat16), "none": np.empty((0, 3), "float16")}
    assert same(found, wanted) and all(x.flags.aligned for x in found.values())


# ---------------------------------------------------------------------------------------------------- write
def params_of(config, dtype="float32", seed=1):
    rng = np.random.default_rng(seed)

    def tree(**shapes):
        return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}

    d, e, n, r = config.d_model, config.d_inner, config.d_state, config.rank
    norm = {"weight": (d,)} if config.rms_norm else {"weight": (d,), "bias": (d,)}
    blocks = []
    for _ in range(config.n_layer):
        mixer = tree(A_log=(e, n), D=(e,))
        mixer["in_proj"] = tree(weight=(2 * e, d), **({"bias": (2 * e,)} if config.bias else {}))
        mixer["conv1d"] = tree(weight=(e, config.d_conv), **({"bias": (e,)} if config.conv_bias else {}))
        mixer |= {"x_proj": tree(weight=(r + 2 * n, e)), "dt_proj": tree(weight=(e, r), bias=(e,))}
        mixer["out_proj"] = tree(weight=(d, e), **({"bias": (d,)} if config.bias else {}))
        blocks.append({"norm": tree(**norm), "mixer": mixer})
    rows = config.padded_vocab_size
    params = {"embedding": tree(weight=(rows, d)), "layers": blocks, "norm_f": tree(**norm)}
    return params if config.tie_embeddings else params | {"lm_head": tree(weight=(rows, d))}


CHANGES = [
    {}, {"tie_embeddings": False}, {"bias": True}, {"conv_bias": False}, {"rms_norm": False, "norm_eps": 1e-6, "dt_rank": 2},
    {"bc_dt_norm": True, "bc_dt_norm_eps": 1e-4}, {"expand": 1.5}, {"expand": 1.26, "d_model": 50}, {"dt_rank": 3},
    {"d_conv": 1},
    {"vocab_size": 16}, {"pad_vocab_size_multiple": 1}, {"n_layer": 0}, {"residual_in_fp32": False, "norm_eps": 1e-6},
    {"dt_min": 0.01, "dt_max": 0.2, "dt_init": "constant", "dt_scale": 2.0, "dt_init_floor": 1e-3},
    {"bos_token_id": 0, "eos_token_id": 11, "pad_token_id": -1}, {"rms_norm": False, "eos_token_id": (2, 3)},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_round_trip(tmp_path, change):
    config = dataclasses.replace(CONFIG, **change)
    params = params_of(config)
    weights.save(config, params, tmp_path / "model")
    found = weights.load(tmp_path / "model")
    assert found[0] == config and same(found[1], params)
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"] and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("dtype", NAMES)
def test_round_trip_of_dtypes(tmp_path, dtype):
    params = params_of(CONFIG, dtype)
    params["norm_f"]["weight"] = np.asfortranarray(params["norm_f"]["weight"].astype("float32"))
    params["layers"][0]["mixer"]["in_proj"]["weight"] = np.asfortranarray(params["layers"][0]["mixer"]["in_proj"]["weight"])
    params["layers"][0]["mixer"]["x_proj"]["weight"] = params["layers"][0]["mixer"]["x_proj"]["weight"][::-1, ::-1]
    weights.save(CONFIG, params, tmp_path)
    assert same(weights.load(tmp_path)[1], params)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype


def test_weights_of_inner_norms_go_round(tmp_path):
    config = dataclasses.replace(CONFIG, bc_dt_norm=True)
    params = params_of(config)
    for i, block in enumerate(params["layers"]):
        sizes = {"dt_layernorm": 1, "b_layernorm": 3, "c_layernorm": 3}
        block["mixer"] |= {name: {"weight": np.full(n, i + 2, "float32")} for name, n in sizes.items()}
    weights.save(config, params, tmp_path)
    found = weights.load(tmp_path)
    assert found[0] == config and same(found[1], params)


def test_written_as_transformers_has_it(tmp_path):
    """Its keys, and its config.json. Where rescale_prenorm_residual is true, transformers 5.23 divides out_proj
    of the model that it loads."""
    weights.save(dataclasses.replace(CONFIG, **TOKENS), params_of(CONFIG), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {**config, **HF} == config
    found = safetensors_files.read(tmp_path / "model.safetensors")
    assert {key: x.shape for key, x in found.items()} == {key: x.shape for key, x in stored().items()}


@pytest.mark.parametrize("dtype", NAMES)
def test_the_safetensors_package_agrees(tmp_path, dtype):
    package = pytest.importorskip("safetensors.numpy")
    tensors = stored(HF, dtype)
    write(tmp_path, HF, tensors)
    package.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config, params = weights.load(tmp_path)
    assert is_read_as(params, tensors)
    weights.save(config, params, tmp_path / "again")
    assert same(
        dict(sorted(package.load_file(tmp_path / "again" / "model.safetensors").items())), dict(sorted(tensors.items()))
    )
    with pytest.importorskip("safetensors").safe_open(tmp_path / "again" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    params = params_of(CONFIG)
    with pytest.raises(FileExistsError, match="force=True"):
        weights.save(CONFIG, params, tmp_path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    with pytest.raises(FileExistsError, match="is no folder"):
        weights.save(CONFIG, params, tmp_path / "tokenizer.json", force=True)
    weights.save(CONFIG, params, tmp_path, force=True)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]
    with pytest.raises(FileNotFoundError, match="missing"):
        weights.save(CONFIG, params, tmp_path / "missing" / "model")


def test_what_is_written_lies_where_it_can_be_addressed(tmp_path):
    """16-bit tensors of odd sizes beside float32 ones: views all, and no copies for want of alignment."""
    config = dataclasses.replace(CONFIG, d_model=3, expand=1, vocab_size=5, pad_vocab_size_multiple=1)
    params = params_of(config, "bfloat16")
    for block in params["layers"]:
        block["mixer"] |= {name: block["mixer"][name].astype("float32") for name in ("A_log", "D")}
    weights.save(config, params, tmp_path)
    found = weights.load(tmp_path)[1]
    assert same(found, params) and not any(block["mixer"]["A_log"].flags.writeable for block in found["layers"])


@pytest.mark.parametrize(("d_model", "d_inner"), [(11, 15), (50, 63), (4, 8), (768, 1537)])
def test_any_intermediate_size_comes_back(d_model, d_inner):
    config = checkpoint_config.from_json("x", HF | {"hidden_size": d_model, "intermediate_size": d_inner}, False, False)
    assert config.d_inner == d_inner


def test_saving_over_the_file_that_params_are_mapped_from(tmp_path):
    params = params_of(CONFIG)
    weights.save(CONFIG, params, tmp_path)
    mapped = weights.load(tmp_path)[1]
    weights.save(CONFIG, mapped, tmp_path, force=True)
    assert same(mapped, params) and same(weights.load(tmp_path)[1], params)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"]
)
@pytest.mark.parametrize("occupied", [False, True])
def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch, occupied, error):
    folder, before = tmp_path / "model", params_of(CONFIG)
    if occupied:
        weights.save(CONFIG, before, folder)
        (folder / "notes").write_text("")

    def fail(file, tensors):
        file.write(b"half")
        raise error

    monkeypatch.setattr(safetensors_files, "write", fail)
    with pytest.raises(type(error), match="model.safetensors" if isinstance(error, OSError) else None):
        weights.save(CONFIG, params_of(CONFIG, seed=2), folder, force=True)
    assert os.listdir(tmp_path) == (["model"] if occupied else [])
    if occupied:
        assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "notes"]
        assert same(weights.load(folder)[1], before)


@pytest.mark.parametrize("nth", range(4))
def test_a_replacement_that_stops_halfway_is_taken_back(tmp_path, monkeypatch, nth):
    before, calls, rename = params_of(CONFIG), [], os.rename
    weights.save(CONFIG, before, tmp_path)

    def fail_at_nth(source, target):
        calls.append(source)
        if len(calls) == nth + 1:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(checkpoint_folder.os, "rename", fail_at_nth)
    other = dataclasses.replace(CONFIG, n_layer=1)
    with pytest.raises(KeyboardInterrupt):
        weights.save(other, params_of(other), tmp_path, force=True)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert same(weights.load(tmp_path)[1], before)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda p: p.pop("norm_f"), ValueError, "params: 1 missing: backbone.norm_f.weight"),
        (lambda p: p.update(lm_head={"weight": np.zeros((16, 4), "f")}), ValueError, "1 extra: lm_head.weight"),
        (lambda p: p["layers"].pop(), ValueError, "10 missing: .* and 2 more"),
        (lambda p: p["embedding"].update(weight=np.zeros((10, 4), "f")), ValueError, r"\(10, 4\), wanted \(16, 4\)"),
        (lambda p: p["embedding"].update(weight=np.zeros((16, 4), "i")), TypeError, r"\['embedding'\]\['weight'\] is int32"),
        (lambda p: p["embedding"].update(weight=None), TypeError, "NoneType"),
    ],
)
def test_params_that_are_not_the_configs(tmp_path, change, error, words):
    params = params_of(CONFIG)
    change(params)
    with pytest.raises(error, match=words):
        weights.save(CONFIG, params, tmp_path / "model")
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------------------------- bad checkpoints
def with_tensors(**change):
    def spoil(folder):
        tensors = stored() | {key.replace("__", "."): x for key, x in change.items()}
        write(folder, HF, {key: x for key, x in tensors.items() if x is not None})

    return spoil


def with_config(base=HF, drop=(), **change):
    return lambda folder: write(folder, {k: v for k, v in (base | change).items() if k not in drop}, stored(base))


def with_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def with_index(weight_map):
    def spoil(folder):
        write(folder, HF, stored(), shards=2)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def with_twins(folder):
    for i in range(2):
        (folder / f"{i}.model.safetensors").write_bytes(safetensors_bytes({"backbone.norm_f.weight": np.zeros(4, "f")}))
    with_index({"a": "0.model.safetensors", "b": "1.model.safetensors"})(folder)


def moved(**entry):
    """One tensor of eight float32, with another header entry."""
    wanted = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32], **entry}
    return with_file("model.safetensors", safetensors_bytes({"x": np.zeros(8, "f")}, x=wanted))


VALID = safetensors_bytes({"x": np.zeros(8, "f"), "y": np.zeros(8, "f")})
FAULTS = {
    "missing": (with_tensors(backbone__norm_f__weight=None), "model.safetensors: 1 missing: backbone.norm_f.weight$"),
    "extra": (with_tensors(odd__key=np.zeros(2, "f")), "model.safetensors: 1 extra: odd.key$"),
    "extra, odd name": (with_tensors(**{"a\nb": np.zeros(2, "f")}), r"1 extra: 'a\\nb'$"),
    "misshapen": (
        with_tensors(**{"backbone.layers.1.mixer.conv1d.weight": np.zeros((8, 2), "f")}),
        r"1 misshapen: backbone.layers.1.mixer.conv1d.weight has shape \(8, 2\), wanted \(8, 1, 2\)$",
    ),
    "all at once": (
        with_tensors(a=np.zeros(1, "f"), backbone__norm_f__weight=np.zeros(5, "f"), backbone__embeddings__weight=None),
        "1 missing: .*; 1 extra: a; 1 misshapen: backbone.norm_f",
    ),
    "a layer too many": (with_config(num_hidden_layers=3), "10 missing: .* and 2 more$"),
    "both spellings": (with_tensors(backbone__embedding__weight=np.zeros((16, 4), "f")), "extra: backbone.embedding.weight"),
    "a head that is not tied": (with_tensors(lm_head__weight=np.zeros((16, 4), "f")), "lm_head.weight differs"),
    "layers without end": (with_config(num_hidden_layers=10**9), "22 tensors, too few"),
    "sizes without end": (with_config(hidden_size=10**400), "more than any model"),
    "model type": (with_config(model_type="mamba2"), "config.json: model_type is 'mamba2', wanted mamba or falcon_mamba"),
    "model type, no text": (with_config(model_type=["mamba"]), "config.json: model_type is"),
    "no config of a Mamba": (with_config(drop=("hidden_size",)), "config.json: has neither hidden_size"),
    "no number of layers": (with_config(drop=("num_hidden_layers",)), "config.json: has no num_hidden_layers"),
    "activation": (with_config(hidden_act="gelu"), "config.json: hidden_act is 'gelu'"),
    "text for a number": (with_config(hidden_size="4"), "config.json: MambaConfig: d_model is '4'"),
    "a negative number": (with_config(state_size=-1), "config.json: MambaConfig: d_state is -1"),
    "a token of letters": (with_config(eos_token_id=["</s>"]), "config.json: MambaConfig: eos_token_id is .*, wanted"),
    "not a number": (with_config(layer_norm_epsilon=float("nan")), "config.json: norm_eps is nan"),
    "null": (with_config(vocab_size=None), "config.json: vocab_size is None"),
    "Mamba2 layers": (with_config(ORIGINAL, ssm_cfg={"layer": "Mamba2"}), "config.json: the layers are 'Mamba2'"),
    "ssm_cfg unknown": (with_config(ORIGINAL, ssm_cfg={"headdim": 64}), r"config.json: ssm_cfg has \['headdim'\]"),
    "attention": (with_config(ORIGINAL, attn_layer_idx=[1]), "config.json: attn_layer_idx is"),
    "config of no JSON": (with_file("config.json", b"{nonsense"), "config.json: not a JSON object"),
    "config of a list": (with_file("config.json", b"[]"), "config.json: not a JSON object"),
    "config twice": (with_file("config.json", b'{"d_model": 1, "d_model": 2}'), "config.json: .*2 of 'd_model'"),
    "config nested": (with_file("config.json", b'{"a":' * 100_000), "config.json: not a JSON object"),
    "config not UTF-8": (with_file("config.json", b'{"\xff": 1}'), "config.json: not a JSON object"),
    "config empty": (with_file("config.json", b""), "config.json: is empty"),
    "weights empty": (with_file("model.safetensors", b""), "model.safetensors: is empty"),
    "weights short": (with_file("model.safetensors", VALID[:5]), "model.safetensors: cut short"),
    "header short": (with_file("model.safetensors", VALID[:50]), "model.safetensors: cut short"),
    "data short": (with_file("model.safetensors", VALID[:-1]), "cut short: 63 bytes of data, wanted 64"),
    "data long": (with_file("model.safetensors", VALID + b"0"), "too long: 65 bytes of data, wanted 64"),
    "header huge": (with_file("model.safetensors", b"\xff" * 8 + VALID), "model.safetensors: cut short"),
    "header no JSON": (with_file("model.safetensors", b"\x08" + bytes(7) + b"nonsense"), "header: not a JSON object"),
    "dtype": (moved(dtype="I32"), "model.safetensors: 'x': dtype is 'I32', wanted F16, BF16, F32, F64"),
    "dtype no text": (moved(dtype=[]), "'x': dtype is"),
    "shape negative": (moved(shape=[-8]), "'x': shape is"),
    "shape true": (moved(shape=[8, True]), "'x': shape is"),
    "shape endless": (moved(shape=[2**62] * 9), "'x': shape is"),
    "shape too large": (moved(shape=[2**62] * 4), "do not hold the"),
    "offsets reversed": (moved(data_offsets=[32, 0]), "data_offsets are"),
    "offsets outside": (moved(data_offsets=[32, 64]), "leave a gap"),
    "offsets negative": (moved(data_offsets=[-32, 0]), "data_offsets are"),
    "offsets overlap": (
        with_file("model.safetensors", safetensors_bytes(dict.fromkeys("xy", np.zeros(8, "f")), y={
            "dtype": "F32", "shape": [8], "data_offsets": [16, 48]})),
        "'y': data_offsets .* overlap",
    ),
    "entry incomplete": (with_file("model.safetensors", safetensors_bytes({}, x={"dtype": "F32"})), "'x': wanted dtype"),
    "shard above": (with_index({"a": "../model.safetensors"}), "index.json: names the file '../model.safetensors'"),
    "shard at the root": (with_index({"a": "/etc/passwd"}), "names the file '/etc/passwd'"),
    "shard by drive": (with_index({"a": "c:\\x"}), "names the file"),
    "shard dots": (with_index({"a": ".."}), "names the file '..'"),
    "shard lost": (with_index({"a": "lost.safetensors"}), "lost.safetensors: no such file"),
    "shard no text": (with_index({"a": 1}), "index.json: has no weight_map"),
    "no map": (with_index([]), "index.json: has no weight_map"),
    "key twice": (with_twins, "backbone.norm_f.weight is in 0.model.safetensors and in 1.model.safetensors"),
    "key elsewhere": (with_index({"a": "0-of-2.model.safetensors"}), "1 not where it says: a in 0-of"),
}  # fmt: skip


def refused(folder, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        weights.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(("spoil", "words"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(tmp_path, spoil, words):
    write(tmp_path, HF, stored())
    if "shard" in words or "index.json" in words or "not where" in words or "names the file" in words:
        (tmp_path / "model.safetensors").unlink()
    spoil(tmp_path)
    (tmp_path / "model.safetensors.index.json").exists() and (tmp_path / "model.safetensors").unlink(missing_ok=True)
    refused(tmp_path, words)


def test_folders_that_are_none(tmp_path):
    refused(tmp_path / "missing", "no such folder")
    refused(tmp_path, "config.json: no such file")
    (tmp_path / "config.json").write_text(json.dumps(HF))
    refused(tmp_path, "has no weights, wanted model.safetensors or pytorch_model.bin")
    with pytest.raises(TypeError, match="device is 'cuda'"):
        weights.load(tmp_path, device="cuda")


# ---------------------------------------------------------------------------------------------------- bad pickles
class Runs:
    """What a malicious file holds: a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def nested_deep():
    return {"w": {"x": [Runs(builtins.exec, "raise SystemExit")]}}


MALICIOUS = {
    "os.system": (pickle.dumps(Runs(os.system, "touch PWNED"), 2), "asks for 'posix system'|asks for 'nt system'"),
    "builtins.eval": (pickle.dumps(Runs(eval, "open('PWNED', 'w')"), 4), "asks for 'builtins eval'"),
    "by protocol 0": (pickle.dumps(Runs(os.system, "touch PWNED"), 0), "refused"),
    "nested": (pickle.dumps(nested_deep(), 2), "asks for '(__builtin__|builtins) exec'"),
    "as a dict's value": (b"\x80\x02}X\x01\x00\x00\x00wcos\nsystem\nX\x05\x00\x00\x00touch\x85Rs.", "asks for 'os system'"),
    "imports a module": (b"\x80\x02cantigravity\nx\n.", "asks for 'antigravity x'"),
    "a module named like torch": (b"\x80\x02ctorch.evil\nFloatStorage\n.", "asks for"),
    "a long name again and again": (
        b"\x80\x04\x8c\x05torch\x94X" + (100_007).to_bytes(4, "little") + b"a" * 100_000 + b"Storage\x94"
        + b"h\x00h\x01\x93" * 9 + b".",
        "asks for",
    ),
    "a storage with dots": (b"\x80\x02ctorch\nos.systemStorage\n.", "asks for"),
    "stacked global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "asks for 'os system'"),
    "stacked global of no text": (b"\x80\x04)]\x93.", "asks for"),
    "INST": (b"(S'touch PWNED'\nios\nsystem\n.", "opcode"),
    "OBJ": (b"\x80\x02(cos\nsystem\nX\x01\x00\x00\x00xo.", "asks for"),
    "NEWOBJ": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
    "an extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "calls a storage": (b"\x80\x02ctorch\nFloatStorage\n)R.", "it calls something"),
    "calls a dict": (b"\x80\x02})R.", "it calls something"),
    "sets attributes": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "attributes for something"),
    "a memo of 64 GB": (b"\x80\x02Nr\xff\xff\xff\xff.", "it is no dict"),
    "a text of 4 GB": (b"\x80\x02X\xff\xff\xff\xffabc.", "data.pkl: "),
    "keys that are no text": (b"\x80\x02})Ns.", "a key that is no text"),
    "a dict in itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00wh\x00s.", "it is no dict of names to tensors"),
    "exponential tuples": (b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b".", "it is no dict"),
    "nothing on the stack": (b"\x80\x02R.", "no pickle"),
    "no end": (b"\x80\x02}", "data.pkl: "),
    "two things at the end": (b"\x80\x02}}.", "data.pkl: "),
    "not a state dict": (b"\x80\x02" + pickled({"w": "text"}) + b".", "it is no dict of names to tensors"),
    "no pickle": (b"\xff\xfe", "data.pkl: "),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), MALICIOUS.values(), ids=MALICIOUS)
def test_a_malicious_pickle_runs_nothing(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    weights.load(write(folder, HF, stored(), "torch"))  # imports all that reading needs
    raw_torch_file(folder / "pytorch_model.bin", content, {})

    used, imported = [], builtins.__import__

    def loud_import(name, *arguments, **options):
        if name not in sys.modules:
            used.append(name)
        return imported(name, *arguments, **options)

    with monkeypatch.context() as patch:
        for module, name in ((builtins, "eval"), (builtins, "exec"), (os, "system"), (pickle, "loads"), (pickle, "Unpickler")):
            patch.setattr(module, name, lambda *arguments: used.append(arguments))
        patch.setattr(builtins, "__import__", loud_import)
        refused(folder, words)
    assert not used and os.listdir(tmp_path) == ["model"]


def tensor_pickle(source=None, offset=0, shape=(2, 2), strides=(2, 1)):
    source = storage("Float", "0", 4) if source is None else source
    return b"\x80\x02" + pickled({"w": rebuilt(source, offset, shape, strides)}) + b"."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tensor_pickle(offset=1), "reaches element 4 of storage '0', which has 4"),
        (tensor_pickle(offset=-1), "offset, size or stride"),
        (tensor_pickle(strides=(2, 2)), "reaches element 4"),
        (tensor_pickle(strides=(-2, 1)), "offset, size or stride"),
        (tensor_pickle(strides=(1,)), "offset, size or stride"),
        (tensor_pickle(shape=(2, True)), "offset, size or stride"),
        (tensor_pickle(shape=(2**40, 2**40), strides=(0, 0)), "which has 4 elements"),
        (tensor_pickle(storage("Float", "0", 5)), "storage '0' has 16 bytes, wanted 20"),
        (tensor_pickle(storage("Float", "1", 4)), "storage '1' is not in the file"),
        (tensor_pickle(storage("Float", "../data.pkl", 4)), "is not in the file"),
        (tensor_pickle(storage("Long", "0", 2)), "dtype of 'LongStorage', wanted HalfStorage"),
        (tensor_pickle(Reference(("module", "x"))), "no storage"),
        (tensor_pickle(("storage", "x")), "a tensor without storage"),
    ],
)
def test_torch_tensors_stay_inside_their_storage(tmp_path, content, words):
    write(tmp_path, HF, stored(), "torch")
    raw_torch_file(tmp_path / "pytorch_model.bin", content, {"0": bytes(16)})
    refused(tmp_path, words)


def test_zips_that_torch_does_not_write(tmp_path):
    write(tmp_path, HF, stored(), "torch")
    path = tmp_path / "pytorch_model.bin"
    good = path.read_bytes()
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + good[:100])
    refused(tmp_path, "torch before 1.6")
    path.write_bytes(good.replace(b"norm_f", b"norm_g", 1))
    refused(tmp_path, "data.pkl' is damaged")
    raw_torch_file(path, tensor_pickle(), {"0": bytes(16)}, byteorder=b"big")
    refused(tmp_path, "big-endian")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_pickle() + bytes(1 << 20))
        archive.writestr("archive/data/0", bytes(16))
    refused(tmp_path, "compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", b"3")
    refused(tmp_path, "0 members data.pkl")


# ---------------------------------------------------------------------------------------------------- noise
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("name", ["weights", "index", "config.json"])
def test_spoiled_bytes_give_documented_errors_only(tmp_path, kind, name):
    """Every one is read, or refused in one line with the file's name. 22 tensors fill 5 kB of which 2 are structure."""
    write(tmp_path, HF, stored(), kind, shards=2 if name == "index" else 1)
    weights_name = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin"}[kind]
    path = tmp_path / {"weights": weights_name, "index": f"{weights_name}.index.json"}.get(name, name)
    good, rng, failed = path.read_bytes(), np.random.default_rng(5), 0
    for i in range(400):
        spoiled = bytearray(good)
        if i % 4 == 0:
            del spoiled[rng.integers(len(good)) :]
        elif i % 4 == 1:
            at = rng.integers(len(good))
            spoiled[at : at + rng.integers(9)] = rng.bytes(int(rng.integers(9)))
        else:
            for at in rng.integers(len(good), size=i % 4):
                spoiled[at] = rng.integers(256)
        path.write_bytes(spoiled)
        try:
            weights.load(tmp_path)
        except (ValueError, FileNotFoundError) as error:
            failed += 1
            assert str(tmp_path) in str(error) and "\n" not in str(error), error
    assert failed > 100


def test_sizes_of_stored_tensors():
    assert [stored_tensors.is_size(x) for x in (0, 2**63 - 1, 2**63, -1, True, 1.0, "1", None)] == [True, True] + [False] * 6
