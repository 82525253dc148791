"""What `mambacupy info` finds is what is installed; each thing that can be missing is named with the command that mends it."""

import importlib.machinery
import json
import sys
import types

import numpy as np
import pytest

from mambacupy import arrays, checks_dense, environment
from mambacupy.cli import main


@pytest.fixture
def builds(monkeypatch):
    """Function that sets which CuPy builds are installed."""
    return lambda **found: monkeypatch.setattr(environment, "cupy_builds", lambda: found)


class CUDARuntimeError(RuntimeError):
    pass


def raising(error):
    def call(*_):
        raise error

    return call


@pytest.fixture
def cupy(monkeypatch, builds):
    """A CuPy with one GPU, for tests to take parts away from."""
    builds(**{"cupy-cuda12x": "14.0.1"})
    module = types.ModuleType("cupy")
    module.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    module.__version__ = "14.0.1"
    properties = {"name": b"NVIDIA H200", "major": 9, "minor": 0, "totalGlobalMem": 2**37, "multiProcessorCount": 132}
    runtime = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda device: properties,
        runtimeGetVersion=lambda: 12090,
        driverGetVersion=lambda: 13000,
    )
    module.cuda = types.SimpleNamespace(runtime=runtime, nvrtc=types.SimpleNamespace(getVersion=lambda: (12, 9)))
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(sys.modules, "cupy.cublas", types.ModuleType("cupy.cublas"))
    monkeypatch.setattr(environment, "_header_folder", lambda: "include")
    return module


def info(capsys, *options):
    with pytest.raises(SystemExit) as stop:
        main(["info", *options])
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    return out


def test_builds_are_found_by_their_metadata(tmp_path, monkeypatch):
    for name, version in (("cupy_cuda11x", "13.6.0"), ("cupy_cuda12x", "14.0.1"), ("cupyx_helper", "1.0")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
    (tmp_path / "broken-1.0.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert environment.cupy_builds() == {"cupy-cuda11x": "13.6.0", "cupy-cuda12x": "14.0.1"}


def test_nothing_is_missing_beside_a_gpu(cupy, capsys):
    assert environment.explain_missing() is None
    out = info(capsys)
    assert "cuda:0: NVIDIA H200, compute capability 9.0, 128.0 GiB, 132 multiprocessors" in out
    assert "driver 13.0, runtime 12.9, NVRTC 12.9" in out
    assert "Nothing is missing" in out


def test_several_builds(builds, capsys):
    builds(**{"cupy-cuda11x": "13.6.0", "cupy-cuda12x": "14.0.1"})
    missing = environment.explain_missing()
    assert "several CuPy builds" in missing
    assert 'pip uninstall -y cupy-cuda11x cupy-cuda12x && pip install "mambacupy[cuda12]"' in missing
    assert missing in info(capsys)


def test_not_installed(builds, monkeypatch, capsys):
    builds()
    monkeypatch.setitem(sys.modules, "cupy", None)
    missing = environment.explain_missing()
    assert missing.startswith("CuPy is not installed: pip install ")
    out = info(capsys)
    assert missing in out and "CuPy build: none" in out and "driver none, runtime none, NVRTC none" in out


def test_does_not_import(tmp_path, builds, monkeypatch, capsys):
    builds(**{"cupy-cuda12x": "14.0.1"})
    (tmp_path / "cupy.py").write_text("raise ImportError('libcublas.so.12: cannot open\\nand more')")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    missing = environment.explain_missing()
    assert "(ImportError: libcublas.so.12: cannot open): pip install --force-reinstall cupy-cuda12x" in missing
    assert missing in info(capsys)


def test_no_driver(cupy, capsys):
    cupy.cuda.runtime.getDeviceCount = raising(CUDARuntimeError("cudaErrorInsufficientDriver"))
    cupy.cuda.runtime.driverGetVersion = lambda: 0
    missing = environment.explain_missing()
    assert "driver" in missing and "cudaErrorInsufficientDriver" in missing and "nvidia-smi" in missing
    out = info(capsys)
    assert missing in out and "driver none, runtime 12.9" in out


def test_no_gpu_that_the_driver_sees(cupy):
    cupy.cuda.runtime.getDeviceCount = lambda: 0
    assert "CUDA_VISIBLE_DEVICES" in environment.explain_missing()


def test_no_nvrtc(cupy, capsys):
    cupy.cuda.nvrtc.getVersion = raising(RuntimeError("libnvrtc.so.12"))
    missing = environment.explain_missing()
    assert "NVRTC" in missing and 'pip install "cuda-toolkit[cudart,nvrtc]==12.*"' in missing
    assert "NVRTC none" in info(capsys)


def test_no_cublas(cupy, monkeypatch, capsys):
    """The scan runs, and models do not: both are said."""
    monkeypatch.setitem(sys.modules, "cupy.cublas", None)
    missing = environment.explain_missing_products()
    assert environment.explain_missing() is None
    assert "cuBLAS" in missing and 'pip install "cuda-toolkit[cublas]==12.*"' in missing
    out = info(capsys)
    assert missing in out and "models only on the CPU" in out and "Nothing is missing" not in out
    assert json.loads(info(capsys, "--json"))["missing_for_models"] == missing


def test_a_product_without_cublas_says_so(cupy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy.cublas", None)
    monkeypatch.setattr(arrays, "namespace", lambda *_, **__: cupy)
    checks_dense._check_products.cache_clear()
    x, weight = np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32)
    with pytest.raises(RuntimeError, match=r'linear_fwd: cuBLAS.* is missing .*: pip install "cuda-toolkit\[cublas\]==12'):
        checks_dense.linear("linear_fwd", x, weight, None)
    monkeypatch.setitem(sys.modules, "cupy.cublas", types.ModuleType("cupy.cublas"))
    assert checks_dense.linear("linear_fwd", x, weight, None) is cupy
    checks_dense._check_products.cache_clear()


def test_info_here_says_the_same_as_text_and_json(capsys):
    """With whatever this machine has or lacks."""
    facts = json.loads(info(capsys, "--json"))
    text = info(capsys)
    assert facts["missing"] == environment.explain_missing()
    assert (facts["missing"] or "Nothing is missing") in text
    assert facts["numpy"] in text and facts["kernel_cache"] in text
    assert len(facts["devices"]) == sum(line.startswith("cuda:") for line in text.splitlines())


def test_a_cache_that_cannot_be_looked_into(cupy, monkeypatch, capsys):
    monkeypatch.setenv("CUPY_CACHE_DIR", "x" * 300)  # no file may have such a name
    assert json.loads(info(capsys, "--json"))["kernel_cache_bytes"] == 0
