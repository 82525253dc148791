"""What a Mamba language model is made of, as numbers."""

import math
from dataclasses import dataclass

__all__ = ["MambaConfig"]


@dataclass(frozen=True)
class MambaConfig:
    """Hyper-parameters of `MambaLM`, named and defaulting as in the field.

    Parameters
    ----------
    d_model : int
        Numbers per token between blocks.
    n_layer : int
        Blocks.
    vocab_size : int
        Tokens that exist. The model has `padded_vocab_size` rows.
    d_state, d_conv, expand : int
        States per channel, width of the convolution, and channels inside a block as a multiple of d_model (a float will do).
    dt_rank : int or "auto"
        Rank of the projection to step sizes. "auto" is ceil(d_model / 16); `rank` is the number.
    dt_min, dt_max, dt_init, dt_scale, dt_init_floor
        Initial step sizes: see `mambacupy.layers.MambaMixer`.
    conv_bias, bias : bool
        Whether the convolution, and the projections into and out of a block, have a bias.
    rms_norm : bool
        RMSNorm, or else LayerNorm.
    residual_in_fp32 : bool
        Keep the sum of what the blocks add in float32 where they compute in 16 bits.
    norm_eps : float
        Added under the root in norms.
    tie_embeddings : bool
        Whether the head is the embedding.
    pad_vocab_size_multiple : int
        The model's vocabulary is rounded up to a multiple of this.
    bc_dt_norm : bool
        RMS norms without weights on dt, B and C, as FalconMamba has them.
    bc_dt_norm_eps : float
        Added under the root there.
    bos_token_id, eos_token_id, pad_token_id : int, optional
        Tokens with which a text begins and ends, and which fill rows, as a checkpoint states them; eos_token_id may be a tuple
        of several. The model does nothing with them.

    Raises
    ------
    TypeError, ValueError
        A field is of another kind, or no model has such a value.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int | str = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False
    rms_norm: bool = True
    residual_in_fp32: bool = True
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    bc_dt_norm: bool = False
    bc_dt_norm_eps: float = 1e-6
    bos_token_id: int | None = None
    eos_token_id: int | tuple | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        for name in ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "pad_vocab_size_multiple"):
            _check_count(name, getattr(self, name), least=0 if name == "n_layer" else 1)
        if self.dt_rank != "auto":
            _check_count("dt_rank", self.dt_rank, least=1, otherwise=" or 'auto'")
        for name in ("conv_bias", "bias", "rms_norm", "residual_in_fp32", "tie_embeddings", "bc_dt_norm"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"MambaConfig: {name} is {getattr(self, name)!r}, wanted True or False")
        if self.dt_init not in ("random", "constant"):
            raise ValueError(f"MambaConfig: dt_init is {self.dt_init!r}, wanted 'random' or 'constant'")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"MambaConfig: dt_min is {self.dt_min} and dt_max {self.dt_max}, wanted 0 < dt_min <= dt_max")
        for name in ("expand", "dt_scale", "dt_init_floor", "norm_eps", "bc_dt_norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"MambaConfig: {name} is {getattr(self, name)!r}, wanted a number above 0")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, tuple)
            if value is not None and not all(map(_is_integer, value if several else (value,))):
                raise TypeError(f"MambaConfig: {name} is {value!r}, wanted the number of a token, or None")
        if self.d_inner < 1:
            raise ValueError(f"MambaConfig: expand is {self.expand} and d_model {self.d_model}, wanted a product of 1 or more")

    @property
    def d_inner(self):
        """Channels inside a block."""
        return int(self.expand * self.d_model)

    @property
    def rank(self):
        """dt_rank as a number."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def padded_vocab_size(self):
        """Rows of the embedding, and logits per token."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _check_count(name, value, least, otherwise=""):
    if not _is_integer(value):
        raise TypeError(f"MambaConfig: {name} is {value!r}, wanted an integer{otherwise}")
    if value < least:
        raise ValueError(f"MambaConfig: {name} is {value}, wanted {least} or more{otherwise}")
