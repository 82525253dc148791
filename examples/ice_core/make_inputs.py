"""Make the scan's arguments from the record: four low-pass filters, one a channel, over the same series.

A filter with time constant tau solves x' = (co2 - x)/tau, that is x' = A·x + B·u with A = -1/tau and B = 1/tau. Each sample is
held over the interval since the one before it, so delta is that interval and zero-order hold is exact.
"""

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TIME_CONSTANTS = np.array([0.3, 1.0, 3.0, 10.0])  # thousand years


def make_inputs(age, co2):
    """Arguments of `mambacupy.selective_scan` by name, time running from the oldest sample to the youngest.

    Parameters
    ----------
    age : array (length,)
        Thousand years before present, ascending.
    co2 : array (length,)
        Parts per million.
    """
    series, time = co2[::-1], -age[::-1]
    held = np.diff(time, prepend=time[0])  # the first sample is the initial state, held for no time
    channels = len(TIME_CONSTANTS)
    return {
        "u": np.tile(series, (1, channels, 1)),
        "delta": np.tile(held, (1, channels, 1)),
        "A": -1 / TIME_CONSTANTS[:, None],
        "B": 1 / TIME_CONSTANTS[:, None],
        "C": np.ones((channels, 1)),
        "initial_state": np.full((1, channels, 1), series[0]),
    }


if __name__ == "__main__":
    for name, x in make_inputs(np.load(HERE / "age.npy"), np.load(HERE / "co2.npy")).items():
        np.save(HERE / f"{name}.npy", x)
