"""Small models for tests: what a configuration may change, and parameters moved so that every part matters."""

import numpy as np
import pytest

from mambacupy.layers import map_params
from mambacupy.models import MambaConfig, MambaLM

VARIANTS = {
    "base": {},
    "untied": {"tie_embeddings": False},
    "layer-norm": {"rms_norm": False},
    "bc-dt-norm": {"bc_dt_norm": True},
    "biases": {"bias": True},
    "no-conv-bias": {"conv_bias": False},
    "residual-as-computed": {"residual_in_fp32": False},
    "no-layer": {"n_layer": 0},
}


def make(config, spread, dtype, compute=None, checkpoint=False):
    """A model of a configuration, and parameters of a dtype, `spread` about those that training begins with."""
    model, rng = MambaLM(MambaConfig(**config), compute, checkpoint), np.random.default_rng(7)
    params = model.init(rng, np.float64)
    return model, map_params(lambda p: (p + spread * rng.standard_normal(p.shape)).astype(dtype), params)


def save_tokenizer(path):
    """Bytes, and an end of text: number 256."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers (the extra `test`)")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(path))
