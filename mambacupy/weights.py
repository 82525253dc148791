"""Checkpoints: folders with a `config.json` and weights, to and from `MambaConfig` and nested dicts of arrays.

Read: `model.safetensors` or `pytorch_model.bin`, one file or shards with an index, with the keys and the config of the original
(github.com/state-spaces/mamba) or of transformers ("-hf"). Written: the -hf layout, which others read.
"""

import json
from pathlib import Path

from mambacupy import arrays, checkpoint_config, checkpoint_folder, safetensors_files
from mambacupy.checkpoint_folder import CONFIG, WEIGHTS
from mambacupy.stored_tensors import listed, printable, read_json, shown

__all__ = ["load", "save"]

_EMBEDDINGS = ("backbone.embeddings.weight", "backbone.embedding.weight")
"""-hf, original: the only key that they spell differently."""

_INNER_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
"""Norms inside a mixer that may have weights, as in Jamba; FalconMamba's have none, and no keys."""


def load(folder, *, device=None):
    """Read a checkpoint.

    Parameters
    ----------
    folder : path
        Holds `config.json`, and `model.safetensors` or `pytorch_model.bin` or the shards of either beside their index.
    device : int, optional
        GPU that the weights are moved to, one at a time. None leaves them on the host, as read-only views of the mapped files:
        nothing is read before it is used.

    Returns
    -------
    config : MambaConfig
    params : dict
        As `mambacupy.models.MambaLM` takes them, in the dtypes that they are stored in. There is no "lm_head" where the head is
        tied to the embedding. Convolution weights are (d_inner, width).

    Raises
    ------
    FileNotFoundError
        The folder, or a file that has to be in it, does not exist.
    ValueError
        A file is cut short or no such file, describes another model, or has keys, shapes or dtypes that the model has not.
        The message starts with the file's name and lists what is missing, extra and misshapen.
    TypeError
        `device` is neither None nor an integer.
    RuntimeError
        There is no GPU to move to; the message says why.
    """
    if device is not None and (not isinstance(device, int) or isinstance(device, bool)):
        raise TypeError(f"load: device is {device!r}, wanted None for the host or the number of a GPU")
    to_device = _no_move if device is None else _mover(device)
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, wanted one with {CONFIG} and {WEIGHTS} or pytorch_model.bin")
    content = read_json(folder / CONFIG)
    path, tensors = checkpoint_folder.tensors(folder)
    norms = [name for name in _INNER_NORMS if any(key.endswith(f".mixer.{name}.weight") for key in tensors)]
    bias = "backbone.layers.0.mixer.in_proj.bias" in tensors
    config = checkpoint_config.from_json(folder / CONFIG, content, bias, bool(norms))
    if config.n_layer > len(tensors):  # before a table of that many layers is made
        raise ValueError(f"{path}: has {len(tensors)} tensors, too few for the {config.n_layer} layers of {CONFIG}")

    embedding = _EMBEDDINGS[1] if _EMBEDDINGS[1] in tensors and _EMBEDDINGS[0] not in tensors else _EMBEDDINGS[0]
    wanted = _layout(config, embedding, norms)
    head = tensors.pop("lm_head.weight", None) if config.tie_embeddings else None
    _compare(path, {key: x.shape for key, x in tensors.items()}, {key: shape for key, (_, shape) in wanted.items()})
    if head is not None and not _equal(head, tensors[embedding]):
        raise ValueError(
            f"{path}: lm_head.weight differs from {embedding}, but {CONFIG} says that they are tied; "
            'say "tie_word_embeddings": false (original: "tie_embeddings": false) there to use both'
        )
    params = {"layers": [{} for _ in range(config.n_layer)]}
    for key, (route, _) in wanted.items():
        x = tensors[key].array()
        if x.ndim == 3:
            x = x[:, 0, :]  # (d_inner, 1, width) -> (d_inner, width)
        _put(params, route, to_device(x))
    return config, params


def save(config, params, folder, *, force=False):
    """Write a checkpoint in the -hf layout: `config.json` and `model.safetensors`.

    A model with LayerNorm, which transformers has not, gets the config and keys of the original. Weights of the norms on dt, B
    and C are kept, and nothing but `load` reads them.

    Parameters
    ----------
    config : MambaConfig
    params : dict
        NumPy or CuPy arrays of float16, bfloat16, float32 or float64, as `load` gives them.
    folder : path
        Appears when it is complete, or not at all. An empty one will do.
    force : bool
        Write into a folder that has files: the two are replaced, together or not at all, and others are kept.

    Raises
    ------
    FileExistsError
        The folder has files and `force` is not set, or is no folder.
    ValueError
        params are not those of config. The message lists what is missing, extra and misshapen.
    TypeError
        Some of params are no arrays of such a dtype.
    OSError
        The disk does not take it. Nothing is left behind.
    """
    folder = Path(folder)
    found = dict(_flat(params))
    embedding = _EMBEDDINGS[0] if config.rms_norm else _EMBEDDINGS[1]
    norms = [name for name in _INNER_NORMS if config.bc_dt_norm and any(name in route for route in found)]
    wanted = _layout(config, embedding, norms)
    for route, x in found.items():
        name = f"params{''.join(f'[{step!r}]' for step in route)}"
        arrays.library_of("save", name, x)
        if x.dtype not in arrays.FLOAT_DTYPES.values():
            raise TypeError(f"save: {name} is {arrays.dtype_name(x.dtype)}, wanted {', '.join(arrays.FLOAT_DTYPES)}")
    keys = {route: key for key, (route, _) in wanted.items()}
    shapes = {keys.get(route, ".".join(map(str, route))): _stored_shape(x.shape, route) for route, x in found.items()}
    _compare("params", shapes, {key: shape for key, (_, shape) in wanted.items()})

    def as_stored(route, x):
        return x[:, None, :] if _is_conv(route) else x  # (d_inner, width) -> (d_inner, 1, width)

    tensors = {keys[route]: as_stored(route, x) for route, x in found.items()}
    text = json.dumps(checkpoint_config.to_json(config, found["embedding", "weight"].dtype), indent=2) + "\n"

    def write_config(file):
        file.write(text.encode())

    def write_weights(file):
        safetensors_files.write(file, tensors)

    checkpoint_folder.publish(folder, {WEIGHTS: write_weights, CONFIG: write_config}, force)


