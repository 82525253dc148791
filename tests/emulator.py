"""Run kernels of cuda_src/ without a GPU: the same text, compiled as C++ (emulator.h), the launch code on NumPy arrays.

Slow and serial, but exact in what it checks: indices, widths and alignment of accesses, masks, sums. Fresh memory is full of
NaN, so that what was not written shows.
"""

import ctypes
import functools
import hashlib
import struct
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from mambacupy import checks, kernels
from mambacupy.ops import plans, scan_kernels
from mambacupy.reference import SelectiveScanSaved

H100 = kernels.Device(multiprocessors=132, shared_bytes=232448, shared_bytes_of_multiprocessor=233472)
FULL = H100._replace(multiprocessors=1)  # a GPU that every case fills

BLOCKS = """
static const Params* params;
static void run_thread() {
    %(kernel)s(*params);
    done[current] = true;
    swapcontext(&fibers[current], &scheduler);
}
extern "C" void run(const Params* given, long long blocks, int threads_of_a_block) {
    params = given;
    threads = threads_of_a_block;
    for (long long block = 0; block < blocks; ++block) {
        blockIdx.x = (unsigned)block;
        for (int t = 0; t < threads; ++t) {
            done[t] = false;
            getcontext(&fibers[t]);
            fibers[t].uc_stack.ss_sp = stacks[t];
            fibers[t].uc_stack.ss_size = STACK_BYTES;
            makecontext(&fibers[t], run_thread, 0);
        }
        for (int running = threads; running > 0;) {
            running = 0;
            for (current = 0; current < threads; ++current) {
                if (done[current]) continue;
                threadIdx.x = current;
                ++running;
                swapcontext(&scheduler, &fibers[current]);
            }
        }
    }
}
"""

REPLACED = {
    "return exp2f(x);": "return exp2_of_hardware(x);",
    # An access of several elements must be aligned, as a GPU demands.
    "if (exists) pack = *reinterpret_cast<const Pack<T, COUNT>*>(from);": "if (exists) { if ((size_t)from % sizeof(pack)) abort(); memcpy(&pack, from, sizeof pack); }",  # noqa: E501
    "pack = *reinterpret_cast<const Pack<T, COUNT>*>(from);": "if ((size_t)from % sizeof(pack)) abort(); memcpy(&pack, from, sizeof pack);",  # noqa: E501
    "*reinterpret_cast<Pack<T, COUNT>*>(to) = pack;": "if ((size_t)to % sizeof(pack)) abort(); memcpy(to, &pack, sizeof pack);",
    "extern __shared__ __align__(16) char shared_bytes[];": "alignas(16) static char shared_bytes[SHARED_BYTES];",
}


@functools.cache
def _library(file, name, constants):
    text = kernels.specialise(file, dict(constants))
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    text = (Path(__file__).parent / "emulator.h").read_text() + text + BLOCKS % {"kernel": name}
    folder = Path(tempfile.gettempdir()) / "mambacupy-emulated"
    folder.mkdir(exist_ok=True)
    library = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            source, built = Path(own) / "kernel.cpp", Path(own) / "kernel.so"
            source.write_text(text)
            options = ["-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-fPIC", "-shared"]
            subprocess.run(["g++", *options, "-o", built, source], check=True)
            built.rename(library)
    return ctypes.CDLL(str(library))


def get(file, name, constants, shared_bytes=0):
    """Stands in for `kernels.get`."""
    pointers, numbers = kernels.parameter_names(kernels.read_source(file))

    def prepare(blocks, threads, values, overlap=False, order=None):
        def launch(arrays):
            arrays = by_name(arrays, order)
            given = [(x, x if isinstance(x, int) else kernels.address(x)) for x in (arrays[pointer] for pointer in pointers)]
            for pointer, (x, address) in zip(pointers, given, strict=True):  # an element lies at a multiple of its size, as a
                assert address % getattr(x, "itemsize", 16) == 0, pointer  # GPU demands
            packed = struct.pack(f"{len(pointers)}Q", *(address for _, address in given))
            packed += struct.pack(f"{len(numbers)}q", *((values | {"first_block": 0})[number] for number in numbers))
            library = _library(file, name, tuple(constants.items()))
            library.run(ctypes.create_string_buffer(packed, len(packed)), ctypes.c_longlong(blocks), threads)

        return launch

    return SimpleNamespace(prepare=prepare)


def by_name(given, order):
    """What a launch is given, by name."""
    return given if order is None else {name: given[place] for name, place in order.items()}


class Address(int):
    """An address, and the size of the elements that lie there."""

    def __new__(cls, value, itemsize):
        made = super().__new__(cls, value)
        made.itemsize = itemsize
        return made

    def __add__(self, distance):
        return Address(int(self) + distance, self.itemsize)


def address(x):
    """Stands in for `kernels.address`, for NumPy arrays."""
    return 0 if x is None else Address(x.__array_interface__["data"][0], x.itemsize)


def install(monkeypatch, device=H100):
    """From here on kernels run here, on NumPy arrays."""
    monkeypatch.setattr(kernels, "get", get)
    monkeypatch.setattr(kernels, "device", lambda: device)
    monkeypatch.setattr(kernels, "address", address)
    monkeypatch.setattr(kernels, "addresses", lambda arrays: list(map(address, arrays)))
    monkeypatch.setattr(plans, "_plans", {})


class Pointer(NamedTuple):
    """Stands in for `cupy.cuda.MemoryPointer`."""

    room: np.ndarray
    start: int

    @property
    def ptr(self):
        return self.room.ctypes.data + self.start

    def __add__(self, offset):
        return Pointer(self.room, self.start + offset)


class Memory:
    """NumPy with fresh memory as CuPy's is: aligned, and of unknown content."""

    def __init__(self):
        self.cuda = SimpleNamespace(alloc=self._alloc)

    def __getattr__(self, name):
        return getattr(np, name)

    def _alloc(self, size):
        room = np.full(size + 512, 0xFF, np.uint8)  # NaN in every dtype
        return Pointer(room, -room.ctypes.data % 512)

    def ndarray(self, shape, dtype, memptr=None, strides=None):
        if memptr is None:
            memptr = self._alloc(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
        return np.ndarray(shape, dtype, memptr.room, memptr.start, strides)

    empty = ndarray


def scan(arguments, options, dy, dlast_state, calls=1):
    """(y, last_state, states), and the gradients, as CuPy arrays get them: by one plan for all calls. Results of the last."""
    args = checks.selective_scan("test", **arguments, discretization=options["discretization"])._replace(xp=Memory())
    direction = options["delta_softplus"], options["reverse"]
    forward = scan_kernels.plan_forward(args, *direction, True)
    backward = scan_kernels.plan_backward(args, *direction, dy, dlast_state, arguments["B"], arguments["C"])
    tensors = [arguments[name] for name in SelectiveScanSaved._fields[:9]]
    for _ in range(calls):
        results = scan_kernels.forward(forward, tensors)
        grads = scan_kernels.backward(backward, (*tensors, results[2], dy, dlast_state))
    return results, grads
