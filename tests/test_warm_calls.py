"""Calls on CuPy arrays that come again: what is remembered of the first, and what is not.

They need CuPy, but no GPU: the arrays lie at made-up addresses, and launches are only recorded.
"""

import contextlib
import copy
import gc
import itertools
import weakref

import cases
import numpy as np
import pytest
import test_kernels

from mambacupy import (
    SelectiveScanSaved,
    causal_conv1d,
    checks,
    checks_conv,
    kernels,
    selective_scan,
    selective_scan_bwd,
    selective_scan_fwd,
    selective_state_update,
)
from mambacupy.ops import plans
from mambacupy.ops.norm import rms_norm_fwd
from mambacupy.ops.scan_constants import scan_constants

cupy = pytest.importorskip("cupy", reason="the arrays are CuPy's")


@pytest.fixture
def launched(monkeypatch):
    """Launches, one after the other."""
    recorder = test_kernels.record(monkeypatch)
    addresses = itertools.count(2**40, 2**30)

    def alloc(size):
        memory = cupy.cuda.UnownedMemory(next(addresses), size, None, device_id=0)
        return cupy.cuda.MemoryPointer(memory, 0)

    monkeypatch.setattr(kernels, "address", lambda x: 0 if x is None else x.data.ptr)
    monkeypatch.setattr(kernels, "addresses", list)  # so that a record shows which arrays they are of
    monkeypatch.setattr(kernels, "device_of", lambda x: contextlib.nullcontext())
    with cupy.cuda.using_allocator(alloc):
        yield recorder.launched


def on_gpu(x, device=0, offset=0):
    """An array like x, of which nothing can be read."""
    memory = cupy.cuda.UnownedMemory(2**40 + offset, x.nbytes + 64, None, device_id=device)
    return cupy.ndarray(x.shape, x.dtype, cupy.cuda.MemoryPointer(memory, 0), x.strides)


def make(**changes):
    arguments, options = cases.make(**changes)
    return {name: None if x is None else on_gpu(x) for name, x in arguments.items()} | options


@pytest.fixture
def unchecked(monkeypatch):
    """Turns the gate into an error."""

    def forbid():
        def fail(*args):
            raise AssertionError("checked again")

        monkeypatch.setattr(checks, "selective_scan", fail)
        monkeypatch.setattr(checks, "selective_scan_bwd", fail)

    return forbid


