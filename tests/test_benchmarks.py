"""The report on a record, and the benchmarks' own code with NumPy in the GPU's place. Nothing here is a measurement."""

import json
import re
from pathlib import Path

import cases
import numpy as np
import pytest

from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "benchmarks" / "records" / "A-card.json"
LIMITS = {f"forward_{name}_ms": ms for name, ms in (("memory", 0.1), ("exponentials", 0.3), ("issue", 0.2))}
TIMES = {"forward_length_ms": 0.5, "forward_channel_ms": 0.51234, "backward_length_ms": 2.0, "backward_channel_ms": 12.345}
RECORD = {
    "device": "A card",
    "tests": {"passed": 3},
    "copy_terabytes_per_second": 4.2,
    "host_microseconds": {"forward": 41.6, "backward": 94.0, "state update": 20.2},
    "first_call_seconds": {"compiling": 0.71, "from_cache": 0.016},
    "bytes_kept_an_element": 1.0,
    "rows": [{"row": "a scan", **TIMES, **LIMITS, "peer_forward_ms": 1.17, "peer_backward_ms": 4.8}],
    "sweeps": {name: {"1": {"forward": 1.0, "backward": 2.0}, "4": {"forward": 3.0, "backward": 5.0}}
               for name in ("length", "batch")},
    "models": [{"row": "slower", "ms": 200.0, "peer_ms": 104.9}, {"row": "faster", "ms": 0.005568, "peer_ms": 0.096}],
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the report
def test_section_has_every_row_once_with_what_the_original_takes():
    text = report.section(RECORD, PATH)
    assert "| a scan | 0.500 / 0.512 | 1.17 | 0.3 | 2.00 / 12.3 | 4.80 |\n" in text
    assert "| slower | 200 | 105 | 0.52 |\n| faster | 0.00557 | 0.0960 | 17.24 |\n" in text
    assert "42 µs (forward), 94 µs (backward), 20 µs (state update)" in text
    assert "[A-card.json](benchmarks/records/A-card.json)" in text
    assert max(map(len, text.splitlines())) <= 140


def test_section_replaces_the_one_before_and_nothing_else():
    new = report.section(RECORD, PATH)
    once = report.replace_section("before\n\n## Where things are\n\nafter", new)
    assert once == f"before\n\n{new}\n\n## Where things are\n\nafter"
    assert report.replace_section(once, new) == once
    other = report.section(RECORD | {"device": "Another"}, PATH)
    assert report.replace_section(report.replace_section(once, other), new) == once


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(RECORD, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_readme_shows_its_record_and_nothing_typed_by_hand():
    text = (ROOT / "README.md").read_text()
    path = ROOT / re.search(r"\((benchmarks/records/[^)]+\.json)\)", text)[1]
    assert report.replace_section(text, report.section(json.loads(path.read_text()), path)) == text


# ---------------------------------------------------------------------------------------------------- what is timed
@pytest.fixture
def models(monkeypatch):
    """`benchmarks.models` on the host, without clocks."""
    pytest.importorskip("cupy")
    from benchmarks import generation, models

    def once(calls, repeats):
        for call in calls:
            call()
        return 0.0012344

    for module in (models, generation):
        monkeypatch.setattr(module, "cp", np)
        monkeypatch.setattr(module, "free", lambda: None)
        monkeypatch.setattr(module, "VOCABULARY", 50)
    monkeypatch.setattr(models, "median_seconds", once)
    monkeypatch.setattr(models, "SIZES", {"small": (32, 2)})
    monkeypatch.setattr(generation, "SIZES", {"130m": (32, 2)})
    monkeypatch.setattr(generation, "time_model", lambda model, params, batch: (0.25, 0.5))
    return models


def test_operations(models):
    for order in ("length", "channel"):
        calls = dict(models.conv(order, 2, 6, 9))
        y, dx = calls["forward"](), calls["backward"]().x
        assert y.shape == dx.shape == (2, 6, 9) and y.dtype == cases.DTYPES["bfloat16"]
        assert cases.is_channel_contiguous(y) == (order == "channel")
    assert dict(models.state_update(3, 8))[""]().shape == (3, 8)
    y, total, _ = dict(models.norm(5, 16))[""]()
    assert (y.dtype, total.dtype) == (cases.DTYPES["bfloat16"], np.float32)


def test_prefill_and_training(models):
    logits = dict(models.prefill("small", 20))[""]()
    assert logits.shape == (1, 1, 56) and logits.dtype == np.float16 and np.isfinite(logits).all()
    step = dict(models.training("small", 2, 20))[""]
    step()
    now = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__), strict=True))["now"]
    step()
    weights = now["params"]["embedding"]["weight"]
    assert now["state"].step == 2 and weights.dtype == np.float32 and np.isfinite(weights).all()


def test_step_sizes_are_those_that_models_begin_with(models):
    from benchmarks import generation

    bias = generation._step_sizes(np.random.default_rng(0), 1000).astype(np.float64)
    steps = np.log1p(np.exp(bias))
    assert 0.00099 < steps.min() < 0.0012 and 0.08 < steps.max() < 0.101 and 0.008 < np.median(steps) < 0.0125


def test_rows_are_selected_by_name(models, monkeypatch):
    def broken():
        raise RuntimeError("as it was raised")
        yield

    rows = [
        ("conv", models.conv, ("length", 1, 4, 5), (1.0, 2.0)),
        ("training small", models.training, ("small", 1, 9), (3.0,)),
        ("broken", broken, (), (4.0,)),
    ]
    monkeypatch.setattr(models, "ROWS", rows)
    assert [(row["row"], row["peer_ms"]) for row in models.measure("conv")] == [("conv forward", 1.0), ("conv backward", 2.0)]
    assert models.measure("training") == [{"row": "training small", "ms": 1.234, "peer_ms": 3.0}]
    made = {"row": "generation 130m float16, batch 64, a token", "ms": 0.5, "peer_ms": 0.936, "graph_ms": 0.25}
    assert models.measure("batch 64") == [made] and len(models.measure("generation")) == 2
    assert models.measure("nothing of the kind") == []
    with pytest.raises(RuntimeError, match="as it was raised"):
        models.measure("")


# ---------------------------------------------------------------------------------------------------- what is sanitized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sanitized_operations(monkeypatch, dtype):
    pytest.importorskip("cupy")
    from benchmarks import sanitize

    monkeypatch.setattr(cases, "to_gpu", lambda x: x)
    found = dict(sanitize.operations(dtype))
    assert len(found) == 15
    for name, results in found.items():
        assert all(np.isfinite(x.astype(np.float64)).all() for x in results if x is not None), name
