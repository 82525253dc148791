"""What the driver is handed: structures as cuda.h lays them out on 64-bit machines, and the launch that was asked for."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from mambacupy import overlapping


def test_structures_are_those_of_cuda_h():
    attribute, config = overlapping._Attribute, overlapping._Config
    assert (ctypes.sizeof(attribute), attribute.id.offset, attribute.value.offset) == (72, 0, 8)
    assert [getattr(config, name).offset for name in ("grid", "block", "shared_bytes")] == [0, 12, 24]
    assert [getattr(config, name).offset for name in ("stream", "attributes", "attribute_count")] == [32, 40, 48]
    assert ctypes.sizeof(config) == 56


@pytest.fixture
def driver(monkeypatch):
    """A driver that keeps what it is asked to launch, and answers with `status`."""
    cupy = pytest.importorskip("cupy")
    seen = SimpleNamespace(status=0, calls=[])

    def launch(config, function, pointers, extra):
        config = config._obj
        argument = ctypes.string_at(pointers[0], 16)
        attribute = config.attributes[0]
        seen.calls.append(
            {
                "grid": tuple(config.grid), "block": tuple(config.block), "shared_bytes": config.shared_bytes,
                "stream": config.stream, "attribute": (attribute.id, attribute.value), "count": config.attribute_count,
                "function": function.value, "argument": argument, "extra": extra,
            }
        )  # fmt: skip
        return seen.status

    monkeypatch.setattr(overlapping, "_driver", lambda: launch)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: SimpleNamespace(ptr=77))
    return seen


def test_a_launch(driver):
    argument = np.zeros(16, np.uint8)
    launch = overlapping.overlapping(5, 256, argument, 64)
    argument[...] = np.frombuffer(b"0123456789abcdef", np.uint8)  # as it is when it is launched
    launch(SimpleNamespace(ptr=1234))
    assert driver.calls == [
        {
            "grid": (5, 1, 1), "block": (256, 1, 1), "shared_bytes": 64, "stream": 77, "attribute": (6, 1), "count": 1,
            "function": 1234, "argument": b"0123456789abcdef", "extra": None,
        }
    ]  # fmt: skip


def test_a_refusal_is_an_error(driver):
    driver.status = 1
    with pytest.raises(overlapping.OverlapError, match="cuLaunchKernelEx: error 1 of the CUDA driver"):
        overlapping.overlapping(1, 32, np.zeros(16, np.uint8))(SimpleNamespace(ptr=1))
