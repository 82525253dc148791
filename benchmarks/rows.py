"""The shapes that are timed, and what the original implementation (state-spaces/mamba 2.3.2) takes for them.

`peer_*_ms` were measured on one NVIDIA H100 80GB HBM3 (CUDA 13.0) with that package built for the card.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """A selective scan with z, D, delta_bias and softplus; B and C vary with one group."""

    batch: int
    dim: int
    length: int
    state: int
    dtype: str
    complex: bool
    peer_forward_ms: float
    peer_backward_ms: float

    @property
    def elements(self):
        return self.batch * self.dim * self.length

    @property
    def forward_bytes(self):
        """u, delta, z, B and C read, y written."""
        return (4 * self.elements + self._coefficients) * self._itemsize

    @property
    def backward_bytes(self):
        """u, delta, z, dy, B and C read, du, ddelta, dz, dB and dC written, the kept states read."""
        kept = self.elements // 64 * self.state * (8 if self.complex else 4)
        return (7 * self.elements + 2 * self._coefficients) * self._itemsize + kept

    @property
    def forward_exponentials(self):
        """Instructions of the special-function unit: one a state, one for softplus, two for the gate."""
        return self.elements * (self.state + 3)

    @property
    def forward_instructions(self):
        """Warp instructions that no kernel of this mathematics goes without: five a state (product, exponential, product, two
        multiply-adds; complex states take about 25, of which sine and cosine most), and 30 an element."""
        return self.elements * (self.state * (25 if self.complex else 5) + 30) // 32

    @property
    def _coefficients(self):
        return 2 * self.batch * self.state * self.length * (2 if self.complex else 1)

    @property
    def _itemsize(self):
        return 4 if self.dtype == "float32" else 2

    @property
    def name(self):
        return f"{self.dtype}{' complex' if self.complex else ''} ({self.batch}, {self.dim}, {self.length}) N{self.state}"


ROWS = [
    Row(8, 2048, 4096, 16, "bfloat16", False, 1.170, 4.828),
    Row(8, 2048, 2048, 16, "bfloat16", False, 0.595, 2.437),
    Row(2, 5120, 4096, 16, "bfloat16", False, 0.750, 3.070),
    Row(64, 1536, 512, 16, "bfloat16", False, 0.799, 3.222),
    Row(1, 1536, 65536, 16, "bfloat16", False, 2.229, 7.839),
    Row(1, 2048, 131072, 16, "bfloat16", False, 5.839, 22.93),
    Row(1, 768, 1024, 16, "bfloat16", False, 0.0263, 0.130),
    Row(8, 2048, 2048, 64, "bfloat16", False, 1.979, 9.345),
    Row(8, 2048, 4096, 16, "float32", False, 2.474, 5.554),
    Row(1, 2048, 131072, 16, "float32", False, 11.55, 25.77),
    Row(8, 2048, 2048, 16, "bfloat16", True, 1.534, 5.419),
]
