"""The operations in NumPy, forward and backward: the oracle of the tests, and what runs without a GPU."""

from mambacupy.reference.functions import phi, phi_derivative, sigmoid, softplus
from mambacupy.reference.scan import (
    CHUNK,
    SelectiveScanGrads,
    SelectiveScanSaved,
    selective_scan,
    selective_scan_bwd,
    selective_scan_fwd,
)

__all__ = [
    "CHUNK",
    "SelectiveScanGrads",
    "SelectiveScanSaved",
    "phi",
    "phi_derivative",
    "selective_scan",
    "selective_scan_bwd",
    "selective_scan_fwd",
    "sigmoid",
    "softplus",
]
