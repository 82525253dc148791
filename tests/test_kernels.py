"""The runtime that needs no GPU: sources, parameters, and every kernel of the tests compiled for every architecture."""

import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cases
import emulator
import pytest
import scans

from mambacupy import kernels
from mambacupy.ops import plans

DEVICES = {
    "75": kernels.Device(multiprocessors=40, shared_bytes=65536, shared_bytes_of_multiprocessor=65536),
    "86": kernels.Device(multiprocessors=28, shared_bytes=101376, shared_bytes_of_multiprocessor=102400),
    "90": kernels.Device(multiprocessors=132, shared_bytes=232448, shared_bytes_of_multiprocessor=233472),
    "120": kernels.Device(170, shared_bytes=101376, shared_bytes_of_multiprocessor=102400, overlaps=True),
}


SMALL = kernels.Device(multiprocessors=4, shared_bytes=65536, shared_bytes_of_multiprocessor=65536)


class Recorder:
    """Stands in for `kernels.get`: keeps what would be compiled and launched. Nothing runs."""

    def __init__(self):
        self.compiled, self.launched, self.shared_bytes = [], [], {}

    def __call__(self, file, name, constants, shared_bytes=0):
        kernel = (file, name, tuple(constants.items()))
        self.compiled.append(kernel)
        self.shared_bytes[kernel] = shared_bytes

        def prepare(blocks, threads, numbers, overlap=False, order=None):
            return lambda given: self.launched.append((*kernel, blocks, threads, numbers, emulator.by_name(given, order)))

        return SimpleNamespace(prepare=prepare)


@pytest.fixture
def recorder(monkeypatch):
    return record(monkeypatch)


def record(patch, architecture="90"):
    recorder = Recorder()
    patch.setattr(kernels, "get", recorder)
    patch.setattr(kernels, "device", lambda: DEVICES[architecture])
    patch.setattr(kernels, "address", emulator.address)
    patch.setattr(kernels, "addresses", lambda arrays: list(map(emulator.address, arrays)))
    patch.setattr(plans, "_plans", {})
    return recorder


def scan(arguments, options):
    """Both directions."""
    emulator.scan(arguments, options, *scans.incoming(arguments))


