"""The example's inputs follow from its data, and its filters do what its README says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import expm

from mambacupy import selective_scan

FOLDER = Path(__file__).parent.parent / "examples" / "ice_core"
sys.path.insert(0, str(FOLDER))

from make_inputs import TIME_CONSTANTS, make_inputs  # noqa: E402
from smooth import smooth  # noqa: E402


@pytest.fixture(scope="module")
def record():
    return np.load(FOLDER / "age.npy"), np.load(FOLDER / "co2.npy")


def test_inputs_follow_from_the_record(record):
    for name, x in make_inputs(*record).items():
        assert np.load(FOLDER / f"{name}.npy").tobytes() == x.tobytes(), name


def test_delta_is_the_whole_time(record):
    age, _ = record
    assert np.allclose(make_inputs(*record)["delta"].sum(2), age[-1] - age[0], rtol=1e-12)


def test_filters_are_exact_on_the_irregular_grid(record):
    """Against the matrix exponential of [[A, B], [0, 0]], which holds (exp(AΔ), (exp(AΔ) - 1)/A·B)."""
    inputs = {k: x[..., :200] if k in ("u", "delta") else x for k, x in make_inputs(*record).items()}
    y = selective_scan(**inputs, discretization="zoh")
    for channel, tau in enumerate(TIME_CONSTANTS):
        x = inputs["initial_state"][0, channel, 0]
        for t in range(200):
            step = expm(np.array([[-1 / tau, 1 / tau], [0, 0]]) * inputs["delta"][0, channel, t])
            x = step[0] @ [x, inputs["u"][0, channel, t]]
            assert y[0, channel, t] == pytest.approx(x, rel=1e-11)


def test_smoothing_has_no_lag(record):
    """A parabola through the middle of the record comes back shifted up by 2·tau²/2·2, and not sideways."""
    age = np.linspace(0, 100, 4001)
    parabola = (age - 50.0) ** 2
    line = smooth(age, parabola)[1][::-1]  # tau = 1
    middle = slice(1000, 3001)
    assert np.abs(line[middle] - parabola[middle] - 2.0).max() < 0.1


def test_the_demo_scans_the_example(tmp_path):
    target = tmp_path / "y.npy"
    command = [sys.executable, "-m", "mambacupy.cli", "scan", str(FOLDER), "--discretization", "zoh", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent.parent)
    assert done.returncode == 0, done.stderr
    assert np.load(target).shape == (1, 4, 1901)