# ---------------------------------------------------------------------------------------------------- keys
def _layout(config, embedding, norms):
    """Where each key of a checkpoint belongs in params, and the shape that it is stored in.

    `embedding` is the key of the embedding, `norms` are those of `_INNER_NORMS` that have weights.
    """
    d_model, d_inner, width, rank, state = config.d_model, config.d_inner, config.d_conv, config.rank, config.d_state
    rows = config.padded_vocab_size
    norm = {"weight": (d_model,)} if config.rms_norm else {"weight": (d_model,), "bias": (d_model,)}
    block = {f"norm.{name}": shape for name, shape in norm.items()} | {
        "mixer.A_log": (d_inner, state),
        "mixer.D": (d_inner,),
        "mixer.in_proj.weight": (2 * d_inner, d_model),
        "mixer.conv1d.weight": (d_inner, 1, width),
        "mixer.x_proj.weight": (rank + 2 * state, d_inner),
        "mixer.dt_proj.weight": (d_inner, rank),
        "mixer.dt_proj.bias": (d_inner,),
        "mixer.out_proj.weight": (d_model, d_inner),
    }
    if config.conv_bias:
        block["mixer.conv1d.bias"] = (d_inner,)
    if config.bias:
        block |= {"mixer.in_proj.bias": (2 * d_inner,), "mixer.out_proj.bias": (d_model,)}

    for name in norms:
        block[f"mixer.{name}.weight"] = (rank if name == "dt_layernorm" else state,)

    wanted = {embedding: (("embedding", "weight"), (rows, d_model))}
    for i in range(config.n_layer):
        for name, shape in block.items():
            wanted[f"backbone.layers.{i}.{name}"] = (("layers", i, *name.split(".")), shape)
    for name, shape in norm.items():
        wanted[f"backbone.norm_f.{name}"] = (("norm_f", name), shape)
    if not config.tie_embeddings:
        wanted["lm_head.weight"] = (("lm_head", "weight"), (rows, d_model))
    return wanted


def _compare(label, found, wanted):
    """Raise one ValueError for all differences between two tables of shapes by key."""
    missing = [key for key in wanted if key not in found]
    extra = [printable(key) for key in found if key not in wanted]
    misshapen = [
        f"{key} has shape {shown(found[key])}, wanted {shape}"
        for key, shape in wanted.items()
        if key in found and found[key] != shape
    ]
    faults = [
        f"{len(items)} {kind}: {listed(items)}"
        for kind, items in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if items
    ]
    if faults:
        raise ValueError(f"{label}: {'; '.join(faults)}")


def _put(params, route, x):
    for step in route[:-1]:
        params = params[step] if isinstance(params, list) else params.setdefault(step, {})
    params[route[-1]] = x


def _flat(params, route=()):
    """The arrays of nested dicts and lists, with the keys and indices that lead to each."""
    if isinstance(params, dict):
        steps = params.items()
    elif isinstance(params, (list, tuple)):
        steps = enumerate(params)
    else:
        yield route, params
        return
    for step, inner in steps:
        yield from _flat(inner, (*route, step))


def _is_conv(route):
    return route[-2:] == ("conv1d", "weight")


def _stored_shape(shape, route):
    return (shape[0], 1, shape[1]) if _is_conv(route) and len(shape) == 2 else tuple(shape)


def _equal(a, b):
    """Whether two stored tensors have the same bits, a few rows at a time."""
    if a == b:
        return True
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = a.array(), b.array()
    return all(a[i : i + 1024].tobytes() == b[i : i + 1024].tobytes() for i in range(0, len(a), 1024))


# ---------------------------------------------------------------------------------------------------- the device
def _no_move(x):
    return x


def _mover(device):
    """What moves one array to a GPU."""
    from mambacupy import environment  # it looks for CuPy, which nothing else here needs

    missing = environment.explain_missing()
    if missing:
        raise RuntimeError(f"load: device is {device}, but {missing}")
    import cupy

    def move(x):
        with cupy.cuda.Device(device):
            return cupy.asarray(x)

    return move
