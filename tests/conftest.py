"""`gpu` marks tests that need a device. Without one they are skipped and say so; --require-gpu makes that a failure."""

import pytest


def _why_no_gpu():
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() > 0:
            return None
        return "no CUDA device"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail where a GPU test cannot run")
    parser.addoption("--compile-all", action="store_true", help="compile every kernel for every architecture, not only a few")
    parser.addoption("--emulate-all", action="store_true", help="run every case's kernels in the emulator, not only a few")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(config, items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if marked else None
    if reason is None:
        return
    if config.getoption("--require-gpu"):
        raise pytest.UsageError(f"--require-gpu: {len(marked)} tests need a GPU, and there is none ({reason})")
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=f"needs a GPU ({reason})"))
