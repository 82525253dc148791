"""Mamba's selective scan for NumPy and CuPy arrays, with hand-written CUDA kernels and gradients."""

from mambacupy.gradients import check_gradients
from mambacupy.ops.causal_conv1d import (
    CausalConv1dGrads,
    CausalConv1dSaved,
    causal_conv1d,
    causal_conv1d_bwd,
    causal_conv1d_fwd,
    causal_conv1d_update,
)
from mambacupy.ops.selective_scan import (
    SelectiveScanGrads,
    SelectiveScanSaved,
    selective_scan,
    selective_scan_bwd,
    selective_scan_fwd,
)
from mambacupy.ops.selective_state_update import selective_state_update

__version__ = "0.1.0"
__all__ = [
    "CausalConv1dGrads",
    "CausalConv1dSaved",
    "SelectiveScanGrads",
    "SelectiveScanSaved",
    "causal_conv1d",
    "causal_conv1d_bwd",
    "causal_conv1d_fwd",
    "causal_conv1d_update",
    "check_gradients",
    "selective_scan",
    "selective_scan_bwd",
    "selective_scan_fwd",
    "selective_state_update",
]
