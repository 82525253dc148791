"""Recover the time constants of a system from noisy, irregularly sampled data: gradient descent through the exact scan.

The system: a Peltier element heats and cools a part, whose temperature is the sum of three stages, each x' = (power - x)/tau,
times its gain. A stage is a state of one channel with A = -1/tau, B = 1/tau and C = gain. Power is held between samples and
delta is the true time between them, so zero-order hold is exact.
"""

import argparse
from pathlib import Path

import numpy as np

from mambacupy import selective_scan, selective_scan_bwd, selective_scan_fwd

PICTURE = Path(__file__).parent.parent.parent / "docs" / "time_constants.png"
TIME_CONSTANTS, GAINS = [0.2, 3.0, 30.0], [0.5, 1.0, 1.5]  # s, K/W
FIRST_GUESS = [1.0, 5.0, 10.0], [1.0, 1.0, 1.0]
NOISE = 0.05  # K


def parameters_of(time_constants, gains):
    """What the descent moves: logarithms of time constants, and gains, (2, 3)."""
    return np.stack((np.log(time_constants), gains))


def observe(samples=600, seed=0):
    """Power u, the times delta between samples, and the noisy temperature, all (1, 1, samples)."""
    rng = np.random.default_rng(seed)
    delta = np.exp(rng.uniform(np.log(0.02), np.log(2), samples))  # s
    switches = np.cumsum(np.exp(rng.uniform(np.log(0.05), np.log(20), samples)))  # s
    u = 1.0 - 2 * (np.searchsorted(switches, np.cumsum(delta)) % 2)  # W: heating and cooling in turn
    u, delta = u[None, None], delta[None, None]  # (length,) -> (batch, dim, length)
    data = response(parameters_of(TIME_CONSTANTS, GAINS), u, delta)
    return u, delta, data + NOISE * rng.standard_normal(data.shape)


def response(parameters, u, delta):
    """The temperature at the end of every interval."""
    B, C = np.exp(-parameters[:1]), parameters[1:]  # 1/tau and gain, (1, 3): dim, state
    return selective_scan(u, delta, -B, B, C, discretization="zoh")


def recover(u, delta, data, parameters, steps=400, rate=0.5, momentum=0.9):
    """Minimise the mean squared error. Gives the parameters at first and after every step, (steps + 1, 2, 3)."""
    path, velocity = [parameters], 0
    for _ in range(steps):
        B, C = np.exp(-parameters[:1]), parameters[1:]
        y, _, saved = selective_scan_fwd(u, delta, -B, B, C, discretization="zoh")
        grads = selective_scan_bwd(2 * (y - data) / data.size, saved)
        # A = -exp(-log tau) and B = exp(-log tau): their slopes along log tau are B and -B.
        gradient = np.concatenate(((grads.A - grads.B) * B, grads.C))
        velocity = momentum * velocity - rate * gradient
        parameters = parameters + velocity
        path.append(parameters)
    return np.stack(path)


def report(parameters, u, delta, data):
    """True and recovered numbers as a table in Markdown, and what is left of the data."""
    lines = ["| stage | true tau (s) | recovered | error | true gain (K/W) | recovered | error |", f"|{'---|' * 7}"]
    found = np.exp(parameters[0]), parameters[1]
    for stage in range(3):
        cells = [f"{stage + 1}"]
        for true, recovered in zip((TIME_CONSTANTS, GAINS), found, strict=True):
            error = recovered[stage] / true[stage] - 1
            cells += [f"{true[stage]:g}", f"{recovered[stage]:#.3g}", f"{100 * error:+.1f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    rms = np.sqrt(np.mean((response(parameters, u, delta) - data) ** 2))
    return "\n".join([*lines, "", f"Residual {rms:.4f} K rms, noise {NOISE} K rms."])


def draw(path, u, delta, data, picture):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    fine = np.repeat(u, 20, axis=2), np.repeat(delta / 20, 20, axis=2)  # 20 steps an interval: exact, too
    for label, parameters, style in (
        ("first guess", path[0], {"color": "0.55", "linewidth": 1, "linestyle": ":"}),
        ("true", parameters_of(TIME_CONSTANTS, GAINS), {"color": "C1", "linewidth": 5, "alpha": 0.4}),
        ("recovered", path[-1], {"color": "C0", "linewidth": 1.2}),
    ):
        left.plot(np.cumsum(fine[1]), response(parameters, *fine)[0, 0], label=label, **style)
    left.plot(np.cumsum(delta), data[0, 0], "k.", markersize=3.5, label="data")
    left.set(xlabel="time (s)", ylabel="temperature change (K)", xlim=(0, 60), ylim=(-2.8, 3.6))
    left.set_title(f"The first 60 of {delta.sum():.0f} s", fontsize="medium")
    left.legend(ncols=4, fontsize="small", loc="upper center", frameon=False)

    last = len(path) - 1
    for stage, true in enumerate(TIME_CONSTANTS):
        right.axhline(true, color=f"C{stage}", linewidth=1, linestyle="--")
        taus = np.exp(path[:, 0, stage])
        right.plot(taus, color=f"C{stage}")
        right.text(0.99 * last, true * 1.15, f"{taus[-1]:#.3g} s (true {true:g} s)", ha="right", fontsize="small")
    right.set(xlabel="iteration", ylabel="time constant (s)", yscale="log", xlim=(0, last), ylim=(0.1, 100))
    right.yaxis.set_major_formatter("{x:g}")
    right.set_title("Time constants (dashed: true)", fontsize="medium")
    figure.savefig(picture, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="NumPy, or CuPy on the current GPU")
    observed, start = observe(), parameters_of(*FIRST_GUESS)
    if parser.parse_args().device == "cuda":
        import cupy

        path = recover(*map(cupy.asarray, observed), cupy.asarray(start)).get()
    else:
        path = recover(*observed, start)
    print(report(path[-1], *observed))
    draw(path, *observed, PICTURE)


if __name__ == "__main__":
    main()