def instantiations():
    """Every kernel that the rows of the GPU tests need, with the name of the first row that needs it."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        kinds = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "complex": {"complex": True}}
        parts = {f"parts of time, {kind}": {"length": 520} | changes for kind, changes in kinds.items()}
        alone = {
            f"alone on a multiprocessor, {dtype}, {order}": {"batch": 1, "dim": dim, "dtype": dtype, "order": order}
            for dtype, dim in (("float32", 4096), ("bfloat16", 5120))
            for order in ("length", "channel")
        }
        alone["alone on a multiprocessor, odd length"] = {"batch": 1, "dim": 5120, "length": 129, "dtype": "bfloat16"}
        for rows, device, suffix in (
            (cases.ROWS, DEVICES["90"]._replace(multiprocessors=1), ""),
            ({row: cases.ROWS[row] for row in cases.FEW_CHANNELS}, DEVICES["90"], ", few channels"),
            (parts, DEVICES["90"], ""),
            (alone, DEVICES["90"], ""),
            ({row: changes | {"length": 2100} for row, changes in parts.items()}, SMALL, ", apart"),
            (parts, DEVICES["90"]._replace(overlaps=True), ", overlapping"),
        ):
            recorder = record(patch)
            patch.setattr(kernels, "device", lambda device=device: device)
            for row, changes in rows.items():
                recorder.compiled.clear()
                scan(*cases.make(**changes))
                for file, _, constants in recorder.compiled:
                    found.setdefault((file, constants), row + suffix)
    return [pytest.param(file, dict(constants), id=f"{file}-{row}") for (file, constants), row in found.items()]


@pytest.mark.parametrize(("file", "constants"), instantiations())
def test_compiles_for_every_architecture_without_spills(file, constants, request):
    pytest.importorskip("cupy", reason="the compile tests need CuPy and NVRTC (the extra `test`)")
    source = kernels.specialise(file, constants)
    architectures = kernels.ARCHITECTURES
    if request.node.callspec.id.endswith("few channels"):  # three such blocks take more shared memory than others have
        architectures = ("80", "90", "100")
    if request.node.callspec.id.endswith("overlapping"):
        architectures = ("90", "100", "120")
    # The scan's kernels take seconds to compile: but for their base case, one architecture a row, each in its turn.
    if "scan_" in file and not request.node.callspec.id.endswith("-base") and not request.config.getoption("--compile-all"):
        architectures = (architectures[sum(file.encode() + repr(constants).encode()) % len(architectures)],)
    for architecture in architectures:
        _, log = kernels.compile_for(architecture, source)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
        shared = [int(n) for n in re.findall(r"(\d+) bytes smem", log)]
        assert registers and max(registers) <= 255
        assert max(shared, default=0) <= 48 * 1024, "more has to be dynamic"
        if constants.get("LANES", 1) * constants.get("SLOTS", 1) <= 16:
            assert max(spills) == 0, f"sm_{architecture} spills"


@pytest.mark.parametrize("architecture", DEVICES)
def test_blocks_fit_the_device(monkeypatch, architecture):
    """Shared memory as asked for is enough for the kernel, which asserts it, and no more than the device has."""
    pytest.importorskip("cupy")
    recorder = record(monkeypatch, architecture)
    for changes in cases.ROWS.values():
        scan(*cases.make(**(changes | {"dim": 264})))
    for (file, _, constants), shared_bytes in recorder.shared_bytes.items():
        assert shared_bytes <= DEVICES[architecture].shared_bytes
        source = kernels.specialise(file, dict(constants))
        kernels.compile_for(architecture, source[: source.index('extern "C" __global__')])


def test_launches_get_what_the_struct_names(recorder):
    scan(*cases.make(state=100, batch=1, dim=8, length=5000, B=2))
    names = [name for _, name, *_ in recorder.launched]
    assert {"selective_scan_fwd", "selective_scan_bwd", "combine_carries", "sum_parts"} == set(names)
    assert names.count("sum_parts") == 1
    for file, _, constants, _, _, numbers, arrays in recorder.launched:
        wanted_pointers, wanted_numbers = kernels.parameter_names(kernels.specialise(file, dict(constants)))
        assert set(wanted_pointers) <= set(arrays)
        assert set(wanted_numbers) <= set(numbers) | {"first_block"}


def test_a_block_never_crosses_a_group_border(recorder):
    scan(*cases.make(dim=24, B=4, C=6))
    *_, blocks, _, numbers, _ = recorder.launched[0]
    assert numbers["span"] == 2  # groups of 6 and of 4 channels
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


def test_arguments_follow_the_struct():
    source = "struct Params {\n    const float *u, *z;   // of which one may be null\n    void* y;\n    long long dim, n;\n};\n"
    assert kernels.parameter_names(source) == (("u", "z", "y"), ("dim", "n"))
    source = "struct Params {\n    float *x[2], *y;\n    long long n[3], m;\n};\n"
    assert kernels.parameter_names(source) == (("x0", "x1", "y"), ("n0", "n1", "n2", "m"))


def function(launch):
    """Stands in for a function of CuPy's: `launch` gets blocks, threads of each, and the struct."""
    return SimpleNamespace(
        linear_launch=lambda size, args, shared_mem, threads: launch(size // threads, threads, args[0])
    )  # fmt: skip


@pytest.fixture
def launches(monkeypatch):
    """A kernel without a GPU, given its pointers and numbers; and what it is launched with."""
    calls = []
    monkeypatch.setattr(kernels, "_by_value", lambda params: params)

    def make(pointers, numbers):
        kernel = kernels.Kernel.__new__(kernels.Kernel)
        kernel.pointers, kernel.numbers, kernel._shared_bytes = pointers, numbers, 0
        kernel._function = lambda: function(lambda *launch: calls.append((*launch[:2], launch[2].tolist())))
        return kernel

    return make, calls


def test_a_pointer_is_of_an_array_or_an_address_or_null(launches):
    make, calls = launches
    array = SimpleNamespace(data=SimpleNamespace(ptr=512))
    make(("x", "y", "z"), ("first_block",)).prepare(1, 32, {})({"x": array, "y": 528, "z": None})
    assert calls == [(1, 32, [512, 528, 0, 0])]


def test_addresses_come_in_an_order(launches):
    make, calls = launches
    make(("x", "y", "z"), ("first_block",)).prepare(1, 32, {}, order={"z": 0, "w": 1, "x": 3, "y": 0})([0, 512, 528, 544])
    assert calls == [(1, 32, [544, 0, 0, 0])]


def test_threads_launch_with_their_own_pointers(launches):
    make, _ = launches
    kernel, seen = make(("x",), ("first_block",)), []

    def run(blocks, threads, struct):
        time.sleep(0.001)  # where another thread may write
        seen.append((threading.get_ident(), struct[0]))

    kernel._function = lambda: function(run)
    launch, own = kernel.prepare(1, 32, {}), []

    def calls(address):
        for _ in range(20):
            own.append((threading.get_ident(), address))
            launch({"x": address})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(calls, range(4)))
    assert sorted(seen) == sorted(own)


def test_arrays_in_one_allocation_are_apart_and_aligned():
    starts, size = plans.room({"a": 1, "b": 256, "c": 257, "d": 0})
    assert starts == {"a": 0, "b": 256, "c": 512, "d": 1024} and size == 1024


def test_grids_hold_any_number_of_blocks(launches):
    make, calls = launches
    make((), ("n", "first_block")).prepare(2**31 + 9, 128, {"n": 3})({})
    assert calls == [(2**31 - 1, 128, [3, 0]), (10, 128, [3, 2**31 - 1])]
