"""Smooth the CO2 record without lag, and draw it: docs/ice_core.png. Needs matplotlib (`pip install "mambacupy[plot]"`)."""

from pathlib import Path

import numpy as np
from make_inputs import TIME_CONSTANTS, make_inputs

from mambacupy import selective_scan

HERE = Path(__file__).parent


def smooth(age, co2):
    """The record through each filter forwards and then backwards in time, (time constants, length), oldest sample first."""
    inputs = make_inputs(age, co2)
    forwards = selective_scan(**inputs, discretization="zoh")
    # Backwards a sample is held over the interval to the one after it.
    held = np.roll(inputs["delta"], -1, axis=2)
    again = inputs | {"u": forwards, "delta": held, "initial_state": forwards[:, :, -1:].copy()}
    return selective_scan(**again, discretization="zoh", reverse=True)[0]


def draw(age, co2, smoothed, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (whole, part) = plt.subplots(2, 1, figsize=(9, 6), layout="constrained")
    for axes, (oldest, youngest) in ((whole, (806, -1)), (part, (30, 5))):
        seen = (age >= youngest) & (age <= oldest)
        axes.plot(age[seen], co2[seen], ".", color="0.6", markersize=3, label="samples")
        for tau, line, color in zip(TIME_CONSTANTS, smoothed, ("C0", "C2", "C1", "C3"), strict=True):
            axes.plot(age[seen], line[::-1][seen], color=color, linewidth=1.3, label=f"τ = {tau:g} kyr")
        axes.set_xlim(oldest, youngest)
        axes.set_ylabel("CO$_2$ (ppm)")
    whole.set_ylim(165, 320)
    whole.legend(ncols=5, fontsize="small", loc="upper center", frameon=False)
    whole.set_title("CO$_2$ in Antarctic ice (Bereiter et al. 2015), smoothed on its own irregular grid", fontsize="medium")
    part.set_xlabel("age (thousand years before 1950)")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    age, co2 = np.load(HERE / "age.npy"), np.load(HERE / "co2.npy")
    picture = HERE.parent.parent / "docs" / "ice_core.png"
    draw(age, co2, smooth(age, co2), picture)
    print(f"wrote {picture.relative_to(HERE.parent.parent)}")
