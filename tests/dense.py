"""What the tests of norms, linear maps and losses share: errors, and kernels recorded instead of launched."""

import re
from types import SimpleNamespace

import cases
import emulator
import numpy as np
import pytest

from mambacupy import kernels
from mambacupy.ops import plans

DTYPES = cases.DTYPES

STORED = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-6, "float64": 1e-13}
"""Relative error in the 2-norm of a result by the dtype it is stored in: one rounding, and float32 arithmetic before it."""


def normal(seed, *shape, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def wide(x):
    return None if x is None else x.astype(np.float64)


def errors(got, wanted, least=None):
    """Fields of two tuples that differ by more than their dtype explains, with their errors.

    `least`: the dtype of a result in between, from which others follow.
    """
    wrong = {}
    for name in wanted._fields:
        one, two = getattr(got, name), getattr(wanted, name)
        if one is None or two is None:
            assert one is None, name
            continue
        assert one.shape == two.shape, name
        one = one.get() if hasattr(one, "get") else one
        error = cases.relative_error(one, two)
        if not error <= max(STORED[one.dtype.name], STORED.get(least, 0)):
            wrong[name] = error
    return wrong


def record(patch):
    """Let kernels be recorded: a list of (file, name, constants, blocks, threads, numbers, arrays)."""
    launched = []

    def get(file, name, constants, shared_bytes=0):
        def prepare(blocks, threads, numbers, order=None):
            def launch(given):
                launched.append((file, name, constants, blocks, threads, numbers, emulator.by_name(given, order)))

            return launch

        return SimpleNamespace(prepare=prepare)

    patch.setattr(plans, "_plans", {})
    patch.setattr(kernels, "get", get)
    patch.setattr(kernels, "device", lambda: kernels.Device(132, 232448, 233472))
    patch.setattr(kernels, "address", lambda x: 0)  # what a GPU allocates is aligned
    patch.setattr(kernels, "addresses", list)
    return launched


def instantiations(run, rows):
    """Parameters (file, constants) of every kernel that `run(row)` launches for some row, with the first row's name."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        launched = record(patch)
        for row in rows:
            launched.clear()
            run(row)
            for file, _, constants, *_ in launched:
                if file != "sum_parts.cu":
                    found.setdefault((file, tuple(constants.items())), row)
    return [
        pytest.param(file, dict(constants), id=f"{file}-{row}-{i}") for i, ((file, constants), row) in enumerate(found.items())
    ]


def compiles(file, constants, architectures=("75", "90", "120")):
    """Compile; nothing may spill."""
    pytest.importorskip("cupy", reason="the compile tests need CuPy and NVRTC (the extra `test`)")
    source = kernels.specialise(file, constants)
    for architecture in architectures:
        _, log = kernels.compile_for(architecture, source)
        assert re.findall(r"Used \d+ registers", log)
        # Functions of doubles may call for a stack; arrays that should be registers must not.
        local = "(?:stack|spill)" if constants.get("REAL", "float") == "float" else "spill"
        assert not any(map(int, re.findall(rf"(\d+) bytes {local}", log))), f"sm_{architecture}: {log}"


def check_launches(launched, *names):
    """Each launch gets what the struct of its kernel names, in arrays that hold what the kernel takes them for."""
    assert {name for _, name, *_ in launched} == set(names)
    for file, name, constants, blocks, threads, numbers, arrays in launched:
        source = kernels.specialise(file, constants)
        assert f" {name}(const Params p)" in source
        pointers, wanted = kernels.parameter_names(source)
        assert set(pointers) == set(arrays) and set(wanted) == set(numbers) | {"first_block"}
        assert blocks > 0 and threads in (128, 256, 512, 1024)
        for member, x in arrays.items():
            member = member if re.search(rf"\b{member}\b", source) else member.rstrip("0123456789")  # parts0 of parts[5]
            kind = re.search(rf"(\w+)(?: |\*)[^;]*?\b{member}\b", source[source.index("struct Params") :].split("};")[0])[1]
            kind = constants.get("REAL" if kind == "real" else kind, kind)
            if x is not None and type(x) is not int and kind in kernels.C_TYPES.values():
                assert kernels.C_TYPES[x.dtype.name] == kind, (name, member)