def test_a_call_of_the_same_kind_is_neither_checked_nor_planned_again(launched, unchecked):
    first, second = make(), make()
    y, last_state, saved = selective_scan_fwd(**first)
    selective_scan_bwd(y, saved, last_state)
    kernels_of_first = [launch[:-1] for launch in launched]
    launched.clear()
    unchecked()
    y, last_state, saved = selective_scan_fwd(**second)
    grads = selective_scan_bwd(y, saved, last_state)
    assert [launch[:-1] for launch in launched] == kernels_of_first
    of = {name: arrays for _, name, *_, arrays in launched}
    forward, backward = of["selective_scan_fwd"], of["selective_scan_bwd"]
    assert all(forward[name] is second[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"))
    assert forward["y"] == y.data.ptr and forward["states"] == saved.states.data.ptr
    assert backward["states"] is saved.states and backward["dy"] is y and backward["du"] == grads.u.data.ptr
    for name, x in grads._asdict().items():
        like = second[name]
        assert (x.shape, x.dtype, x.strides) == (like.shape, like.dtype, like.strides), name


CHANGES = {
    "dtype": ("z", lambda x: on_gpu(np.empty(x.shape, np.float64)), TypeError, "z is float64, wanted float32"),
    "shape": ("delta", lambda x: x[..., :-1], ValueError, "delta has shape"),
    "library": ("C", lambda x: np.empty(x.shape, x.dtype), TypeError, "NumPy and CuPy arrays are mixed"),
    "bfloat16 library": ("C", lambda x: np.empty(x.shape, cases.DTYPES["bfloat16"]), TypeError, "arrays are mixed"),
    "list": ("D", lambda x: [1.0] * 24, TypeError, "D is of type list"),
    "device": ("A", lambda x: on_gpu(x, device=1), TypeError, "arrays are on different GPUs"),
    "missing": ("B", lambda x: None, TypeError, "B is None"),
    "option": ("discretization", lambda x: "exact", ValueError, "discretization is 'exact'"),
    "no key": ("discretization", lambda x: ["zoh"], ValueError, r"discretization is \['zoh'\]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_kind_is_checked(launched, change):
    name, to, error, message = CHANGES[change]
    arguments = make()
    selective_scan(**arguments)
    with pytest.raises(error, match=f"^selective_scan: .*{message}"):
        selective_scan(**arguments | {name: to(arguments[name])})


def test_gradients_of_another_kind_are_checked(launched):
    y, last_state, saved = selective_scan_fwd(**make())
    selective_scan_bwd(y, saved, last_state)
    with pytest.raises(TypeError, match="dy is None"):
        selective_scan_bwd(None, saved, last_state)
    with pytest.raises(ValueError, match="dlast_state has shape"):
        selective_scan_bwd(y, saved, last_state[:1])
    with pytest.raises(TypeError, match="wanted the third result of selective_scan_fwd"):
        selective_scan_bwd(y, (y, last_state, saved))


def test_what_was_saved_is_not_looked_at_again(launched, monkeypatch):
    y, last_state, saved = selective_scan_fwd(**make())
    selective_scan_bwd(y, saved, last_state)
    looked_at, kind = [], plans._kind
    monkeypatch.setattr(plans, "_kind", lambda x: looked_at.append(x) or kind(x))
    selective_scan_bwd(y, saved, last_state)
    assert [id(x) for x in looked_at] == [id(y), id(last_state)]


def test_a_shape_changed_in_place_is_noticed(launched):
    y, last_state, saved = selective_scan_fwd(**make())
    selective_scan_bwd(y, saved, last_state)
    batch, dim, length = saved.u.shape
    saved.u.shape = (batch, length, dim)
    with pytest.raises(ValueError, match="selective_scan_bwd: "):
        selective_scan_bwd(y, saved, last_state)


OTHERS = {
    "replaced": lambda saved: saved._replace(reverse=saved.reverse),
    "built": lambda saved: SelectiveScanSaved(*saved),
    "copied": copy.copy,
}


@pytest.mark.parametrize("made", OTHERS)
def test_what_else_is_saved_is_looked_at(launched, made):
    y, last_state, saved = selective_scan_fwd(**make())
    launched.clear()
    selective_scan_bwd(y, saved, last_state)
    launches_of_first = [launch[:-1] for launch in launched]
    launched.clear()
    other = OTHERS[made](saved)
    assert type(other) is SelectiveScanSaved and all(one is two for one, two in zip(saved, other, strict=True))
    selective_scan_bwd(y, other, last_state)
    assert repr([launch[:-1] for launch in launched]) == repr(launches_of_first)
    other = OTHERS[made](other._replace(A=on_gpu(np.empty((24, 17), np.float32))))
    with pytest.raises(ValueError, match=r"saved\.states has shape"):
        selective_scan_bwd(y, other)


def test_plans_depend_on_alignment_strides_and_options(launched):
    arguments = make(dtype="bfloat16", length=64)
    changes = [{}, {"u": on_gpu(np.empty((2, 24, 64), arguments["u"].dtype), offset=2)}, {"reverse": True}]
    changes += [{"delta_softplus": False}, {"discretization": "zoh"}, {"z": None}]
    changes += [make(dtype="bfloat16", length=64, order="channel")]
    for change in changes:
        selective_scan(**arguments | change)
    assert len({repr(launch[:-1]) for launch in launched}) == len(changes)
    assert dict(launched[0][2])["ACCESS"] == 8 and dict(launched[1][2])["ACCESS"] == 1


def test_a_step_of_the_same_kind_is_not_checked_again(launched, monkeypatch):
    x, state, A, B = (on_gpu(np.empty(shape, np.float32)) for shape in ((2, 24), (2, 24, 16), (24, 16), (2, 16)))
    selective_state_update(state, x, x, A, B, B)
    monkeypatch.setattr(checks_conv, "selective_state_update", None)
    y = selective_state_update(state, x, x, A, B, B)
    assert len(launched) == 2 and launched[1][-1]["y"] is y and launched[1][-1]["B"] is B


def operations_of_a_layer():
    """Calls of one array, by name; and the name of that array in the launch."""
    weight, bias, row = (on_gpu(np.empty(shape, np.float32)) for shape in ((24, 4), 24, 64))
    D = on_gpu(np.empty(24, np.float16))
    yield "convolution", lambda x: causal_conv1d(x, weight, bias), "x", (2, 24, 64)
    yield "norm", lambda x: rms_norm_fwd(x, row), "x", (2, 24, 64)
    yield "constants", lambda x: scan_constants(x, D, D, np.dtype(np.float32)), "A_log", (24, 16)


def test_operations_of_a_layer_are_planned_once_and_take_the_arrays_that_come(launched, monkeypatch):
    for name, call, place, shape in operations_of_a_layer():
        launched.clear()
        first, second = (on_gpu(np.empty(shape, np.float32)) for _ in range(2))
        call(first)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "get", None)
            y = call(second)
        y = y[0] if isinstance(y, tuple) else y
        assert launched[0][:-1] == launched[1][:-1] and launched[1][-1][place] is second, name
        at = launched[1][-1].get("A" if name == "constants" else "y")
        assert at is y or at == y.data.ptr, name


@pytest.mark.parametrize("together", [0, plans.TOGETHER])
def test_small_gradients_share_an_allocation_but_those_of_parameters_are_apart(launched, monkeypatch, together):
    monkeypatch.setattr(plans, "TOGETHER", together)
    y, last_state, saved = selective_scan_fwd(**make())
    grads = selective_scan_bwd(y, saved, last_state)
    allocated = {name: x.data.mem.ptr for name, x in grads._asdict().items()}
    parameters = {allocated.pop(name) for name in ("A", "D", "delta_bias")}
    others = set(allocated.values())
    assert (len(parameters), len(others)) == ((1, 1) if together else (3, 6))
    assert len({x.data.mem.ptr for x in (y, last_state, saved.states)} | parameters | others) == 3 + len(parameters | others)
    ends = sorted((x.data.ptr, x.data.ptr + x.nbytes) for x in grads)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def test_what_is_remembered_keeps_no_array(launched):
    arguments = make()
    y, last_state, saved = selective_scan_fwd(**arguments)
    grads = selective_scan_bwd(y, saved)
    arrays = [weakref.ref(x) for x in (*arguments.values(), y, last_state, *saved, *grads) if isinstance(x, cupy.ndarray)]
    assert plans._plans
    del arguments, y, last_state, saved, grads
    launched.clear()
    gc.collect()
    assert [x() for x in arrays if x() is not None] == []
