"""The runtime that needs no GPU: sources, parameters, and every kernel of the tests compiled for every architecture."""

import re
import shutil

import cases
import numpy as np
import pytest

from mambacupy import checks, kernels
from mambacupy.ops import selective_scan as op


@pytest.fixture
def launched(monkeypatch):
    """Kernels that a call would compile and launch: (file, name, constants). Nothing runs."""
    seen = []

    def get(file, name, constants):
        seen.append((file, name, tuple(constants.items())))
        return lambda blocks, threads, params: seen.append((blocks, threads, params))

    monkeypatch.setattr(kernels, "get", get)
    monkeypatch.setattr(kernels, "address", lambda x: 0 if x is None else x.__array_interface__["data"][0])
    return seen


def forward(arguments, options):
    args = checks.selective_scan("test", **arguments, discretization=options["discretization"])
    op._launch(args, options["delta_softplus"], options["reverse"], True)


def instantiations():
    """Every forward kernel that the rows of the GPU tests need."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        launches = []
        patch.setattr(kernels, "get", lambda file, name, constants: launches.append((file, constants)) or (lambda *_: None))
        patch.setattr(kernels, "address", lambda x: 0 if x is None else x.__array_interface__["data"][0])
        for row, changes in cases.ROWS.items():
            launches.clear()
            forward(*cases.make(**changes))
            file, constants = launches[0]
            found.setdefault((file, tuple(constants.items())), row)
    return [pytest.param(file, dict(constants), id=row) for (file, constants), row in found.items()]


@pytest.mark.parametrize(("file", "constants"), instantiations())
def test_compiles_for_every_architecture_without_spills(file, constants, request):
    pytest.importorskip("cupy", reason="the compile tests need CuPy and NVRTC (the extra `test`)")
    source = kernels.specialise(file, constants)
    # All architectures for the base case; the rest on the oldest, the one we measure on, and the newest.
    every = request.node.callspec.id == "base"
    for architecture in kernels.ARCHITECTURES if every else ("75", "90", "120"):
        _, log = kernels.compile_for(architecture, source)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
        assert registers and max(registers) <= 255
        shared = [int(n) for n in re.findall(r"(\d+) bytes smem", log)]
        assert max(shared, default=0) <= 48 * 1024, "more needs an opt-in that we do not make"
        if constants["LANES"] * constants["SLOTS"] <= 16 and constants["U_T"] != "double":
            assert max(spills) == 0, f"sm_{architecture} spills"


def test_parameters_are_passed_by_the_names_of_the_struct(launched):
    forward(*cases.make())
    (file, _, constants), (_, _, params) = launched
    names = kernels.parameter_names(kernels.specialise(file, dict(constants)))
    assert set(names) == set(params) | {"first_block"}


def test_a_block_never_crosses_a_group_border(launched):
    forward(*cases.make(dim=24, B=4, C=6))
    blocks, _, params = launched[1]
    assert params["span"] == 2  # groups of 6 and of 4 channels
    assert blocks == 2 * 24 // 2


@pytest.fixture
def sources(tmp_path, monkeypatch):
    copy = tmp_path / "cuda_src"
    shutil.copytree(kernels.source_folder(), copy)
    monkeypatch.setattr(kernels, "source_folder", lambda: copy)
    return copy


def test_a_changed_header_changes_the_text_and_the_digest(sources):
    text, digest = kernels.specialise("selective_scan_fwd.cu", {}), kernels.digest()
    header = sources / "common.cuh"
    header.write_text(header.read_text() + "\n// changed\n")
    assert kernels.specialise("selective_scan_fwd.cu", {}) != text  # the disk cache hashes this text
    assert kernels.digest() != digest


def test_compile_errors_name_our_file_and_line(sources):
    pytest.importorskip("cupy")
    kernel = sources / "selective_scan_fwd.cu"
    lines = kernel.read_text().splitlines()
    kernel.write_text("\n".join([*lines, "this is no C++;"]))
    launches = instantiations()[0].values[1]
    with pytest.raises(RuntimeError, match=rf"selective_scan_fwd\.cu\({len(lines) + 1}\)"):
        kernels.compile_for("90", kernels.specialise("selective_scan_fwd.cu", launches))


def test_packed_arguments_follow_the_struct():
    source = "struct Params {\n    const float *u, *z;   // of which one may be null\n    long long dim;\n    void* y;\n};\n"
    assert kernels.parameter_names(source) == ("u", "z", "dim", "y")


def test_grid_axes_hold_any_number_of_blocks(monkeypatch):
    calls = []
    kernel = kernels.Kernel.__new__(kernels.Kernel)
    kernel.names, kernel._type = ("first_block",), np.dtype((np.void, 8))
    kernel._pack = __import__("struct").Struct("1q").pack
    kernel._raw = lambda grid, block, args: calls.append((grid, int(args[0].view(np.int64)[0])))
    kernel(2**31 + 9, 128, {})
    assert calls == [((2**31 - 1,), 0), ((10,), 2**31 - 1)]
