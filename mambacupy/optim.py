"""Training: AdamW, clipping, a learning-rate schedule, and files from which training goes on bit for bit.

Functions of nests of arrays (dicts, lists), as layers hold their parameters; NumPy or CuPy. Nothing is changed in place.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mambacupy import arrays
from mambacupy.layers import map_params
from mambacupy.ops import training

STRUCTURE = "structure.json"
"""Member of a saved file that says how its arrays were nested."""


class AdamWState(NamedTuple):
    """Steps done, and the running means of gradients and of their squares, nested as the parameters."""

    step: int
    mean: Any
    square: Any


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay: "Decoupled Weight Decay Regularization" (Loshchilov & Hutter, 2019), algorithm 2.

        m = β1·m + (1 - β1)·g        v = β2·v + (1 - β2)·g²
        p = p - rate·(m/(1 - β1^t)/(√(v/(1 - β2^t)) + eps) + decay·p)

    Parameters
    ----------
    rate : float or callable
        Learning rate, or a function of the step, which counts from 1.
    betas, eps, decay : float
        As above. Matrices decay; A_log, D, biases and the weights of norms do not.
    """

    rate: float | Callable[[int], float]
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.1

    def init(self, params):
        """State before the first step: zeros in float32 at least."""
        zeros = map_params(lambda p: _namespace(p).zeros(p.shape, arrays.compute_dtype(p.dtype)), params)
        return AdamWState(0, zeros, map_params(lambda p: p.copy(), zeros))

    def update(self, params, grads, state):
        """One step.

        Returns
        -------
        params, state
            In fresh memory; parameters in their dtypes.
        """
        step, (beta1, beta2) = state.step + 1, self.betas
        rate = self.rate(step) if callable(self.rate) else self.rate
        lists = [_leaves(params, nest) for nest in (params, grads, state.mean, state.square)]
        if not lists[0]:
            return params, AdamWState(step, state.mean, state.square)
        decays = _leaves(params, which_decay(params))
        numbers = (beta1, 1 - beta1, beta2, 1 - beta2, 1 - beta1**step, 1 - beta2**step, self.eps, rate, self.decay)
        moved, mean, square = (_nest(params, found) for found in training.adamw(*lists, decays, numbers))
        return moved, AdamWState(step, mean, square)


def which_decay(params, name=""):
    """A nest of booleans: True for matrices other than A_log."""
    if isinstance(params, dict):
        return {key: which_decay(value, key) for key, value in params.items()}
    if isinstance(params, (list, tuple)):
        return [which_decay(value, name) for value in params]
    return params.ndim > 1 and name != "A_log"


def clip_by_norm(grads, most):
    """Scale gradients so that their norm, over all arrays together, is at most `most`.

    Returns
    -------
    grads, norm
        The norm before, a float32 (float64) array without axes, so that nothing waits for a GPU.
    """
    found = _leaves(grads, grads)
    if not found:
        return grads, np.float32(0)
    found, norm = training.clip(found, most)
    return _nest(grads, found), norm


def _leaves(like, nest, found=None):
    """The arrays of a nest in the order in which `like`, a nest built as it is, has them. A third of `map_params`'s time."""
    found = [] if found is None else found
    if isinstance(like, dict):
        for key, value in like.items():
            _leaves(value, nest[key], found)
    elif isinstance(like, (list, tuple)):
        for value, part in zip(like, nest, strict=True):
            _leaves(value, part, found)
    elif like is not None:
        found.append(nest)
    return found


def _nest(like, found):
    """Arrays in the order of the nest `like`, nested as it is."""
    return _rebuilt(like, iter(found))


def _rebuilt(like, found):
    if isinstance(like, dict):
        return {key: _rebuilt(value, found) for key, value in like.items()}
    if isinstance(like, (list, tuple)):
        parts = [_rebuilt(value, found) for value in like]
        return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)
    return None if like is None else next(found)


def warmup_cosine(peak, warmup, total, floor=0.0):
    """A schedule: linear from 0 to `peak` over `warmup` steps, then a half cosine to `floor` at step `total`, and flat."""
    if not 0 <= warmup < total:
        raise ValueError(f"warmup_cosine: warmup is {warmup}, wanted at least 0 and less than total = {total}")

    def rate(step):
        if step < warmup:
            return peak * step / warmup
        part = min(1.0, (step - warmup) / (total - warmup))
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * part))

    return rate


# ---------------------------------------------------------------------------------------------------- files
def save(path, tree, **facts):
    """Write a nest of arrays and plain facts, complete or not at all.

    Parameters
    ----------
    path : path
        An `.npz` file; one that exists is replaced once the new one is complete.
    tree : nest
        For example `{"params": params, "optimizer": state}`. Tuples come back as lists, of their fields if they are named.
    **facts
        What JSON can hold: a step, the state of a random generator (`rng.bit_generator.state`).
    """
    path, found = Path(path), {}
    structure = {"tree": _flatten(tree, "", found), "facts": facts}
    found[STRUCTURE] = np.frombuffer(json.dumps(structure).encode(), np.uint8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **found)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path):
    """What `save` wrote: (tree, facts), as NumPy arrays of the same bits."""
    with np.load(path, allow_pickle=False) as found:
        if STRUCTURE not in found:
            raise ValueError(f"{path}: has no {STRUCTURE}, wanted a file that mambacupy.optim.save wrote")
        structure = json.loads(found[STRUCTURE].tobytes())
        return _nested(structure["tree"], found), structure["facts"]


def _flatten(tree, place, found):
    """What JSON says of a nest; its arrays go into `found` under their places."""
    if isinstance(tree, dict):
        for key in tree:
            if not isinstance(key, str):
                raise TypeError(f"optim.save: a dict has the key {key!r}, wanted strings, which is what comes back")
        return {"dict": {key: _flatten(value, f"{place}/{_escaped(key)}", found) for key, value in tree.items()}}
    if isinstance(tree, (list, tuple)):
        return {"list": [_flatten(value, f"{place}/{i}", found) for i, value in enumerate(tree)]}
    if not hasattr(tree, "dtype"):
        return {"value": tree}
    x = np.ascontiguousarray(tree.get() if hasattr(tree, "get") else tree)
    found[place] = x.view(np.uint16) if x.dtype == arrays.BFLOAT16 else x
    return {"array": place, "dtype": arrays.dtype_name(x.dtype), "shape": list(tree.shape)}


def _escaped(key):
    """A dict's key as a part of a place, which "/" divides."""
    return key.replace("~", "~0").replace("/", "~1")  # as JSON pointers do


def _nested(structure, found):
    if "dict" in structure:
        return {key: _nested(value, found) for key, value in structure["dict"].items()}
    if "list" in structure:
        return [_nested(value, found) for value in structure["list"]]
    if "value" in structure:
        return structure["value"]
    x = found[structure["array"]]
    x = x.view(arrays.BFLOAT16) if structure["dtype"] == "bfloat16" else x
    return x.reshape(structure["shape"])


def _namespace(x):
    return arrays.library_of("optim", "parameter", x) if getattr(x, "ndim", 0) else np
