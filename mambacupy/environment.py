"""What this machine has for running kernels, what is missing, and the one command that mends it."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import numpy as np


def cupy_builds():
    """Names and versions of the installed distributions that provide `cupy`; more than one is a fault."""
    builds = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name == "cupy" or name.startswith("cupy-cuda") or name.startswith("cupy-rocm"):
            builds[name] = distribution.version
    return dict(sorted(builds.items()))


def explain_missing():
    """Why kernels cannot run here, with the command that mends it; None if they can.

    Looks in the order in which things are needed: one CuPy build, importable; a driver; a device; NVRTC.
    """
    builds = cupy_builds()
    if len(builds) > 1:
        return (
            f"several CuPy builds are installed and overwrite each other: {', '.join(builds)}; keep one: "
            f'pip uninstall -y {" ".join(builds)} && pip install "mambacupy[cuda12]" (or [cuda13], as your driver has it)'
        )
    if importlib.util.find_spec("cupy") is None:
        return 'CuPy is not installed: pip install "mambacupy[cuda12]" (or [cuda13], as your driver has it)'
    try:
        import cupy
    except Exception as error:
        return f"CuPy does not import ({_first_line(error)}): pip install --force-reinstall {next(iter(builds), 'cupy')}"
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return (
            f"no usable NVIDIA driver ({_first_line(error)}): install the driver for your GPU, and check that "
            "`nvidia-smi` lists it"
        )
    if devices == 0:
        return "the driver sees no GPU: check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        return f"NVRTC, CUDA's run-time compiler, is missing ({_first_line(error)}): {headers_hint()}"
    return None


def explain_missing_products():
    """Why matrices cannot be multiplied on a GPU, with the command that mends it; None if they can.

    The scan multiplies none. Asked after `explain_missing`, which is needed for both.
    """
    import cupy

    try:
        importlib.import_module("cupy.cublas")
    except Exception as error:
        return (
            f"cuBLAS, which multiplies matrices, is missing ({_first_line(error)}): "
            f'pip install "cuda-toolkit[cublas]=={cupy.cuda.runtime.runtimeGetVersion() // 1000}.*"'
        )
    return None


def headers_hint():
    """The command that installs NVRTC and CUDA's headers for the CuPy that is there."""
    import cupy

    return f'pip install "cuda-toolkit[cudart,nvrtc]=={cupy.cuda.runtime.runtimeGetVersion() // 1000}.*"'


def report():
    """Facts about this installation, as plain values: what `mambacupy info` prints."""
    missing = explain_missing()
    facts = {
        "mambacupy": importlib.metadata.version("mambacupy") if _installed("mambacupy") else "from a checkout",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cupy_builds": cupy_builds(),
        "missing": missing,
        "missing_for_models": None,
        "devices": [],
        "cuda_driver": None,
        "cuda_runtime": None,
        "nvrtc": None,
        "cuda_headers": None,
        "kernel_cache": str(_cache_folder()),
        "kernel_cache_bytes": _try(lambda: _folder_size(_cache_folder())) or 0,
    }
    if len(facts["cupy_builds"]) == 0 and importlib.util.find_spec("cupy") is None:
        return facts
    try:
        import cupy
    except Exception:
        return facts
    facts["cupy"] = cupy.__version__
    facts["cuda_runtime"] = _try(cupy.cuda.runtime.runtimeGetVersion)
    facts["cuda_driver"] = _try(cupy.cuda.runtime.driverGetVersion) or None
    facts["nvrtc"] = _try(lambda: ".".join(map(str, cupy.cuda.nvrtc.getVersion())))
    facts["cuda_headers"] = _try(_header_folder)
    if missing is None:
        facts["missing_for_models"] = explain_missing_products()
    for index in range(_try(cupy.cuda.runtime.getDeviceCount) or 0):
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        facts["devices"].append(
            {
                "id": index,
                "name": properties["name"].decode(),
                "compute_capability": f"{properties['major']}.{properties['minor']}",
                "memory_bytes": properties["totalGlobalMem"],
                "multiprocessors": properties["multiProcessorCount"],
            }
        )
    return facts


def _header_folder():
    """Folder of the CUDA headers that CuPy's own kernels include; ours need none."""
    from cuda.pathfinder import find_nvidia_header_directory

    return find_nvidia_header_directory("cudart")


def _installed(name):
    return any(True for _ in importlib.metadata.distributions(name=name))


def _try(call):
    try:
        return call()
    except Exception:
        return None


def _first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _cache_folder():
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def _folder_size(folder):
    return sum(f.stat().st_size for f in folder.glob("*") if f.is_file()) if folder.is_dir() else 0
