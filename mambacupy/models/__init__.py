"""Language models made of `mambacupy.layers`. `import mambacupy` does not import them."""

from mambacupy.layers import State
from mambacupy.models.config import MambaConfig
from mambacupy.models.mamba import MambaLM

__all__ = ["MambaConfig", "MambaLM", "State"]
