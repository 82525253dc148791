"""Mamba's selective scan for NumPy and CuPy arrays, with hand-written CUDA kernels and gradients."""

from mambacupy.gradients import check_gradients
from mambacupy.ops.selective_scan import (
    SelectiveScanGrads,
    SelectiveScanSaved,
    selective_scan,
    selective_scan_bwd,
    selective_scan_fwd,
)

__version__ = "0.1.0"
__all__ = [
    "SelectiveScanGrads",
    "SelectiveScanSaved",
    "check_gradients",
    "selective_scan",
    "selective_scan_bwd",
    "selective_scan_fwd",
]
