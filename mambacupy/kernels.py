"""From a `.cu` file to a launched kernel: read, specialise, compile, cache, launch.

The only file that knows `cupy.RawModule` and NVRTC. A kernel file is one self-contained text: `#include` of our own headers
is expanded here, so CuPy's disk cache (which hashes the text it is given, but not what that text includes) recompiles when
a header changes, and no include path is needed. What changes a kernel's inner loop is a `#define` in front of that text.

A kernel file declares `struct Params`, whose members are all 8 bytes wide: first the pointers, then numbers (`long long`), of
which the last is `first_block`. A member `x[5]` is five, here called x0 to x4. A kernel takes the struct as its only argument,
and it is the single list of arguments: they are taken by name and packed in its order, the numbers once for every shape
(`Kernel.prepare`), the pointers at every launch.
"""

import contextlib
import functools
import hashlib
import operator
import re
import struct
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

OPTIONS = ("-std=c++17",)
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
"""Compute capabilities that the kernels are compiled for by the tests."""

C_TYPES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}
"""Element types by the names of their dtypes, as common.cuh calls them."""

MAX_BLOCKS = 2**31 - 1
"""Blocks in one launch along grid.x, the only grid axis we use."""


def source_folder():
    """Folder of the `.cu` files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if (folder / "common.cuh").is_file():
            return folder
    raise FileNotFoundError(
        f"mambacupy: no CUDA sources in {package / 'cuda_src'} or {package.parent / 'cuda_src'}; "
        "reinstall with `pip install --force-reinstall mambacupy`"
    )


def digest():
    """SHA-256 of all CUDA sources: names the kernels that a record was measured on."""
    content = hashlib.sha256()
    for path in sorted(source_folder().iterdir()):
        if path.suffix in (".cu", ".cuh"):
            content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()


def read_source(file):
    """Text of a kernel file with our headers in place; compile errors still name the file and line they stand in."""
    text = (source_folder() / file).read_text(encoding="utf-8")
    parts = [f'#line 1 "{file}"']
    for number, line in enumerate(text.splitlines(), 1):
        include = re.fullmatch(r'\s*#include "(\w+\.cuh)"\s*', line)
        if include:
            parts += [read_source(include[1]).replace("#pragma once\n", "\n"), f'#line {number + 1} "{file}"']
        else:
            parts.append(line)
    return "\n".join(parts) + "\n"


def specialise(file, constants):
    """Text handed to the compiler: one `#define` a constant, then the kernel."""
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + read_source(file)


def parameter_names(source):
    """Names of the members of `struct Params`, in order: of the pointers, and of the numbers after them."""
    body = re.search(r"struct Params \{(.*?)\n\};", source, re.DOTALL)[1]
    pointers, numbers = [], []
    for statement in re.sub(r"//.*", "", body).split(";"):
        if statement.strip():
            kind = pointers if "*" in statement else numbers
            for name in statement.split(","):
                name, count = re.search(r"(\w+)(?:\[(\d+)\])?\s*$", name).groups()
                kind += [name] if count is None else [f"{name}{i}" for i in range(int(count))]
    return tuple(pointers), tuple(numbers)


def compile_for(architecture, source):
    """Compile for an architecture such as "90" without a GPU.

    Returns
    -------
    (bytes, str)
        The machine code, and the assembler's report with registers and spills of each kernel.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, "mambacupy.cu", (), ())
    options = (*OPTIONS, "-ftz=true", "-default-device", f"-arch=sm_{architecture}", "--ptxas-options=-v")
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"sm_{architecture}: {error}\n{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)


def address(array):
    """Device pointer of an array as an integer; 0 for None."""
    return 0 if array is None else array.data.ptr


def addresses(arrays):
    """The address of each, in half the time."""
    return [0 if x is None else x.data.ptr for x in arrays]


_HERE = contextlib.nullcontext()


def device_of(array):
    """A context in which an array's device is the current one. Entering CuPy's own takes four times as long as asking."""
    import cupy

    return _HERE if array.data.device_id == cupy.cuda.runtime.getDevice() else array.device


def _by_value(params):
    """An array of numbers as CuPy takes a struct that is passed by value. A NumPy array of one struct would do too, and take
    as long to describe to CuPy as it takes to launch."""
    from cupy.cuda.function import CPointer

    return CPointer(params.ctypes.data)


