"""The example recovers its time constants, ends where least squares ends, and prints what its README says."""

import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "time_constants"
sys.path.insert(0, str(FOLDER))

import recover as example  # noqa: E402


@pytest.fixture(scope="module")
def observed():
    return example.observe()


@pytest.fixture(scope="module")
def path(observed):
    return example.recover(*observed, example.parameters_of(*example.FIRST_GUESS))


def solved(parameters, u, delta):
    """The temperature by x(t + Δ) = power + (x(t) - power)·exp(-Δ/tau), the solution while power is held."""
    tau, gain = np.exp(parameters[0]), parameters[1]
    x, temperature = np.zeros(3), []
    for power, held in zip(u.ravel(), delta.ravel(), strict=True):
        x = power + (x - power) * np.exp(-held / tau)
        temperature.append(gain @ x)
    return np.array(temperature)


def test_the_data_are_the_system_with_its_noise(observed):
    u, delta, data = observed
    noise = data.ravel() - solved(example.parameters_of(example.TIME_CONSTANTS, example.GAINS), u, delta)
    assert noise.std() == pytest.approx(example.NOISE, rel=0.1)  # 600 samples: standard error 3 %
    assert abs(noise.mean()) < 4 * example.NOISE / np.sqrt(noise.size)
    assert delta.max() > 50 * delta.min()


def test_time_constants_and_gains_are_recovered_to_five_percent(path):
    assert np.exp(path[-1, 0]) == pytest.approx(example.TIME_CONSTANTS, rel=0.05)
    assert path[-1, 1] == pytest.approx(example.GAINS, rel=0.05)


def test_the_descent_ends_where_least_squares_ends(observed, path):
    optimize = pytest.importorskip("scipy.optimize")
    u, delta, data = observed
    start = example.parameters_of(*example.FIRST_GUESS)
    fit = optimize.least_squares(lambda p: solved(p.reshape(2, 3), u, delta) - data.ravel(), start.ravel(), x_scale="jac")
    assert np.allclose(path[-1].ravel(), fit.x, rtol=0, atol=1e-3)  # of log tau and gain; the noise moves them by 1e-2


def test_readme_has_the_numbers_of_a_run(observed, path):
    assert example.report(path[-1], *observed) in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_picture_is_drawn_and_small(observed, path, tmp_path):
    pytest.importorskip("matplotlib")
    example.draw(path, *observed, tmp_path / "picture.png")
    assert 20_000 < (tmp_path / "picture.png").stat().st_size < 200_000


@pytest.mark.gpu
def test_cupy_takes_the_same_path(observed, path):
    import cupy

    on_gpu = [cupy.asarray(x) for x in (*observed, example.parameters_of(*example.FIRST_GUESS))]
    got = example.recover(*on_gpu)
    assert isinstance(got, cupy.ndarray)
    assert np.allclose(got.get(), path, rtol=0, atol=1e-6)