def _picking(places):
    """What picks those out of a sequence."""
    return operator.itemgetter(*places) if len(places) > 1 else lambda given: (given[places[0]],)


class Kernel:
    """A compiled kernel. Compiles on its first launch on each device.

    Parameters
    ----------
    file, name : str
        The kernel `name` of `cuda_src/file`.
    constants : dict
        What it is specialised by.
    shared_bytes : int
        Dynamic shared memory of a block.
    """

    def __init__(self, file, name, constants, shared_bytes=0):
        import cupy

        source = specialise(file, constants)
        self.pointers, self.numbers = parameter_names(source)
        self._raw = cupy.RawModule(code=source, options=OPTIONS).get_function(name)
        self._shared_bytes = shared_bytes
        self._device, self._functions = cupy.cuda.runtime.getDevice, {}

    def prepare(self, blocks, threads, numbers, overlap=False, order=None):
        """All of a launch but its pointers.

        Parameters
        ----------
        blocks, threads : int
            Size of the grid (any; it is split where one launch cannot hold it) and of a block.
        numbers : dict
            Value of every number of `Params` but `first_block`.
        overlap : bool
            Let it begin while the kernel in front of it ends; `mambacupy.overlapping` says how.
        order : dict, optional
            For each pointer of `Params`, by name, where it stands among the addresses that the launch is given.

        Returns
        -------
        callable
            Launches on the current device and stream, without synchronising, given a dict with every pointer of `Params` by
            name: an array, an address in one, or None for a null pointer. With `order` it is given a sequence of addresses,
            which takes a third of the time.
        """
        names, shared_bytes = self.pointers, self._shared_bytes
        pick = order and _picking([order[name] for name in names])
        if overlap:
            from mambacupy.overlapping import overlapping
        grids = []
        for first in range(0, blocks, MAX_BLOCKS):
            values = numbers | {"first_block": first}
            params = np.array([0] * len(names) + [values[name] for name in self.numbers], np.int64)
            count = min(blocks - first, MAX_BLOCKS)
            overlapped = overlapping(count, threads, params, shared_bytes) if overlap else None
            grids.append((count, params, (_by_value(params),), overlapped))
        write, lock = struct.Struct(f"{len(names)}Q").pack_into, threading.Lock()

        def launch(given):
            if pick:
                pointers = pick(given)
            else:
                pointers = [0 if (x := given[name]) is None else x if type(x) is int else x.data.ptr for name in names]
            try:
                function = self._function()
                for count, params, argument, overlapped in grids:
                    with lock:  # another thread may be about to launch the same
                        write(params, 0, *pointers)
                        if overlapped:
                            overlapped(function)
                        else:  # which, told the threads in all, makes no tuples
                            function.linear_launch(count * threads, argument, shared_bytes, threads)
            except Exception as error:
                from mambacupy import environment  # whose imports take as long as all others of `import mambacupy`

                missing = environment.explain_missing()
                if missing is None:
                    raise
                raise RuntimeError(f"mambacupy: kernels cannot run here: {missing}") from error

        return launch

    def _function(self):
        """The kernel on the current device. More dynamic shared memory than 48 KiB is asked for, once on each."""
        device = self._device()
        function = self._functions.get(device)
        if function is None:
            if self._shared_bytes:
                self._raw.max_dynamic_shared_size_bytes = self._shared_bytes
            function = self._functions[device] = self._raw.kernel
        return function


@functools.cache
def _kernel(file, name, constants, shared_bytes):
    return Kernel(file, name, dict(constants), shared_bytes)


def get(file, name, constants, shared_bytes=0):
    """The kernel of these arguments of `Kernel`; from memory where it was asked for before."""
    return _kernel(file, name, tuple(constants.items()), shared_bytes)


class Device(NamedTuple):
    """What the shape of a launch depends on."""

    multiprocessors: int
    shared_bytes: int  # that a block may have
    shared_bytes_of_multiprocessor: int
    overlaps: bool = False  # a launch may begin while the one in front of it ends


def device():
    """The current device."""
    import cupy

    return _device(cupy.cuda.runtime.getDevice())


@functools.cache
def _device(index):
    import cupy

    device = cupy.cuda.Device(index)
    attributes = device.attributes
    return Device(
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MaxSharedMemoryPerMultiprocessor"],
        int(device.compute_capability) >= 90,
    )
